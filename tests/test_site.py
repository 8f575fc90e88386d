"""The documentation site: a page for everything there is, commands that can be typed, links that lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import coterie
import tiny
from coterie.cli.table import COMMANDS
from coterie.methods import FAMILIES, listed
from helpers import script

PROJECT = Path(__file__).parents[1]
GUIDES = sorted((PROJECT / "docs" / "guides").glob("*.md"))


@pytest.fixture(scope="module")
def build():
    return script("docs/build.py")


@pytest.fixture(scope="module")
def pages(build, tmp_path_factory) -> Path:
    """The site's pages, as they are handed to zensical."""
    folder = tmp_path_factory.mktemp("build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PAGES", folder / "docs")
        patch.setattr(build, "CONFIG", folder / "mkdocs.yml")
        build.write_pages()
    return folder / "docs"


def named(nav: list) -> dict[str, str]:
    """The places of a navigation by title, sections opened up."""
    pairs = [pair for entry in nav for pair in entry.items()]
    return {title: place for title, place in pairs if isinstance(place, str)} | {
        title: place for _, inner in pairs if isinstance(inner, list) for title, place in named(inner).items()
    }


def typed(text: str) -> list[str]:
    """The commands of a page's blocks that are marked as bash, one a line."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).strip().splitlines()]


def test_every_method_command_and_public_name_has_a_page_in_the_navigation(pages):
    nav = named(yaml.safe_load((pages.parent / "mkdocs.yml").read_text())["nav"])
    assert {row["method"] for row in listed()} <= set(nav) and set(COMMANDS) <= set(nav)
    functions = {name for name in coterie.__all__ if callable(getattr(coterie, name))}
    assert {f"coterie.{name}" for name in functions} <= set(nav)
    assert [place for place in nav.values() if not (pages / place).is_file()] == []


def test_every_page_that_was_written_by_hand_is_in_the_navigation(pages):
    places = set(named(yaml.safe_load((pages.parent / "mkdocs.yml").read_text())["nav"]).values())
    assert {file.relative_to(pages).as_posix() for file in pages.rglob("*.md")} == places


def test_every_link_between_pages_leads_somewhere(pages):
    broken = []
    for file in pages.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
            if not (file.parent / link).exists():
                broken.append(f"{file.relative_to(pages)}: {link}")
    assert broken == []


def test_a_methods_page_tells_its_places_its_source_and_what_was_measured(pages):
    text = (pages / "methods" / "prefill.md").read_text()
    assert "## After `coterie fit elrea`" in text and "https://arxiv.org/abs/2603.20895" in text
    assert "coterie train-extras runs/elrea --methods prefill" in text
    rows = [
        line for line in (PROJECT / "docs" / "evidence.md").read_text().splitlines() if line.startswith("| prefill |")
    ]
    assert rows and all(row in text for row in rows)
    assert (pages / "methods" / "arrow.md").read_text().count("## After") == 2  # one for each family that has it
    assert "[Its settings](../commands/fit-elrea.md)" in (pages / "methods" / "elrea.md").read_text()


def test_a_commands_page_lists_its_flags_with_what_help_says_of_them(pages, run):
    text = (pages / "commands" / "fit-elrea.md").read_text()
    assert "| `--rank` | `8` |" in text and "| `--data` | needed |" in text
    assert set(re.findall(r"^\| `(--[\w-]+)`", text, flags=re.MULTILINE)) >= {
        "--model",
        "--output",
        "--seed",
        "--clusters",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_commands_of_a_methods_page_can_be_typed(build, run, called, family):
    methods = FAMILIES[family].methods
    names = [
        family,
        *[name for name, method in methods.items() if method.needs][:1],
    ]  # others differ in names
    lines = [line for name in names for line in build.typed(name, FAMILIES[family])]
    for line in lines:
        assert run(*shlex.split(line)[1:])[0] == 0, line
    assert len(called) == len(lines) >= 1


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_commands_of_a_guide_can_be_typed(run, called, guide):
    lines = typed(guide.read_text().replace("```sh\n", "```bash\n"))
    for line in lines:
        assert run(*shlex.split(line)[1:])[0] == 0, line
    assert len(called) == len(lines) >= 4


def test_there_is_a_guide_for_each_of_the_four_kinds_of_users():
    assert [guide.stem for guide in GUIDES] == ["adapters", "data", "examples", "models"]


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_runs_from_its_first_command_to_its_last(run, tmp_path, monkeypatch, guide):
    """Tiny random models lie where the aliases' real ones would, with some of the rows; all else is as it is typed."""
    for number, alias in enumerate(("smollm2-135m", "gemma3-270m")):
        tiny.save_model(tmp_path / "cache" / "models" / alias, seed=number, terse=True)
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    (data := tmp_path / "examples" / "data").mkdir(parents=True)
    for file in (PROJECT / "examples" / "data").glob("*.jsonl"):  # fit auto trains on all, six times and more
        (data / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:40]))
    monkeypatch.chdir(tmp_path)
    for line in typed(guide.read_text()):
        code, _, err = run(*shlex.split(line)[1:])
        assert code == 0, f"{line}: {err}"


@pytest.mark.slow
def test_the_site_is_built_without_a_network_and_asks_for_nothing_elsewhere(pages):
    config = yaml.safe_load((pages.parent / "mkdocs.yml").read_text())
    config["plugins"][1]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(PROJECT / "src")]
    (pages.parent / "mkdocs.yml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", "mkdocs.yml"]
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    subprocess.run(words, cwd=pages.parent, env=offline, check=True, capture_output=True)
    site = pages.parent / "site"
    text = (site / "python" / "coterie.Mixture" / "index.html").read_text()
    assert "from_pretrained" in text and "push_to_hub" in text
    html = "".join(file.read_text() for file in site.rglob("*.html"))
    assert re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="https?://[^"]+"', html) == []
