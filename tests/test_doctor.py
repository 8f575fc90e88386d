"""`coterie doctor` tells what a machine has, what to install for what, and fails where Coterie does not work."""

import importlib.metadata
import json
import sys

import httpx2
import pytest
import torch
from huggingface_hub import constants

import coterie
from coterie.cli import doctor


@pytest.fixture
def diagnose(run, monkeypatch, tmp_path):
    """Run the doctor without the hub and with a cache of its own; return its exit code and findings by name."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))

    def command():
        code, out, _ = run("doctor", "--json")
        return code, {one["what"]: one for one in map(json.loads, out.splitlines())}

    return command


def lacking(monkeypatch, *packages):
    real = importlib.metadata.version

    def version(package):
        if package in packages:
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_what_is_here_is_told_and_nothing_is_broken(diagnose, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model").write_bytes(bytes(2**20))
    code, found = diagnose()
    assert code == 0 and not any(one["broken"] for one in found.values())
    assert found["Python"]["found"].startswith(sys.version.split()[0])
    assert found["Coterie"]["found"] == coterie.__version__ and found["torch"]["found"] == torch.__version__
    assert {"transformers", "device cpu", "threads", "memory", "model hub", "extra data"} <= set(found)
    assert found["cache"]["found"] == f"{tmp_path / 'cache'}, 0.0 GiB"
    assert "GiB free" in found["memory"]["found"]


def test_a_package_that_is_lacking_or_too_old_breaks_and_is_named_with_what_to_type(diagnose, monkeypatch):
    lacking(monkeypatch, "peft")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["peft>=0.20", "numpy>=999", "x; extra == 'data'"])
    code, found = diagnose()
    assert code == 2 and [what for what, one in found.items() if one["broken"]] == ["peft", "numpy"]
    assert found["peft"]["advice"] == "pip install 'peft>=0.20'" and found["peft"]["found"] == "not installed"
    assert found["numpy"]["advice"] == "pip install 'numpy>=999'"


def test_an_extra_that_is_lacking_breaks_nothing_and_tells_what_it_is_for(diagnose, monkeypatch):
    lacking(monkeypatch, "lm-eval")
    code, found = diagnose()
    assert code == 0
    assert found["extra eval"]["advice"] == "pip install 'coterie[eval]' for HarnessModel, for lm-evaluation-harness"


def test_every_extra_of_the_package_is_looked_at():
    assert set(doctor.EXTRAS) == set(importlib.metadata.metadata("coterie").get_all("Provides-Extra"))


def test_an_old_python_and_a_torch_that_fails_break(diagnose, monkeypatch):
    monkeypatch.setattr(doctor, "OLDEST", (99, 0))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda ours, theirs: 1 / 0)
    code, found = diagnose()
    assert code == 2 and found["Python"]["advice"] == "install Python 99.0 or newer"
    assert found["device"]["broken"] and found["device"]["found"] == "division by zero"


def test_a_cache_that_cannot_be_made_breaks(diagnose, tmp_path):
    (tmp_path / "cache").write_text("a file")
    code, found = diagnose()
    assert code == 2 and found["cache"]["broken"] and "COTERIE_CACHE" in found["cache"]["advice"]


def test_the_hub_is_asked_for_three_seconds_at_most_and_not_at_all_offline(diagnose, monkeypatch):
    asked = []
    monkeypatch.setattr(httpx2, "head", lambda url, timeout: asked.append((url, timeout)))
    assert "HF_HUB_OFFLINE" in diagnose()[1]["model hub"]["found"] and asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert diagnose()[1]["model hub"]["found"] == f"{constants.ENDPOINT} answers"
    assert asked == [(constants.ENDPOINT, 3.0)]

    def unreachable(url, timeout):
        raise httpx2.ConnectError("no way there")

    monkeypatch.setattr(httpx2, "head", unreachable)
    code, found = diagnose()
    assert (
        code == 0 and found["model hub"]["found"].endswith("no way there") and "no hub" in found["model hub"]["advice"]
    )


def test_people_read_lines_with_the_advice_under_them_and_the_trouble_at_the_end(run, diagnose, monkeypatch):
    lacking(monkeypatch, "lm-eval", "peft")
    code, out, err = run("doctor")
    lines = out.splitlines()
    assert lines[0].startswith("  Python        3.")
    assert lines[lines.index("! peft          not installed") + 1].strip().startswith("-> pip install 'peft")
    assert code == 2 and "Coterie does not work here: see peft above" in err
