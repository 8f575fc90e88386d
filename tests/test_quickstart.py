"""The quick starts run as they are written, offline, and page, notebook and README say the same."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import tiny
from helpers import script

PROJECT = Path(__file__).parents[1]
PAGE = (PROJECT / "docs" / "quickstart.md").read_text()
NOTEBOOK = PROJECT / "docs" / "quickstart.ipynb"


def typed():
    """What the notebook's cells type in a shell, line by line."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = [re.sub(r"\s*\\\n\s*", " ", "".join(cell["source"])) for cell in cells]
    return [line[1:] for source in sources for line in source.splitlines() if line.startswith("!")]


def test_the_notebook_is_made_of_the_page():
    assert script("examples/quickstart.py").written(PAGE) == NOTEBOOK.read_text(), "type: python examples/quickstart.py"


def test_every_command_of_the_page_is_in_the_notebook_in_its_order():
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).strip().splitlines()]
    assert typed() == lines and len(lines) > 10


def test_each_quick_start_has_less_than_ten_lines_of_commands():
    for section in PAGE.split("\n## ")[1:]:
        blocks = re.findall(r"^```bash\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        assert 0 < sum(len(block.splitlines()) for block in blocks) < 10


def test_pictures_and_files_that_the_page_names_are_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PAGE)
    assert pictures and all((PROJECT / "docs" / name).is_file() for name in pictures)
    assert all((PROJECT / name).is_file() for name in re.findall(r"examples/[\w/]+\.\w+", PAGE))


def test_the_readme_points_to_the_quick_starts():
    assert "docs/quickstart.md" in (PROJECT / "README.md").read_text()


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(run, tmp_path, monkeypatch):
    """Tiny random models lie where the aliases' real ones would; all else is as it is typed."""
    for number, alias in enumerate(("smollm2-135m", "gemma3-270m")):
        tiny.save_model(tmp_path / "cache" / "models" / alias, seed=number)
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(PROJECT / "examples" / "data", tmp_path / "examples" / "data")
    monkeypatch.chdir(tmp_path)
    for line in typed():
        words = []
        for word in shlex.split(line):
            words += sorted(map(str, Path().glob(word))) if "*" in word else [word]
        code, out, err = run(*words[1:])
        assert words[0] == "coterie" and code == 0, f"{line}\n{err}"
        assert out.strip()
    assert (tmp_path / "runs" / "elrea-eval" / "report.html").is_file()
