"""`Mixture.save_pretrained`: all that a mixture needs, whole or not at all, and nobody else's files replaced."""

import os
from pathlib import Path

import pytest

from coterie.errors import CoterieError
from coterie.methods.elrea.methods import METHODS
from coterie.methods.registry import load_grid
from coterie.mixture import Mixture
from coterie.mixture.folder import derived_folder, read_mixture_record


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_mixture_is_the_run_itself_with_all_that_was_trained_beside_it(grid_folder, tmp_path):
    loaded = Mixture.from_pretrained(grid_folder, device="cpu")
    loaded.save_pretrained(tmp_path / "new" / "copy")  # folders are made
    held, wanted = files(tmp_path / "new" / "copy"), files(grid_folder)
    assert held == {name: data for name, data in wanted.items() if not name.startswith((".", "working"))}
    assert {name.split("/")[0] for name in held} >= {"experts", "features", "methods", "checkpoints", "run.yaml"}
    again = Mixture.from_pretrained(tmp_path / "new" / "copy", device="cpu")
    prompts = ["add 3 4", "SPELL ABCD NOW"]
    for name in ("elrea", "mole", "loss-routing"):
        one, other = (load_grid(mixture, name).cell(name) for mixture in (loaded, again))
        assert one.generate(prompts, max_new_tokens=4) == other.generate(prompts, max_new_tokens=4), name
    assert set(load_grid(again, list(METHODS)).extras) == set(load_grid(loaded, list(METHODS)).extras)
    assert derived_folder(tmp_path / "new" / "copy") == derived_folder(
        grid_folder
    )  # what was trained in the cache stays


def test_nothing_is_replaced_unasked_and_nothing_of_others_at_all(mixture, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    mixture.save_pretrained(target)
    before = files(target)
    with pytest.raises(CoterieError, match="is not empty; choose another folder, or give overwrite=True"):
        mixture.save_pretrained(target)
    (target / "experts" / "base" / "adapter_model.safetensors").write_bytes(b"old")
    mixture.save_pretrained(target, overwrite=True)
    assert files(target) == before and sorted(os.listdir(tmp_path)) == ["copy"]
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CoterieError, match=r"copy holds notes.txt, so it is not replaced"):
        mixture.save_pretrained(target, overwrite=True)
    for name in ("README.md", "run.yaml"):
        place = tmp_path / f"other {name}"
        place.mkdir()
        (place / name).write_text("mine")
        with pytest.raises(CoterieError, match=r"holds no mixture.json, so it is not replaced"):
            mixture.save_pretrained(place, overwrite=True)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").write_text("mine")
    for name, told in (("link", "is a link"), ("file", "is no folder"), ("copy/experts/base/../../..", "has no name")):
        with pytest.raises(CoterieError, match=told):
            mixture.save_pretrained(tmp_path / name, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"


def test_a_mixture_is_not_saved_over_itself(mixture, run_folder):
    with pytest.raises(CoterieError, match="is or holds .*, which this call reads"):
        mixture.save_pretrained(run_folder, overwrite=True)
    with pytest.raises(CoterieError, match="is or holds .*, which this call reads"):
        mixture.save_pretrained(run_folder.parent, overwrite=True)


def test_a_copy_that_was_not_finished_leaves_nothing(mixture, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mixture, "write_description", full)
    with pytest.raises((CoterieError, OSError), match="space"):
        mixture.save_pretrained(tmp_path / "copy")
    assert os.listdir(tmp_path) == []


def test_a_copy_keeps_how_the_clusters_were_made(mixture, run_folder, tmp_path):
    mixture.save_pretrained(tmp_path / "copy")
    kept = read_mixture_record(tmp_path / "copy").clustering
    assert kept == read_mixture_record(run_folder).clustering and kept["method"] == "birch"
