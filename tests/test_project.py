"""The project's promises about itself: its commands, its version, its quick help, and that nothing is unpickled."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import coterie

PROJECT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
PACKAGE = PROJECT / "src" / "coterie"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def pinned() -> dict[str, str]:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {plain(name): version for name, version in pairs}


def plain(requirement: str) -> str:
    """The normal form of the name a requirement begins with."""
    return re.match(r"[\w.-]+", requirement)[0].replace("_", "-").lower()


@pytest.mark.parametrize("command", ["make test", "make demo"])
def test_the_readme_shows_the_command(command):
    assert command in (PROJECT / "README.md").read_text()


def test_continuous_integration_runs_the_commands_of_the_readme():
    assert "make test" in (PROJECT / ".ci" / "run").read_text()
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert {"make lint", "make test"} <= set(commands)


def test_the_makefile_has_every_command_that_is_promised():
    targets = re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"setup", "test", "lint", "format", "docs", "wheel", "demo", "bench", "clean"} <= set(targets)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/release.md", "docs/evidence.md"])
def test_every_make_command_that_a_page_names_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make\s+([a-z-]+)", (PROJECT / page).read_text(), flags=re.MULTILINE))
    assert named and named <= targets


def test_the_version_stands_in_the_package_alone():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "src/coterie/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", coterie.__version__)


def test_the_installed_version_is_the_one_the_package_states():
    installed = importlib.metadata.version("coterie")
    assert installed == coterie.__version__, "the installation is out of date; type: make -B setup"


def test_every_direct_dependency_is_pinned_for_the_set_up():
    project = PYPROJECT["project"]
    groups = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *PYPROJECT["dependency-groups"].values(),
    ]
    assert {plain(requirement) for group in groups for requirement in group} == set(pinned())


def test_every_file_of_the_package_goes_into_the_wheel(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(command, cwd=PROJECT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("coterie/")}
    files = {path.relative_to(PROJECT / "src").as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert packed == {name for name in files if "__pycache__" not in name}
    assert "coterie/py.typed" in packed


def test_a_wheel_of_the_source_archive_runs_in_an_environment_that_has_nothing_else_of_ours(tmp_path):
    """Dependencies come from this environment by path alone, so that coterie itself is found in the new one only."""
    words = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        tmp_path / "dist",
    ]  # the wheel from the archive
    subprocess.run(words, cwd=PROJECT, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert list((tmp_path / "dist").glob("*.tar.gz"))
    new = tmp_path / "new"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", new], check=True)
    python = new / "bin" / "python"
    asked = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(asked, capture_output=True, check=True)
    (folder,) = new.glob("lib/python*/site-packages")
    (folder / "dependencies.pth").write_text(f"{Path(yaml.__file__).parents[1]}\n")
    where = [python, "-c", "import coterie; print(coterie.__file__)"]
    lone = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    found = subprocess.run(where, env=lone, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(new)
    help_ = subprocess.run([new / "bin" / "coterie", "--help"], env=lone, cwd=tmp_path, capture_output=True, text=True)
    assert help_.returncode == 0 and "fit" in help_.stdout, help_.stderr


HELP = """
import sys
from coterie.cli import main
sys.argv = ["coterie", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "transformers", "peft", "accelerate", "sklearn", "scipy", "math_verify", "datasets", "httpx2"}
found = sorted(heavy & set(sys.modules))
sys.exit(f"--help imported {found}" if found else 0)
"""


def test_help_is_shown_without_importing_torch():
    result = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "fit" in result.stdout


ANSWER = """
import sys
import coterie.evaluation.compare, coterie.methods, coterie.serve.app
from coterie import Mixture
Mixture.from_pretrained(sys.argv[1], device="cpu").generate("add 2 3", max_new_tokens=1)
heavy = {"peft", "datasets", "pandas", "sklearn", "scipy.stats", "bitsandbytes", "transformers.trainer"}
found = sorted(heavy & set(sys.modules))
sys.exit(f"answering imported {found}" if found else 0)
"""


def test_a_question_is_answered_without_what_trains(run_folder):
    """PEFT, the trainer and what they bring take seconds to load."""
    result = subprocess.run([sys.executable, "-c", ANSWER, run_folder], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_does_not_import_torch():
    code = "import sys, coterie; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "eval", "exec", "__import__"}


def unsafe(source: str) -> list[str]:
    """What in a source text could run code from a file: unpickling, or evaluating text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in PICKLERS]
            case ast.ImportFrom(module=str(module), names=names):
                found += [module] if module.split(".")[0] in PICKLERS else []
                found += [f"{module}.{alias.name}" for alias in names if f"{module}.{alias.name}" in UNSAFE_CALLS]
            case ast.Call(func=function, keywords=keywords):
                found += [name for name in [ast.unparse(function)] if name in UNSAFE_CALLS]
                settings = {f"{word.arg}={ast.unparse(word.value)}" for word in keywords}
                found += sorted(settings & {"allow_pickle=True", "trust_remote_code=True", "weights_only=False"})
    return found


def trusting(source: str) -> list[str]:
    """Loads of models and tokenizers that do not forbid a stranger's code, or weights that are not safetensors."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="from_pretrained"), keywords=keywords):
                settings = {f"{word.arg}={ast.unparse(word.value)}" for word in keywords}
                wanted = {"trust_remote_code=False"} if name.startswith("Auto") else set()
                wanted |= {"use_safetensors=True"} if name.startswith("AutoModel") else set()
                found += [f"{name} without {setting}" for setting in sorted(wanted - settings)]
            case ast.Call(func=ast.Name(id="pipeline" | "SentenceTransformer" | "CrossEncoder" as name)):
                found.append(name)
    return found


def test_every_load_forbids_code_of_the_models_own():
    wrong = {str(file.relative_to(PROJECT)): found for file in SOURCES if (found := trusting(file.read_text()))}
    assert wrong == {}


@pytest.mark.parametrize(
    "source",
    [
        "AutoConfig.from_pretrained('x')",
        "AutoTokenizer.from_pretrained('x', **{'trust_remote_code': False})",
        "AutoTokenizer.from_pretrained('x', trust_remote_code=None)",
        "AutoModelForCausalLM.from_pretrained('x', trust_remote_code=False)",
        "AutoModel.from_pretrained('x', use_safetensors=True)",
        "SentenceTransformer('x')",
    ],
)
def test_each_trusting_load_is_found(source):
    assert len(trusting(source)) == 1


def test_nothing_is_unpickled_or_evaluated():
    wrong = {str(file.relative_to(PROJECT)): found for file in SOURCES if (found := unsafe(file.read_text()))}
    assert wrong == {"src/coterie/grading/child.py": ["exec"]}  # in the process that is limited for it


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x.pt', weights_only=True)",
        "from torch import load",
        "eval('1')",
        "numpy.load('x.npy', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_each_unsafe_way_to_read_is_found(source):
    assert len(unsafe(source)) == 1


def test_a_method_that_is_called_eval_is_not_taken_for_the_builtin():
    assert unsafe("model.eval()") == []
