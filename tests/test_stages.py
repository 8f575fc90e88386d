"""Stages are made again where something that they are made from has changed, and only there."""

import json
import re
import shutil
from pathlib import Path

import pytest

import tiny
from conftest import write_rows
from coterie import methods
from coterie.artifacts import RunFolder, read_stages, stages, write_text
from coterie.artifacts.stages import difference
from coterie.methods import common
from coterie.methods.elrea import fit as elrea_fit
from coterie.mixture import Mixture

SMALL = {"clusters": 2, "cluster_rounds": 1, "d_proj": 64, "learning_rate": 1e-2, "batch_size": 4, "device": "cpu"}
BASE, FEATURES, FIRST, SECOND = "checkpoints", "features", "experts/cluster-0", "experts/cluster-1"
EXPERTS = [FIRST, SECOND]
MADE_AGAIN = {
    "expert_learning_rate": (1e-3, EXPERTS),
    "form": ("sgd", [FEATURES]),
    "cluster_rounds": (2, []),
    "rank": (4, [BASE, FEATURES, *EXPERTS]),
}
"""By setting: another value, and which stages are to be made again for it at least."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", tiny.make_rows(12))


def fit(model_folder: Path, data: Path, output: Path, **settings: object) -> Path:
    methods.elrea(str(model_folder), str(data), output=output, **{**SMALL, **settings})
    return output


@pytest.fixture(scope="module")
def fitted(model_folder, data, tmp_path_factory) -> Path:
    return fit(model_folder, data, tmp_path_factory.mktemp("fitted") / "run")


def files_of(folder: Path) -> dict[str, bytes]:
    """All files by name, but for run.yaml, which tells of its start, and the seconds of stages."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found["stages.jsonl"] = re.sub(rb', "seconds": [0-9.]+', b"", found["stages.jsonl"])
    return {name: content for name, content in found.items() if name != "run.yaml"}


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The stages that are really made, and not taken over."""
    names: list[str] = []
    for place, name in ((common, "train_adapter"), (elrea_fit, "train_adapter"), (elrea_fit, "write_features")):
        original = getattr(place, name)

        def counted(*given, original=original):
            folder = next(one for one in given if isinstance(one, Path) and "working" in one.parts)
            names.append("/".join(folder.parts[folder.parts.index("working") + 1 :]))
            return original(*given)

        monkeypatch.setattr(place, name, counted)
    return names


@pytest.mark.parametrize("setting", MADE_AGAIN)
def test_a_run_fitted_anew_with_another_setting_is_that_of_a_fresh_fit(
    setting, model_folder, data, fitted, made, tmp_path
):
    """Only what depends on it is made again; all files are those that a fit from nothing ends with."""
    value, again = MADE_AGAIN[setting]
    shutil.copytree(fitted, tmp_path / "run")
    fit(model_folder, data, tmp_path / "run", overwrite=True, **{setting: value})
    assert set(again) <= set(made) and (BASE in made) == (BASE in again) and (FEATURES in made) == (FEATURES in again)
    assert files_of(tmp_path / "run") == files_of(fit(model_folder, data, tmp_path / "fresh", **{setting: value}))


class KilledError(BaseException):
    """Stands for a process that ends here."""


def killed(*_: object) -> None:
    raise KilledError


def test_an_unfinished_run_goes_on_with_other_settings(model_folder, data, made, tmp_path, monkeypatch, caplog):
    """What is no longer wanted is gone in the end: the first try has three clusters."""
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(elrea_fit, "write_jsonl", killed)
        fit(model_folder, data, tmp_path / "run", clusters=3)
    made.clear()
    caplog.set_level("INFO")
    fit(model_folder, data, tmp_path / "run", d_proj=32)
    assert BASE not in made and FEATURES in made
    assert "goes on, where nothing depends on what is new: d_proj 64 -> 32" in caplog.text
    assert "clusters 3 -> 2" in caplog.text and "features is made again: d_proj 64 -> 32" in caplog.text
    assert files_of(tmp_path / "run") == files_of(fit(model_folder, data, tmp_path / "fresh", d_proj=32))


def test_nothing_is_made_again_of_a_run_that_is_fitted_anew_as_it_was(model_folder, data, fitted, made, tmp_path):
    shutil.copytree(fitted, tmp_path / "run")
    fit(model_folder, data, tmp_path / "run", overwrite=True)
    assert not made and files_of(tmp_path / "run") == files_of(fitted)


def test_other_rows_make_all_of_a_run_again(model_folder, data, fitted, made, tmp_path):
    shutil.copytree(fitted, tmp_path / "run")
    more = write_rows(tmp_path / "more.jsonl", tiny.make_rows(13))
    fit(model_folder, more, tmp_path / "run", overwrite=True)
    assert {BASE, FEATURES} <= set(made) and FIRST in made


def test_what_other_versions_have_made_is_not_taken_over(model_folder, data, fitted, made, tmp_path):
    shutil.copytree(fitted, tmp_path / "run")
    record = tmp_path / "run" / "run.yaml"
    record.write_text(re.sub(r"torch: \S+", "torch: 1.0.0", record.read_text()))
    fit(model_folder, data, tmp_path / "run", overwrite=True)
    assert set(made) >= {BASE, FEATURES, FIRST}


def as_before(partial: Path) -> None:
    """Lay an unfinished run out as it was before stages were recorded: trainings beside the experts' own files."""
    (partial / "stages.jsonl").unlink()
    (partial / "training").mkdir()
    shutil.copytree(partial / BASE, partial / "training" / "base")
    for name in (".", "epoch-0", "epoch-1"):
        (partial / BASE / name / "log.jsonl").unlink(missing_ok=True)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (partial / BASE / file).unlink()
    for name in EXPERTS:
        expert = partial / name
        if expert.exists():
            shutil.copytree(expert, partial / "training" / expert.name)
            (expert / "log.jsonl").unlink()


@pytest.mark.parametrize("moment", ["train_clusters", "write_jsonl"])
def test_an_unfinished_run_of_before_goes_on_as_it_was(moment, model_folder, data, fitted, made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(elrea_fit, moment, killed)
        fit(model_folder, data, tmp_path / "run")
    as_before(tmp_path / "run.partial")
    made.clear()
    fit(model_folder, data, tmp_path / "run")
    assert made == (EXPERTS if moment == "train_clusters" else [])
    assert files_of(tmp_path / "run") == files_of(fitted)


def test_other_rows_of_one_domain_train_its_expert_alone(model_folder, tmp_path, made):
    rows = tiny.make_rows(12)
    files = {name: write_rows(tmp_path / f"{name}.jsonl", rows[i::2]) for i, name in enumerate(("law", "maths"))}
    given = {name: str(file) for name, file in files.items()}
    how = {"encoder": "hidden", "learning_rate": 1e-2, "batch_size": 4, "device": "cpu"}
    methods.token_level(str(model_folder), given, output=tmp_path / "run", **how)
    made.clear()
    write_rows(files["maths"], rows[1::2][:-1])
    methods.token_level(str(model_folder), given, output=tmp_path / "run", overwrite=True, null_share=0.1, **how)
    assert made == ["experts/maths"]
    methods.token_level(str(model_folder), given, output=tmp_path / "fresh", null_share=0.1, **how)
    assert files_of(tmp_path / "run") == files_of(tmp_path / "fresh")
    methods.token_level(str(model_folder), given, output=tmp_path / "run", overwrite=True, **how)
    assert Mixture.from_pretrained(tmp_path / "run", device="cpu").bank.names == ("law", "maths")
    assert not (tmp_path / "run" / "experts" / "null").exists()


# ------------------------------------------------------------------------------------------------- the folder alone


def write(text: str):
    return lambda folder: write_text(folder / "file", text)


def test_a_stage_that_was_interrupted_does_not_go_on_with_what_other_settings_left(tmp_path):
    run = RunFolder(tmp_path / "run")

    def half(folder: Path) -> None:
        write_text(folder / "half", "1")
        raise KilledError

    with pytest.raises(KilledError):
        run.stage("part", half, {"rank": 1})
    assert sorted(path.name for path in run.stage("part", write("2"), {"rank": 2}).iterdir()) == ["file"]


def test_a_process_killed_while_a_stage_is_dropped_leaves_no_part_of_it_to_be_taken_for_the_whole(
    tmp_path, monkeypatch
):
    run = RunFolder(tmp_path / "run")
    run.stage("part", write("1"), {"rank": 1})
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(stages.shutil, "rmtree", killed)
        run.stage("part", write("2"), {"rank": 2})
    assert not (run.path / "part").exists()
    assert (run.stage("part", write("3"), {"rank": 1}) / "file").read_text() == "3"


def test_a_stage_depends_on_those_inputs_alone_that_it_names(tmp_path):
    first, other = {"law": "a", "maths": "b"}, {"law": "a", "maths": "c"}
    for inputs, text in ((first, "1"), (other, "2")):
        run = RunFolder(tmp_path / "run", inputs)
        run.stage("law", write(text), {}, inputs=["law"])
        run.stage("both", write(text), {})
    assert (run.path / "law" / "file").read_text() == "1" and (run.path / "both" / "file").read_text() == "2"


def test_a_value_that_was_computed_once_is_there_again_until_something_else_is_asked_for(tmp_path):
    run, calls = RunFolder(tmp_path / "run"), []
    for rank in (1, 1, 2):
        assert run.cache({"rank": rank})("some scores", lambda rank=rank: calls.append(rank) or {"r": rank}) == {
            "r": rank
        }
    assert calls == [1, 2] and [*read_stages(run.path)] == ["cached/some-scores"]


def test_a_stage_that_is_taken_over_is_a_copy_as_far_as_anybody_can_tell(tmp_path):
    """Its files may be the same on disk, so what is written into it later replaces them."""
    earlier = RunFolder(tmp_path / "earlier")
    earlier.stage("part", write("1"), {"rank": 1})
    run = RunFolder(tmp_path / "run", earlier=earlier.path)
    done = run.stage("part", killed, {"rank": 1})
    write_text(done / "file", "2")
    assert (earlier.path / "part" / "file").read_text() == "1"
    assert read_stages(run.path) == read_stages(earlier.path)


def test_what_was_made_within_a_stage_stays_as_long_as_the_stage(tmp_path):
    """Also where the stage is there already, so that nobody asks for the parts; those of other settings go."""

    def choose(run: RunFolder, names: str, how: int) -> Path:
        def make(folder: Path) -> None:
            for name in names:
                run.cache({})(name, lambda: 1)
            write_text(folder / "file", names)

        return run.stage("choice", make, {"how": how})

    choose(RunFolder(tmp_path / "run"), "ab", 1)
    choose(RunFolder(tmp_path / "run"), "bc", 2)
    again = RunFolder(tmp_path / "run")
    choose(again, "bc", 2)
    again.finish()
    assert [*read_stages(again.path)] == ["cached/b", "cached/c", "choice"]
    assert sorted(path.name for path in (again.path / "cached").iterdir()) == ["b", "c"]
    other = RunFolder(tmp_path / "other", earlier=again.path)
    choose(other, "bc", 2)
    other.finish()
    assert read_stages(other.path) == read_stages(again.path)
    assert (other.path / "cached" / "c" / "value.json").exists()


def test_what_recording_stages_takes_grows_with_their_number_and_not_with_its_square(tmp_path, monkeypatch):
    lines = []
    parse = stages.parse_json
    monkeypatch.setattr(stages, "parse_json", lambda text, *more: lines.append(text) or parse(text, *more))
    read = {}
    for count in (8, 16):
        lines.clear()
        run = RunFolder(tmp_path / f"{count}")
        for number in range(count):
            run.cache({})(f"value-{number}", lambda: 0)
        read[count] = len([line for line in lines if line])
        assert len(run.recorded()) == count
    assert read[16] == 2 * read[8]


DIFFERENCES = [
    ({"rank": 8}, {"rank": 4}, "rank 8 -> 4"),
    ({"alpha": 8}, {}, "alpha 8 -> default"),
    ({}, {"form": "sgd"}, "form default -> sgd"),
    ({"data": "a" * 64, "epochs": 2}, {"data": "b" * 64, "epochs": 2}, "data changed"),
    (
        {"experts": {"a": "a" * 64}, "on": "cpu"},
        {"experts": {"a": "b" * 64}, "on": "cuda"},
        "a changed, on cpu -> cuda",
    ),
]


@pytest.mark.parametrize(("before", "after", "told"), DIFFERENCES)
def test_it_is_told_in_what_stages_differ(before, after, told):
    assert difference(before, after) == told


@pytest.mark.parametrize("line", ["1", '{"from": {}}', '{"stage": "part", "from": "x"}', '{"stage": "part", "fr', "[]"])
def test_a_line_that_is_no_record_of_a_stage_is_skipped(line, tmp_path):
    RunFolder(tmp_path).stage("one", write("1"), {})
    with (tmp_path / "stages.jsonl").open("a") as file:
        file.write(line)
    RunFolder(tmp_path).stage("two", write("2"), {})
    assert {name: stage["from"] for name, stage in read_stages(tmp_path).items()} == {"one": {}, "two": {}}


@pytest.mark.parametrize("name", ["../precious", "part/../../precious", "{}/precious"])
def test_a_strangers_record_of_stages_lets_nothing_outside_the_run_be_dropped(name, tmp_path):
    write_text(tmp_path / "precious" / "thesis.tex", "x")
    write_text(tmp_path / "run" / "stages.jsonl", json.dumps({"stage": name.format(tmp_path), "from": {}}))
    RunFolder(tmp_path / "run").finish()
    assert (tmp_path / "precious" / "thesis.tex").exists() and not (tmp_path / "run" / "stages.jsonl").exists()


def test_the_record_of_stages_tells_what_each_was_made_from(fitted):
    told = read_stages(fitted)
    assert [*told] == [BASE, "experts/base", *EXPERTS, FEATURES]
    assert told[BASE]["from"]["learning_rate"] == 1e-2 and told[BASE]["from"]["rank"] == 8
    assert told[FEATURES]["from"]["d_proj"] == 64 and len(told[FEATURES]["from"]["data"]) == 64
    assert all(one["seconds"] >= 0 for one in told.values())
