"""Whatever a stranger changed in a record: it is read, or refused in one line that names the file."""

import shutil
from pathlib import Path

import pytest

from coterie.experts.bank import load_adapter
from coterie.experts.training import load_checkpoint
from coterie.mixture import Mixture
from hostile import file_changes, sample, survivors, tensor_changes

FEW = 60


def check(file: Path, read, count: int = FEW) -> None:
    tensors = file.suffix == ".safetensors"
    changes = sample([*tensor_changes(file)], count, file.name) if tensors else file_changes(file, count)
    failures = survivors(file, changes, read)
    assert not failures, f"{len(failures)} of {len(changes)} changes of {file.name}:\n" + "\n".join(failures[:40])


@pytest.fixture(scope="module")
def folder(grid_folder, tmp_path_factory) -> Path:
    return shutil.copytree(grid_folder, tmp_path_factory.mktemp("hostile") / "run")


@pytest.fixture
def opened(folder, backbone, monkeypatch):
    """Open the mixture on the base model that is loaded already."""
    monkeypatch.setattr("coterie.mixture.folder.load_backbone", lambda _: backbone)
    return lambda: Mixture.from_pretrained(folder)


def test_a_mixture(folder, opened):
    check(folder / "mixture.json", opened)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(folder, backbone, name):
    check(folder / "experts" / "base" / name, lambda: load_adapter(folder / "experts" / "base", backbone.model))


@pytest.mark.parametrize("name", ["adam.json", "adam.safetensors"])
def test_a_checkpoint(folder, backbone, name):
    checkpoint = folder / "checkpoints" / "epoch-0"
    check(checkpoint / name, lambda: load_checkpoint(checkpoint, backbone.model))


def test_a_routers_tensors(folder, opened):
    for file in sorted((folder / "router").iterdir()):
        check(file, opened)
