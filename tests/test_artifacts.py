"""Files are whole or absent, runs are finished or resumable, and trouble is told in one line."""

import errno
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from coterie import artifacts
from coterie.artifacts import (
    RunFolder,
    environment_record,
    fill_matrix,
    hash_json,
    hash_text,
    new_matrix,
    read_json,
    read_jsonl,
    read_run_record,
    read_tensors,
    run_folder,
    sha256_of,
    tensors,
    whole_file,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)
from coterie.artifacts.tensors import Claim, tensor_claims
from coterie.errors import CoterieError
from coterie.settings.reading import Settings

few = settings(deadline=None, max_examples=30)
INPUTS = {"data": "abc"}
plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


class Training(Settings):
    learning_rate: float = 5e-05


class FitX(Settings):
    command = "fit x"
    model: str = "tiny"
    data: list[str] = []
    seed: int = 0
    training: Training = Training()
    overwrite: bool = False


class FitY(FitX):
    command = "fit y"


class Anything(Settings):
    command = "fit anything"
    anything: Any


OVERWRITE = FitX(overwrite=True)


def everything(folder: Path) -> list[str]:
    """All files and folders below, as relative paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def run_once(output: Path, body=lambda run: None, **changes):
    options = {"settings": FitX(), "inputs": INPUTS, **changes}
    with run_folder(output, **options) as run:
        body(run)


def fails(*_: object) -> None:
    raise CoterieError("something the user can fix")


def is_stopped(*_: object) -> None:
    raise KeyboardInterrupt


def disk_is_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# -------------------------------------------------------------------------------------------------------------- files


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert everything(tmp_path) == ["deep", "deep/file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, CoterieError])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert everything(tmp_path) == ["file.txt"]


def test_values_that_cannot_be_written_leave_nothing(tmp_path):
    for write in (write_json, lambda path, value: write_jsonl(path, [value])):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(tmp_path / "x", {"loss": float("nan")})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x", {"path": tmp_path})
    assert everything(tmp_path) == []


@few
@given(value=st.dictionaries(st.text(), plain_values, max_size=4))
def test_json_comes_back_as_it_was(tmp_path_factory, value):
    value = json.loads(json.dumps(value))
    folder = tmp_path_factory.mktemp("json")
    write_json(folder / "a.json", value)
    write_jsonl(folder / "a.jsonl", [value, value])
    assert read_json(folder / "a.json") == value
    assert read_jsonl(folder / "a.jsonl") == [value, value]


def test_hashes_stay_those_of_files_that_are_on_disk_already():
    """SHA-256 of the JSON text with sorted keys, or of the lines joined."""
    value = {"b": [1, None], "a": "é"}
    assert hash_json(value) == hash_text('{"a": "é", "b": [1, null]}')
    assert hash_json(value, ensure_ascii=True) == hash_text('{"a": "\\u00e9", "b": [1, null]}')
    assert hash_text("a", "b") == hashlib.sha256(b"a\nb").hexdigest()


def test_separators_of_lines_inside_a_text_do_not_end_its_line(tmp_path):
    rows = [{"text": "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\r\neight"}, {"text": "x"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert "\u2028" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_no_rows_are_an_empty_file(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", iter([]))
    assert (tmp_path / "rows.jsonl").read_bytes() == b""
    assert read_jsonl(tmp_path / "rows.jsonl") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; check the folder's name"),
        (b"{", "is not readable JSON .*; get or make the file again"),
        (b"\xff\xfe", "is not readable: it is no UTF-8 text"),
        (b"[1]", "must hold a JSON object, but holds a list"),
    ],
    ids=["missing", "broken", "not text", "a list"],
)
def test_json_that_cannot_be_read_is_told_by_name(content, message, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CoterieError, match=f"a.json {message}"):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.jsonl does not exist"),
        (b'{"a": 1}\n{"a"', "a.jsonl, line 2 is not readable JSON .*; get or make the file again"),
        (b"\xff\n", "a.jsonl, line 1 is not readable: it is no UTF-8 text; get or make the file again"),
        (b"{}\n3\n", "a.jsonl, line 2 must hold a JSON object, but holds a int"),
    ],
    ids=["missing", "broken", "not text", "a number"],
)
def test_json_lines_that_cannot_be_read_are_told_by_name(content, message, tmp_path):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CoterieError, match=message):
        read_jsonl(path)


def test_tensors_come_back_as_they_were(tmp_path):
    rows = torch.arange(6.0).view(2, 3)
    tensors = {"first": rows[0], "second": rows[1], "turned": rows.T, "half": rows.half()}
    tensors["trained"] = rows.clone().requires_grad_()
    write_tensors(tmp_path / "t.safetensors", tensors, {"note": "x"})
    found = read_tensors(tmp_path / "t.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert found["half"].dtype == torch.float16
    assert everything(tmp_path) == ["t.safetensors"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "is truncated or not a safetensors file .*; get the",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:9]), "is truncated or not a safetensors file"),
        (lambda path: path.write_bytes(b""), "is truncated or not a safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64), "is truncated or not a safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "is truncated or not a safetensors file"),
    ],
    ids=["missing", "a byte short", "header only", "empty", "a huge header", "too long"],
)
def test_tensors_that_cannot_be_read_are_told_by_name(spoil, message, tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    spoil(path)
    with pytest.raises(CoterieError, match=f"t.safetensors {message}"):
        read_tensors(path)


def test_a_tensor_file_over_the_limit_is_refused_and_one_at_the_limit_is_read(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.ones(300)})
    size = path.stat().st_size
    with pytest.raises(CoterieError, match=f"has {size:,} bytes, more than the {size - 1:,} that are accepted"):
        read_tensors(path, max_bytes=size - 1)
    assert read_tensors(path, max_bytes=size)["a"].sum() == 300


def test_the_hash_is_of_the_contents_in_order(tmp_path):
    """SHA-256 of "abc" is the standard's first example."""
    for name in "abc":
        (tmp_path / name).write_text(name)
    files = [tmp_path / name for name in "abc"]
    assert sha256_of(*files) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(*reversed(files)) != sha256_of(*files)


# --------------------------------------------------------------------------------------------------------- full disks


def write_one_tensor(path: Path, name: str) -> None:
    write_tensors(path, {name: torch.ones(1)})


@pytest.mark.parametrize("write", [write_text, write_one_tensor], ids=["text", "tensors"])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(write, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", disk_is_full)
    with pytest.raises(CoterieError, match="no space left on the disk while writing .*/file; free some and start"):
        write(tmp_path / "file", "text")
    assert everything(tmp_path) == []


def test_a_full_disk_that_a_library_reports_in_its_own_error_is_told_too(tmp_path):
    with pytest.raises(CoterieError, match="no space left on the disk while writing"), whole_file(tmp_path / "x"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM], ids=["access", "read-only", "permission"])
def test_a_forbidden_folder_is_told_in_one_line(number, tmp_path, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(CoterieError, match=f"file cannot be written: .*{os.strerror(number)}; choose another folder"):
        write_text(tmp_path / "sub" / "file", "x")


@pytest.mark.parametrize("name", ["file/below", "file/far/below", "folder"])
def test_a_file_where_a_folder_is_needed_and_the_reverse_are_told(name, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CoterieError, match=f"{name} cannot be written: .*; choose another folder"):
        write_text(tmp_path / name, "x")
    assert everything(tmp_path) == ["file", "folder"]


def test_other_errors_pass_through_as_they_are(tmp_path):
    with pytest.raises(OSError, match="Input/output error"), whole_file(tmp_path / "x"):
        raise OSError(errno.EIO, "Input/output error")


# --------------------------------------------------------------------------------------------------------------- runs


def test_a_run_works_in_a_partial_folder_and_gets_its_name_at_the_end(tmp_path):
    output = tmp_path / "deep" / "run"

    def body(run: RunFolder) -> None:
        assert not output.exists() and run.path == tmp_path / "deep" / "run.partial"
        run.stage("part", lambda folder: write_text(folder / "file", "x"), {})
        (run.path / "working" / "rest").mkdir(parents=True)

    run_once(output, body)
    assert everything(tmp_path / "deep") == ["run", "run/part", "run/part/file", "run/run.yaml", "run/stages.jsonl"]


def test_the_record_of_a_run_tells_everything_that_it_needs_to_be_repeated(tmp_path):
    run_once(tmp_path / "run")
    record = read_run_record(tmp_path / "run" / "run.yaml")
    assert (record["format"], record["command"]) == (1, "fit x")
    assert (record["settings"], record["inputs"]) == (FitX().model_dump(), INPUTS)
    assert {"started", "versions", "python", "machine", "git"} < set(record)
    assert record["versions"]["torch"] == torch.__version__


def test_the_environment_is_known_without_git_or_a_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert environment_record()["git"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment_record()["git"] is None


@pytest.mark.parametrize("name", ["part", "deep/part"])
def test_a_stage_is_done_once(name, tmp_path):
    run = RunFolder(tmp_path / "run.partial")
    calls = []
    for _ in range(2):
        done = run.stage(name, lambda folder: (calls.append(folder), write_text(folder / "file", "x"))[0], {})
        assert done == run.path / name and (done / "file").read_text() == "x"
    assert len(calls) == 1


def test_a_stage_appears_at_once_as_its_working_folder_with_another_name(tmp_path):
    """A copy could be interrupted half way, and would be taken as done."""
    numbers = []
    run = RunFolder(tmp_path / "run.partial")
    done = run.stage("part", lambda folder: numbers.append(folder.stat().st_ino), {})
    assert numbers == [done.stat().st_ino]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, CoterieError])
def test_an_interrupted_stage_goes_on_with_what_it_left(error, tmp_path):
    run = RunFolder(tmp_path / "run.partial")

    def interrupted(folder: Path) -> None:
        write_text(folder / "first", "1")
        raise error

    def resumed(folder: Path) -> None:
        assert everything(folder) == ["first"]
        write_text(folder / "second", "2")

    with pytest.raises(error):
        run.stage("part", interrupted, {})
    assert not (run.path / "part").exists()
    assert everything(run.stage("part", resumed, {})) == ["first", "second"]


def test_a_full_disk_within_a_stage_is_told(tmp_path):
    run = RunFolder(tmp_path / "run.partial")
    with pytest.raises(CoterieError, match="no space left on the disk while writing .*working/part"):
        run.stage("part", disk_is_full, {})


def test_errors_of_the_user_keep_their_words_on_the_way_out_of_a_stage(tmp_path):
    with pytest.raises(CoterieError, match="^something the user can fix$"):
        RunFolder(tmp_path / "run.partial").stage("part", fails, {})


@pytest.mark.parametrize("stop", [fails, is_stopped], ids=["error", "interrupt"])
def test_a_run_that_stops_before_any_work_leaves_nothing(stop, tmp_path):
    with pytest.raises((CoterieError, KeyboardInterrupt)):
        run_once(tmp_path / "run", stop)
    with pytest.raises((CoterieError, KeyboardInterrupt)):
        run_once(tmp_path / "run", lambda run: run.stage("part", stop, {}))
    assert everything(tmp_path) == []


@pytest.mark.parametrize("stop", [fails, is_stopped, lambda _: [][1]], ids=["error", "interrupt", "bug"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside a stage", "after a stage"])
def test_a_run_that_stops_with_work_done_goes_on_from_there(stop, inside, tmp_path):
    made, stops = [], [stop]

    def first(folder: Path) -> None:
        made.append("first")
        write_text(folder / "file", "1")
        if inside and stops:
            stops.pop()(folder)

    def body(run: RunFolder) -> None:
        run.stage("one", first, {})
        if stops:
            stops.pop()(run)
        run.stage("two", lambda folder: write_text(folder / "file", "2"), {})

    with pytest.raises((CoterieError, KeyboardInterrupt, IndexError)):
        run_once(tmp_path / "run", body)
    assert everything(tmp_path)[0] == "run.partial"
    run_once(tmp_path / "run", body)
    assert everything(tmp_path / "run") == ["one", "one/file", "run.yaml", "stages.jsonl", "two", "two/file"]
    assert os.listdir(tmp_path) == ["run"]
    assert len(made) == (2 if inside else 1)


def unfinished(output: Path) -> None:
    def body(run: RunFolder) -> None:
        run.stage("one", lambda folder: write_text(folder / "file", "1"), {})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_once(output, body)


BEFORE = {  # of a run that was begun before stages were recorded
    "setting": ({"settings": FitX(seed=1)}, "other settings"),
    "nested setting": ({"settings": FitX(training=Training(learning_rate=1e-4))}, "other settings"),
    "input": ({"inputs": {"data": "abd"}}, "other inputs"),
    "both": ({"inputs": {}, "settings": FitX(seed=1)}, "other settings and inputs"),
}


@pytest.mark.parametrize(("changes", "what"), BEFORE.values(), ids=BEFORE)
def test_an_unfinished_run_of_before_goes_on_with_its_own_settings_alone(changes, what, tmp_path):
    unfinished(tmp_path / "run")
    (tmp_path / "run.partial" / "stages.jsonl").unlink()
    for _ in range(2):
        with pytest.raises(CoterieError, match=f"run.partial holds an unfinished run with {what}; finish that one"):
            run_once(tmp_path / "run", **changes)
    assert (tmp_path / "run.partial" / "one" / "file").exists()
    run_once(tmp_path / "run", lambda run: run.stage("one", fails, {"whatever": 1}))
    assert everything(tmp_path / "run") == ["one", "one/file", "run.yaml", "stages.jsonl"]


def test_the_unfinished_run_of_another_command_is_not_continued_or_touched(tmp_path):
    unfinished(tmp_path / "run")
    before = everything(tmp_path)
    with pytest.raises(CoterieError, match="run.partial holds an unfinished run with other command"):
        run_once(tmp_path / "run", settings=FitY())
    assert everything(tmp_path) == before


def test_an_unfinished_run_may_be_continued_with_leave_to_overwrite(tmp_path):
    unfinished(tmp_path / "run")
    run_once(tmp_path / "run", lambda run: run.stage("one", fails, {}), settings=OVERWRITE)
    assert "run/one/file" in everything(tmp_path)


@few
@given(value=st.dictionaries(st.text(max_size=5), plain_values, max_size=3))
def test_settings_are_the_same_settings_after_they_were_written(tmp_path_factory, value):
    output = tmp_path_factory.mktemp("run") / "run"
    unfinished_settings = Anything(anything=json.loads(json.dumps(value)))
    with pytest.raises(IndexError):
        run_once(output, lambda _: [][1], settings=unfinished_settings)
    run_once(output, settings=unfinished_settings)
    assert read_run_record(output / "run.yaml")["settings"] == unfinished_settings.model_dump()


def test_a_partial_folder_without_a_record_is_a_new_run(tmp_path):
    (tmp_path / "run.partial").mkdir()
    run_once(tmp_path / "run")
    assert everything(tmp_path) == ["run", "run/run.yaml"]


def test_a_finished_run_replaces_the_old_one_only_at_its_end(tmp_path):
    run_once(tmp_path / "run", lambda run: run.stage("old", lambda folder: write_text(folder / "file", "1"), {}))

    def body(run: RunFolder) -> None:
        assert (tmp_path / "run" / "old" / "file").exists()
        run.stage("new", lambda folder: write_text(folder / "file", "2"), {})

    run_once(tmp_path / "run", body, settings=OVERWRITE)
    assert everything(tmp_path) == ["run", "run/new", "run/new/file", "run/run.yaml", "run/stages.jsonl"]


def test_what_came_into_the_place_of_a_run_meanwhile_is_not_deleted(tmp_path):
    def body(run: RunFolder) -> None:
        run.stage("part", lambda folder: write_text(folder / "file", "1"), {})
        write_text(tmp_path / "run" / "thesis.tex", "x")

    with pytest.raises(CoterieError, match="run is not a run folder, so it is not replaced"):
        run_once(tmp_path / "run", body, settings=OVERWRITE)
    assert {"run/thesis.tex", "run.partial/part/file"} < set(everything(tmp_path))


def test_a_run_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CoterieError, match="cannot be written: .*; choose another folder"):
        run_once(tmp_path / "file" / "run")


# ------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give the run.yaml of a run folder"),
        (b"a: [", ", line 1 is not readable YAML"),
        (b"\xff\xfe\x00", "is not readable"),
        (b"!!python/object/apply:os.getcwd []", ", line 1 is not readable YAML .tags are not read.; give the run.yaml"),
        (b"- 1", "holds no command and settings; give the run.yaml of a run folder"),
        (b"command: fit x", "holds no command and settings"),
        (b"settings: {}", "holds no command and settings"),
        (b"command: fit x\nsettings: 3", "holds no command and settings"),
    ],
    ids=["missing", "broken", "not text", "code", "a list", "no settings", "no command", "settings of another kind"],
)
def test_a_record_that_cannot_be_read_is_told_by_name(content, message, tmp_path):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CoterieError, match=f"run.yaml ?{message}"):
        read_run_record(path)


def test_a_record_repeats_what_stands_there_twice_since_aliases_are_not_read(tmp_path):
    same = ["a.jsonl"]
    run_once(tmp_path / "run", settings=Anything(anything={"data": same, "pool": same}))
    assert read_run_record(tmp_path / "run" / "run.yaml")["settings"]["anything"] == {"data": same, "pool": same}


def test_a_record_is_plain_yaml_in_the_order_of_reading(tmp_path):
    run_once(tmp_path / "run")
    text = (tmp_path / "run" / "run.yaml").read_text()
    assert list(yaml.safe_load(text))[:4] == ["format", "command", "settings", "inputs"]
    assert text.startswith("format: 1\ncommand: fit x\nsettings:\n  model: tiny\n")
    assert artifacts.FORMAT == 1


def test_a_matrix_filled_part_by_part_is_the_file_of_the_whole(tmp_path):
    rows = torch.arange(35.0).view(7, 5)
    path = tmp_path / "parts.safetensors"
    new_matrix(path, "rows", (7, 5))
    assert not read_tensors(path)["rows"].any()
    fill_matrix(path, ((part, rows[part]) for part in ([4, 0, 6], [1])))
    fill_matrix(path, [([2, 5, 3], rows[[2, 5, 3]])])
    write_tensors(tmp_path / "whole.safetensors", {"rows": rows})
    assert torch.equal(read_tensors(path)["rows"], rows)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_file_that_is_larger_than_the_memory_is_read_where_it_lies(tmp_path):
    rows = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4096
    new_matrix(tmp_path / "large", "features", (rows, 1024))  # zeros, which take no room on the disk
    fill_matrix(tmp_path / "large", [([rows - 1], torch.full((1, 1024), 3.0))])
    claims = tensor_claims(tmp_path / "large", max_bytes=sys.maxsize)
    assert claims == {"features": Claim("F32", (rows, 1024))}
    found = tensors._floats(tmp_path / "large", claims)["features"]
    assert found[-1].tolist() == [3.0] * 1024 and found[rows // 2].count_nonzero() == 0


def test_floats_are_read_from_whatever_type_and_place_they_have_and_changes_do_not_reach_the_file(tmp_path):
    held = {
        "a": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
        "b": torch.tensor([[3.0], [4.0]]),
        "c": torch.tensor([5.0], dtype=torch.float64),
        "d": torch.zeros(0),
    }
    save_file(held, tmp_path / "aligned")
    payload = held["b"].numpy().tobytes()
    claim = {"b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}
    header = json.dumps(claim).encode()
    header += b" " * (3 - len(header) % 4)  # numbers begin at no multiple of four
    (tmp_path / "odd").write_bytes(len(header).to_bytes(8, "little") + header + payload)
    for file, names in (("aligned", "abcd"), ("odd", "b")):
        before = (tmp_path / file).read_bytes()
        found = tensors._floats(tmp_path / file, tensor_claims(tmp_path / file))
        assert list(found) == list(names)
        for name in names:
            assert found[name].dtype == torch.float32 and torch.equal(found[name], held[name].float())
            found[name].add_(1)
        assert (tmp_path / file).read_bytes() == before
