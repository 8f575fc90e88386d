"""A run that was killed and started again ends with the same files as an undisturbed one."""

import errno
import os
import re
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import tiny
from conftest import write_rows
from coterie import methods
from coterie.artifacts import read_json, read_tensors, runs
from coterie.errors import CoterieError
from coterie.experts import trainer
from coterie.features import gradient
from coterie.methods import common
from coterie.methods.elrea import fit as fitting
from crashing import started

SMALL = {"clusters": 2, "cluster_rounds": 1, "d_proj": 64, "learning_rate": 1e-2, "batch_size": 4, "expert_epochs": 1}


class KilledError(BaseException):
    """Stands for a process that ends here: nothing in the library catches it."""


@pytest.fixture(scope="module", autouse=True)
def several_shards():
    """Write features often enough that a small run can be killed among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient, "SHARD_ROWS", 4)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", tiny.make_rows(12))


def fit(model_folder: Path, data: Path, output: Path, **settings: object) -> Path:
    methods.elrea(str(model_folder), str(data), output=output, device="cpu", **{**SMALL, **settings})
    return output


@pytest.fixture(scope="module")
def undisturbed(model_folder, data, tmp_path_factory) -> dict[str, bytes]:
    return files_of(fit(model_folder, data, tmp_path_factory.mktemp("undisturbed") / "run"))


def files_of(folder: Path) -> dict[str, bytes]:
    """All files by name; run.yaml differs in its time of start and output, stages.jsonl in seconds."""
    found = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files = {name: b"" if name == "run.yaml" else path.read_bytes() for name, path in found.items()}
    return {**files, "stages.jsonl": re.sub(rb', "seconds": [0-9.]+', b"", files["stages.jsonl"])}


def after(calls: int, function):
    """Let a function through some times, then kill."""
    count = iter(range(calls))

    def counted(*args, **kwargs):
        if next(count, None) is None:
            raise KilledError
        return function(*args, **kwargs)

    return counted


KILLED_AT = {
    "before the first epoch is kept": (trainer, "save_adam", 0),
    "between two epochs": (trainer, "save_adam", 1),
    "while features are computed": (gradient, "write_tensors", 1),
    "before clustering": (fitting, "cluster", 0),
    "before the second expert": (common, "train_adapter", 1),
    "before the records": (fitting, "write_jsonl", 0),
    "before the last rename": (runs, "replace_folder", 0),
}


def fit_killed(moment: str, monkeypatch, model_folder: Path, data: Path, output: Path) -> None:
    place, name, calls = KILLED_AT[moment]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, after(calls, getattr(place, name)))
        with pytest.raises(KilledError):
            fit(model_folder, data, output)


@pytest.mark.parametrize("moment", KILLED_AT)
def test_a_run_killed_and_started_again_ends_with_the_same_files(
    moment, model_folder, data, undisturbed, tmp_path, monkeypatch
):
    fit_killed(moment, monkeypatch, model_folder, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert files_of(fit(model_folder, data, tmp_path / "run")) == undisturbed
    assert not (tmp_path / "run.partial").exists()


@pytest.mark.parametrize("content", ["", '{"epoch": 1.0, "global'], ids=["empty", "half"])
def test_a_checkpoint_whose_last_file_is_not_whole_is_not_gone_on_from(
    content, model_folder, data, undisturbed, tmp_path, monkeypatch
):
    fit_killed("between two epochs", monkeypatch, model_folder, data, tmp_path / "run")
    (state,) = (tmp_path / "run.partial").rglob("trainer_state.json")
    state.write_text(content)
    assert files_of(fit(model_folder, data, tmp_path / "run")) == undisturbed


@pytest.mark.parametrize("moment", ["between two epochs", "while features are computed"])
def test_a_clock_that_jumps_between_two_tries_changes_nothing(
    moment, model_folder, data, undisturbed, tmp_path, monkeypatch
):
    """Files of the first try come from the next century and from the first day of time, in turn."""
    fit_killed(moment, monkeypatch, model_folder, data, tmp_path / "run")
    for number, path in enumerate(sorted((tmp_path / "run.partial").rglob("*"))):
        os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert files_of(fit(model_folder, data, tmp_path / "run")) == undisturbed


@pytest.mark.parametrize("call", [0, 1], ids=["before its first record", "before its second record"])
def test_a_run_killed_before_it_has_a_record_begins_anew(call, model_folder, data, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_text", after(call, runs.write_text))
        with pytest.raises(KilledError):
            fit(model_folder, data, tmp_path / "run")
    assert files_of(fit(model_folder, data, tmp_path / "run")) == undisturbed


@pytest.mark.parametrize("call", [0, 1], ids=["its first record", "its second record"])
def test_a_disk_that_is_full_before_a_run_has_a_record_leaves_nothing(call, model_folder, data, tmp_path, monkeypatch):
    count = iter(range(call))

    def write(*given: object) -> None:
        if next(count, None) is None:
            raise CoterieError("no space left on the disk")
        written(*given)

    written = runs.write_text
    monkeypatch.setattr(runs, "write_text", write)
    with pytest.raises(CoterieError, match="no space left"):
        fit(model_folder, data, tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_a_place_that_is_read_only_is_told_in_one_line_before_anything_is_trained(
    model_folder, data, tmp_path, monkeypatch
):
    def refused(path: object, flags: int, *more: object, **named: object) -> int:
        if flags & os.O_CREAT and str(tmp_path) in str(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *more, **named)

    opened = os.open
    monkeypatch.setattr(os, "open", refused)
    for place in (fitting, common):
        monkeypatch.setattr(place, "train_adapter", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(CoterieError, match="cannot be written: .*Read-only.*; choose another folder"):
        fit(model_folder, data, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_whose_process_was_killed_ends_with_the_same_files(model_folder, data, undisturbed, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    words = ["fit", "elrea", f"--model={model_folder}", f"--data={data}", f"--output={tmp_path / 'run'}"]
    process = started([*words, "--device=cpu", *flags], tmp_path)
    kept = tmp_path / "run.partial" / "working" / "checkpoints" / "epoch-0"
    deadline = time.monotonic() + 120
    while not kept.exists() and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert kept.exists() and not (tmp_path / "run").exists()
    assert files_of(fit(model_folder, data, tmp_path / "run")) == undisturbed


def test_every_expert_is_a_folder_that_peft_loads_alone(mixture, run_folder, model_folder):
    from transformers import AutoModelForCausalLM

    for name in mixture.bank.names:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model_folder), run_folder / "experts" / name
        )
        assert model.peft_config["default"].r == 8 and model.peft_config["default"].lora_alpha == 32


def test_experts_continue_from_the_base_adapter_and_differ_from_it(run_folder):
    base = read_tensors(run_folder / "experts" / "base" / "adapter_model.safetensors")
    last = read_tensors(run_folder / "checkpoints" / "epoch-1" / "adapter_model.safetensors")
    assert all(torch.equal(base[key], last[key]) for key in base)
    for expert in ("cluster-0", "cluster-1", "cluster-2"):
        tensors = read_tensors(run_folder / "experts" / expert / "adapter_model.safetensors")
        change = sum(float((tensors[key] - base[key]).norm()) ** 2 for key in base) ** 0.5
        size = sum(float(base[key].norm()) ** 2 for key in base) ** 0.5
        assert 0 < change < size, "an expert started afresh would be about sqrt(2) sizes away"


def test_the_saved_learning_rate_is_the_mean_over_its_epoch(run_folder):
    """36 rows in batches of 8 are 5 steps an epoch; 1e-2 falls linearly to 0 over 10 steps."""
    rates = [1e-2 * (1 - step / 10) for step in range(10)]
    for epoch in (0, 1):
        record = read_json(run_folder / "checkpoints" / f"epoch-{epoch}" / "adam.json")
        assert record["learning_rate"] == pytest.approx(sum(rates[5 * epoch : 5 * epoch + 5]) / 5, rel=1e-6)
        assert record["steps"] == 5 * (epoch + 1)


def test_training_leaves_the_base_model_as_it_was(backbone, model_folder, data):
    from safetensors.torch import load_file

    saved = load_file(model_folder / "model.safetensors")
    held = dict(backbone.model.named_parameters())
    assert all(torch.equal(saved[name], held[name]) for name in saved if name in held)


def test_a_loss_that_is_not_a_number_stops_the_run_and_leaves_nothing(model_folder, data, tmp_path):
    with pytest.raises(CoterieError, match=r"the training loss became (nan|inf) at step \d+; lower --learning-rate"):
        fit(model_folder, data, tmp_path / "run", learning_rate=1e30)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_in_one_line(model_folder, data, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CoterieError, match="no space left on the disk while writing"):
        fit(model_folder, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
