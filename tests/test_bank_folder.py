"""A bank on disk takes what was checked as a whole, refuses the rest by name and reason, and finds leaks."""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import coterie
import tiny
from conftest import write_rows
from coterie.artifacts import MAX_TENSOR_FILE, locked, sha256_of
from coterie.data.examples import load_examples
from coterie.data.streaming import question_of, text_key
from coterie.errors import CoterieError
from coterie.experts.bank import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from coterie.experts.bank_folder import leaks, open_bank
from coterie.experts.cards import MAX_TEXT_FILE, Card, printable, read_card, short
from coterie.methods import add_adapters as shelving
from coterie.methods.add_adapters import bank_add, verify_bank
from helpers import refused, rewrite_config, save_adapter

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
README = """---
license: apache-2.0
datasets:
- someone/maths
- 7
- {a: b}
---
# An adapter
"""


@pytest.fixture(scope="module")
def shelf(backbone, tmp_path_factory) -> Path:
    """A folder with two good adapters of unequal ranks and targets."""
    root = tmp_path_factory.mktemp("shelf")
    some = {"r": 5, "lora_alpha": 5, "target_modules": ["v_proj"], "rank_pattern": {".*0.*v_proj": 7}}
    save_adapter(backbone.model, root / "all", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"})
    save_adapter(backbone.model, root / "some", some)
    (root / "all" / "README.md").unlink()
    (root / "some" / "README.md").write_text(README)
    return root


@pytest.fixture
def spoilt(shelf, tmp_path) -> Path:
    """A copy of a good adapter, to be spoilt."""
    return shutil.copytree(shelf / "all", tmp_path / "spoilt")


@pytest.fixture
def bank(tmp_path) -> Path:
    return tmp_path / "bank"


@pytest.fixture
def add(run, bank, model_folder):
    """Add adapters to a bank for the tiny model."""

    def command(*words: object, model: object = model_folder):
        code, out, err = run("bank", "add", bank, *words, "--model", model, "--device", "cpu")
        return code, out, re.sub(r"\r[^\r\n]*it/s\]\n?", "", err)  # bars of loading and saving models

    return command


@pytest.fixture
def full(add, bank, shelf) -> Path:
    """A bank with both good adapters."""
    assert add(shelf / "all", shelf / "some")[0] == 0
    return bank


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def rewrite_tensor(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    name = f"{LAYER}.lora_A.weight"
    save_file(tensors | {name: change(tensors[name])}, folder / WEIGHTS_FILE)


# ------------------------------------------------------------------------------------------------------- what is added


def test_adapters_of_unequal_ranks_and_targets_are_added_and_told(add, bank, shelf):
    code, out, err = add(shelf / "all", shelf / "some")
    all_of_it = 2 * 2 * (32 + 32) + 2 * 2 * (32 + 16) + 3 * 2 * (32 + 48)  # q and o, k and v, three of the MLP; rank 2
    assert code == 0 and "next: coterie " in err
    assert out.splitlines() == [
        f"added all: rank 2, 14 layers, {2 * all_of_it / 1000:.1f}k parameters",
        f"added some: rank 7, 2 layers, {(7 + 5) * (32 + 16)} parameters",
        f"{bank}: 2 adapters (all, some)",
    ]
    assert open_bank(bank).names == ("all", "some")
    own = {f"experts/{name}/{file}" for name in ("all", "some") for file in (CONFIG_FILE, WEIGHTS_FILE, "card.json")}
    assert files(bank) == {"bank.json", "experts/some/README.md", *own}


def test_what_was_added_is_a_plain_adapter_equal_to_its_source(full, shelf, backbone):
    for name in ("all", "some"):
        found, wanted = (load_adapter(path, backbone.model) for path in (full / "experts" / name, shelf / name))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[path].up, wanted[path].up) for path in wanted)


def test_a_card_tells_what_is_in_the_files_and_in_the_readme(full, shelf, model_folder):
    assert read_card(full / "experts" / "some") == Card(
        name="some",
        source=str(shelf / "some"),
        sha256=sha256_of(shelf / "some" / CONFIG_FILE, shelf / "some" / WEIGHTS_FILE),
        base=str(model_folder),
        rank=7,
        layers=2,
        parameters=576,
        licence="apache-2.0",
        datasets=("someone/maths", "7"),
        rows=None,
    )


def test_the_bank_names_its_base_model_as_a_mixture_does(full, model_folder, backbone):
    record = open_bank(full).base_model
    assert record == asdict(backbone.identity)
    assert record["id"] == str(model_folder)
    assert json.loads((full / "bank.json").read_text()) == {"format": 1, "base_model": record}


def test_another_name_is_given_with_an_equals_sign(add, bank, shelf, tmp_path):
    lr = shutil.copytree(shelf / "all", tmp_path / "lr=1e-4")
    assert add(f"law={shelf / 'all'}", f"fast={lr}")[0] == 0
    assert open_bank(bank).names == ("fast", "law")
    code, _, err = add(lr)
    assert code == 2 and "refused lr=1e-4: 'lr=1e-4' cannot be an adapter's name; give another one" in err


def test_only_the_three_files_are_copied(add, bank, spoilt):
    (spoilt / "training_args.bin").write_bytes(b"a pickle")
    (spoilt / "modeling.py").write_text("raise SystemExit")
    (spoilt / "README.md").write_text("plain")
    assert add(spoilt)[0] == 0
    assert files(bank / "experts" / "spoilt") == {CONFIG_FILE, WEIGHTS_FILE, "README.md", "card.json"}


def test_a_bank_goes_on_with_its_own_base_model(run, full, shelf):
    code, out, _ = run("bank", "add", full, f"third={shelf / 'some'}", "--device", "cpu")
    assert code == 0 and out.startswith("added third: rank 7") and len(open_bank(full).names) == 3


def test_another_named_base_model_is_only_noted(add, spoilt, bank, caplog, model_folder):
    rewrite_config(spoilt, base_model_name_or_path="someone/Other-7B")
    caplog.set_level("INFO", logger="coterie")
    assert add(spoilt)[0] == 0
    assert [record.message for record in caplog.records if "note" in record.message] == [
        f"note: spoilt names someone/Other-7B as its base model, and this bank is for {model_folder}"
    ]
    assert open_bank(bank).card("spoilt").base == "someone/Other-7B"


def test_the_same_base_model_in_another_place_is_not_noted(add, spoilt, caplog, model_folder):
    rewrite_config(spoilt, base_model_name_or_path=f"hub/{model_folder.name.upper()}")
    caplog.set_level("INFO", logger="coterie")
    assert add(spoilt)[0] == 0 and "note" not in caplog.text


@pytest.mark.parametrize(
    ("text", "licence", "datasets"),
    [
        ("no front matter", None, ()),
        ("---\nlicense: [mit, other]\ndatasets: a/b\n---\n", "mit, other", ("a/b",)),
        ("---\r\nlicense: mit\r\n---\r\n", "mit", ()),
        ("---\nlicense:\ndatasets: null\n---\n", None, ()),
        ("---\nlicense: mit\n", None, ()),
        ("---\nlicense: [unclosed\n---\n", None, ()),
        ("---\n- license\n---\n", None, ()),
        ("---\nlicense: !!python/object/apply:os.system [exit]\n---\n", "exit", ()),
        ("---\nlicense: \"\\e[31mred\"\ndatasets: 'a\x07b'\n---\n", None, ()),
        ('---\nlicense: "\\e[31mred"\n---\n', " [31mred", ()),
        ("---\nlicense: " + "x" * 200 + "\n---\n", "x" * 65 + "..." + "x" * 32, ()),
        ("---\nlicense: mit\nmore: " + "[" * 5000 + "\n---\n", None, ()),
        ("---\nlicense: mit\nmore: " + "x" * 20000 + "\n---\n", None, ()),
        ("---\na: &a {k: v}\nlicense: {<<: [*a, *a]}\n---\n", None, ()),
    ],
)
def test_front_matter_is_read_tolerantly(add, bank, spoilt, text, licence, datasets):
    (spoilt / "README.md").write_text(text, newline="")
    assert add(spoilt)[0] == 0
    card = open_bank(bank).card("spoilt")
    assert (card.licence and card.licence.strip(), card.datasets) == (licence and licence.strip(), datasets)


def test_merge_keys_that_would_grow_without_end_are_not_followed(add, bank, spoilt):
    levels = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
    (spoilt / "README.md").write_text("\n".join(["---", "a0: &a0 {k: v}", *levels, "license: mit", "---", ""]))
    assert add(spoilt)[0] == 0 and open_bank(bank).card("spoilt").licence == "mit"


# --------------------------------------------------------------------------------------------------- what is refused


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def linked(folder: Path) -> None:
    (folder.parent / "secret").write_text("a key")
    (folder / "README.md").symlink_to(folder.parent / "secret")


def linked_config(folder: Path) -> None:
    (folder / CONFIG_FILE).rename(folder.parent / "config.json")
    (folder / CONFIG_FILE).symlink_to(folder.parent / "config.json")


def larger(name: str, size: int):
    def change(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)  # a hole: it takes no room on the disk

    return change


def lying_header(folder: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1000000000,1000],"data_offsets":[0,8]}}'
    (folder / WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header + b"12341234")


def no_config(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()


def pipe(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)


def other_widths(folder: Path) -> None:
    rewrite_tensor(folder, lambda tensor: torch.ones(2, 64))


BAD = {
    "another base": (other_widths, r"lora_A \(2, 64\).*is the adapter for another base model\?"),
    "a pickle": (pickled, "holds adapter_model.bin, but only safetensors are read.* call save_pretrained"),
    "DoRA": (lambda f: rewrite_config(f, use_dora=True), "adapter_config.json: use_dora = True is not supported"),
    "no adapter": (no_config, "holds no adapter_config.json, so it is no adapter"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "holds no adapter_model.safetensors"),
    "a pipe": (pipe, "holds no adapter_model.safetensors"),
    "a lying header": (lying_header, "is truncated or not a safetensors file"),
    "a huge header": (lambda f: (f / WEIGHTS_FILE).write_bytes(b"\xff" * 7 + b"\x00" * 9), "not a safetensors file"),
    "huge weights": (larger(WEIGHTS_FILE, MAX_TENSOR_FILE + 1), "has 8,589,934,593 bytes, more than the"),
    "a huge config": (larger(CONFIG_FILE, MAX_TEXT_FILE + 1), "adapter_config.json has 1,048,577 bytes, more than the"),
    "a huge README": (larger("README.md", MAX_TEXT_FILE + 1), "README.md has 1,048,577 bytes, more than the 1,048,576"),
    "a deep config": (lambda f: (f / CONFIG_FILE).write_text('{"a":' + "[" * 500000), "is too deeply nested"),
    "a broken config": (lambda f: (f / CONFIG_FILE).write_text("{"), "is not readable JSON"),
    "a link elsewhere": (linked, "README.md is a link to another folder, which is not followed"),
    "a config elsewhere": (linked_config, "adapter_config.json is a link to another folder"),
    "a README folder": (lambda f: (f / "README.md").mkdir(), "README.md is not a regular file"),
    "NaN": (lambda f: rewrite_tensor(f, lambda t: t / 0 * 0), "holds NaN or infinite values"),
    "eight bits": (
        lambda f: rewrite_tensor(f, lambda t: t.to(torch.float8_e4m3fn)),
        "lora_A.weight' is of F8_E4M3, which no plain LoRA factor is",
    ),
    "a page in a field": (
        lambda f: rewrite_config(f, bias="x\n" * 5000),
        r"bias = 'x\\nx.*\.\.\..* is not supported; use a plain LoRA adapter$",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD.values(), ids=BAD)
def test_a_bad_adapter_is_refused_in_one_line_beside_a_good_one_and_leaves_nothing(
    add, bank, shelf, spoilt, spoil, reason
):
    spoil(spoilt)
    code, out, err = add(spoilt, shelf / "all")
    assert code == 2 and out.startswith("added all: rank 2")
    lines = [line for line in re.split(r"[\r\n]+", err) if line.startswith("refused ")]
    assert len(lines) == 1 and re.match(f"refused spoilt: .*{reason}", lines[0]), err
    assert len(lines[0]) < 600 and "partial" not in err and "Traceback" not in err
    assert os.listdir(bank / "experts") == ["all"] and open_bank(bank).names == ("all",)


@pytest.mark.parametrize(
    "name", ["..", "../evil", "a/b", "/etc/x", ".hidden", "a\nb", "\x1b[31m", "x" * 101, "backbone"]
)
def test_names_that_are_tricks_are_refused_and_nothing_is_written(add, bank, shelf, tmp_path, name):
    before = files(tmp_path)
    code, out, err = add(f"{name}={shelf / 'all'}")
    assert (code, out) == (2, "")
    assert err.startswith("refused ") and "cannot be" in err and len(err.splitlines()) == 1 and "\x1b" not in err
    assert files(tmp_path) == before and not bank.exists()


def test_a_file_and_a_missing_folder_are_refused(add, bank, shelf, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    code, _, err = add(tmp_path / "notes.txt", tmp_path / "nowhere", "=x", "y=")
    assert code == 2 and not bank.exists()
    assert [line.partition(": ")[0] for line in err.splitlines()] == [
        "refused notes.txt",
        "refused nowhere",
        "refused ",
        "refused y",
    ]
    assert "holds no adapter_config.json" in err and "nowhere does not exist; give an adapter's folder or a hub" in err


def test_files_that_the_hubs_cache_keeps_elsewhere_are_taken(add, bank, shelf, tmp_path):
    folder, blobs = tmp_path / "hub" / "snapshots" / "12ab", tmp_path / "hub" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copy(shelf / "all" / name, blobs / name)
        (folder / name).symlink_to(f"../../blobs/{name}")
    assert add(f"cached={folder}")[0] == 0
    assert not (bank / "experts" / "cached" / CONFIG_FILE).is_symlink()


def test_from_the_hub_come_exactly_the_three_files(add, bank, shelf, monkeypatch):
    asked = []

    def download(repo: str, allow_patterns: list[str], revision: str | None) -> str:
        asked.append((repo, allow_patterns, revision))
        if repo != "someone/law":
            raise OSError("401 Client Error\nmore of it")
        return str(shelf / "some")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    code, out, err = add("someone/law", "someone/gone")
    files = [CONFIG_FILE, WEIGHTS_FILE, "README.md"]
    assert asked == [("someone/law", files, None), ("someone/gone", files, None)]
    assert code == 2 and out.startswith("added law: rank 7") and open_bank(bank).card("law").source == "someone/law"
    assert err == "refused gone: someone/gone is no folder and cannot be had from the hub (401 Client Error); " + (
        "check the name\n"
    )


# ----------------------------------------------------------------------------------------------- what is there already


def test_the_same_adapter_again_is_there_already(add, full, shelf):
    before = (full / "experts" / "all" / "card.json").stat().st_mtime_ns
    code, out, err = add(shelf / "all", f"new={shelf / 'all'}", f"new={shelf / 'all'}")
    assert code == 0 and "next: coterie " in err
    lines = out.splitlines()
    assert lines[0] == "all is there already, with the same files" and lines[1].startswith("added new")
    assert lines[2] == "new is there already, with the same files"
    assert (full / "experts" / "all" / "card.json").stat().st_mtime_ns == before


def test_another_adapter_of_the_same_name_is_refused_or_replaces_it_when_told_to(add, full, shelf):
    other = f"all={shelf / 'some'}"
    code, out, err = add(other)
    assert (code, out) == (2, "")
    assert err.startswith("refused all: another adapter of this name is there already; rename one with NAME=FOLDER, or")
    assert open_bank(full).card("all").rank == 2
    code, out, _ = add(other, "--overwrite")
    assert code == 0 and out.startswith("added all: rank 7")
    assert open_bank(full).card("all").rank == 7 and sorted(os.listdir(full / "experts")) == ["all", "some"]


def test_two_of_one_call_never_replace_each_other(add, bank, shelf):
    code, out, err = add(f"x={shelf / 'all'}", f"x={shelf / 'some'}", "--overwrite")
    assert code == 2 and out.startswith("added x: rank 2") and "another adapter of this name is there already" in err
    assert open_bank(bank).card("x").rank == 2 and "add --overwrite" not in err


def test_a_bad_adapter_does_not_replace_a_good_one(add, full, spoilt):
    pickled(spoilt)
    assert add(f"all={spoilt}", "--overwrite")[0] == 2
    assert open_bank(full).card("all").rank == 2 and (full / "experts" / "all" / WEIGHTS_FILE).is_file()


def test_another_base_model_is_refused_before_anything_is_added(add, full, shelf, tmp_path):
    other = tiny.save_model(tmp_path / "other", seed=1)
    code, out, err = add(f"new={shelf / 'all'}", model=other)
    assert (code, out) == (2, "")
    assert re.search(r"^error: \S+ is a bank for \S+ \(sha256 \w{12}\), but the base model loaded is \S+/other ", err)
    assert open_bank(full).names == ("all", "some")


def test_a_refused_adapter_does_not_fix_the_base_model_of_a_new_bank(add, bank, shelf, tmp_path):
    assert add(tmp_path / "nowhere", model=tiny.save_model(tmp_path / "other", seed=1))[0] == 2
    assert not bank.exists()
    assert add(shelf / "all")[0] == 0


# --------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("step", ["describe_adapter", "_publish"])
def test_an_interrupted_addition_leaves_no_half_written_adapter(add, bank, shelf, monkeypatch, step):
    assert add(shelf / "all")[0] == 0
    before = files(bank)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shelving, step, interrupt)
        code, out, _ = add(shelf / "some")
        assert code == 130 and out == ""
    assert files(bank) == before and os.listdir(bank / "experts") == ["all"]
    assert add(shelf / "all", shelf / "some")[1].splitlines()[0] == "all is there already, with the same files"


def test_what_a_killed_addition_has_left_is_no_adapter_and_in_nobodys_way(add, bank, shelf):
    draft = bank / "experts" / ".all.partial"
    draft.mkdir(parents=True)
    (draft / WEIGHTS_FILE).write_bytes(b"half")
    (bank / ".bank.json.tmp").write_text("{")
    assert add(shelf / "all", shelf / "some")[0] == 0
    assert open_bank(bank).names == ("all", "some") and not draft.exists()


class KilledError(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("drafts", ["with its draft", "without it"])
def test_an_addition_killed_between_its_two_renames_loses_nothing_in_silence(
    drafts, add, bank, shelf, monkeypatch, caplog
):
    """The old adapter is told by whoever opens the bank, and has its place again when one is added."""
    assert add(f"x={shelf / 'some'}")[0] == 0
    before, rank = files(bank), open_bank(bank).card("x").rank

    def killed(draft: Path, target: Path, aside: Path) -> None:
        target.rename(aside)
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(shelving, "replace_folder", killed)
        if drafts == "with its draft":
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        bank_add(bank, [f"x={shelf / 'all'}"], overwrite=True, device="cpu")
    assert open_bank(bank).names == () and "x is set aside, since replacing it was cut off" in caplog.text
    assert add(f"y={shelf / 'all'}")[0] == 0 and "x has its place again" in caplog.text
    assert {name for name in files(bank) if "/y/" not in name} == before and open_bank(bank).card("x").rank == rank
    assert sorted(os.listdir(bank / "experts")) == ["x", "y"] and ".lock" not in os.listdir(bank)


def test_two_additions_to_one_bank_are_told_of_each_other(add, bank, shelf):
    with locked(bank / ".lock", bank):
        code, out, err = add(shelf / "all")
    assert (code, out) == (2, "")
    assert re.search(r"bank is being written by process \d+ .*on '.*' since .*; wait until that is done", err)
    assert add(shelf / "all")[0] == 0


def test_no_adapter_is_replaced_that_holds_what_nobody_added(add, bank, shelf, tmp_path):
    assert add(f"x={shelf / 'some'}", f"y={shelf / 'some'}")[0] == 0
    (bank / "experts" / "x" / "notes.md").write_text("mine")
    (bank / "experts" / "y").rename(tmp_path / "mine")
    (bank / "experts" / "y").symlink_to(tmp_path / "mine")
    before = files(bank), files(tmp_path / "mine")
    for name in "xy":
        code, _, err = add(f"{name}={shelf / 'all'}", "--overwrite")
        assert code == 2 and "is a link or holds what no bank add wrote, so it is not replaced" in err
    assert (files(bank), files(tmp_path / "mine")) == before


def test_nothing_is_added_through_a_planted_link(add, bank, shelf, tmp_path):
    (tmp_path / "project").mkdir()
    bank.mkdir()
    (bank / "experts").symlink_to(tmp_path / "project")
    code, _, err = add(shelf / "all")
    assert code == 2 and "experts is a link or a file where a folder is needed" in err
    assert not list((tmp_path / "project").iterdir())


def test_a_full_disk_is_told_in_one_line(add, bank, shelf, monkeypatch):
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    code, out, err = add(shelf / "all")
    assert (code, out) == (2, "") and re.match(r"refused all: no space left on the disk", err) and not bank.exists()


# ----------------------------------------------------------------------------------------------------- training data


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "train.jsonl", [*tiny.make_rows(12), tiny.make_rows(1)[0]])


def test_planted_leaks_are_found_with_their_count(add, bank, shelf, rows):
    code, _, err = add(f"known={shelf / 'all'}", f"unknown={shelf / 'some'}", "--trained-on", f"known={rows}")
    assert code == 0, err
    found = open_bank(bank)
    trained = load_examples(rows)
    assert (found.card("known").rows, found.card("unknown").rows) == (13, None)
    assert found.trained_on("known") == {text_key(question_of(example)) for example in trained}
    assert found.trained_on("unknown") is None
    fresh = load_examples([{"instruction": f"never seen {n}", "response": "x"} for n in range(5)])
    louder = [{"instruction": row["instruction"].upper() + "  ", "response": "else"} for row in tiny.make_rows(12)[3:6]]
    assert leaks(found, [*fresh, *load_examples(louder), trained[0], trained[0]]) == {"known": 5}
    assert leaks(found, fresh) == {} and leaks(found, []) == {}


def test_several_sources_count_together(add, bank, shelf, rows, tmp_path):
    more = write_rows(tmp_path / "more.jsonl", [{"instruction": "one more", "response": "yes"}])
    flags = ("--trained-on", f"all={rows}", "--trained-on", f"all={more}")
    assert add(shelf / "all", *flags)[0] == 0
    assert open_bank(bank).card("all").rows == 14
    assert leaks(open_bank(bank), load_examples(more)) == {"all": 1}


def test_training_data_of_what_is_there_already_are_noted_only_when_told_to(add, full, shelf, rows):
    flags = (shelf / "all", "--trained-on", f"all={rows}")
    code, _, err = add(*flags)
    assert code == 2 and err == "refused all: it is there already; add --overwrite to note what it was trained on\n"
    assert add(*flags, "--overwrite")[0] == 0 and open_bank(full).card("all").rows == 13


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("nobody={rows}", "--trained-on names 'nobody', but the adapters to add are all"),
        ("all", "--trained-on takes NAME=VALUE"),
        ("all=nowhere.jsonl", "nowhere.jsonl does not exist"),
    ],
)
def test_bad_training_data_stop_everything(add, bank, shelf, rows, value, reason):
    code, out, err = add(shelf / "all", "--trained-on", value.format(rows=rows))
    assert (code, out) == (2, "") and err.startswith(f"error: {reason}") and len(err.splitlines()) == 1
    assert not bank.exists()


# --------------------------------------------------------------------------------------------------- list and verify


def test_the_list_shows_every_adapter(run, full, add, shelf, rows):
    assert add(f"known={shelf / 'all'}", "--trained-on", f"known={rows}")[0] == 0
    code, out, _ = run("bank", "list", full)
    assert code == 0 and [line.split() for line in out.splitlines()] == [
        ["name", "rank", "layers", "parameters", "licence", "data", "known", "rows"],
        ["all", "2", "14", "1.9k", "unknown", "unknown", "unknown"],
        ["known", "2", "14", "1.9k", "unknown", "unknown", "13"],
        ["some", "7", "2", "576", "apache-2.0", "someone/maths,", "7", "unknown"],
    ]


def test_the_list_in_json_is_the_cards(run, full):
    code, out, _ = run("bank", "list", full, "--json")
    cards = [json.loads((full / "experts" / name / "card.json").read_text()) for name in ("all", "some")]
    assert code == 0 and [json.loads(line) for line in out.splitlines()] == cards


# ------------------------------------------------------------------------------------------------------------- remove


def test_adapters_are_removed_by_name(run, full, add, shelf):
    assert add(f"third={shelf / 'all'}")[0] == 0
    code, out, err = run("bank", "remove", full, "third", "all", "third")
    assert code == 0 and out.splitlines()[-1] == f"{full}: 1 adapter (some)"
    assert err.splitlines()[-1] == f"next: coterie fit from-adapters --bank {full} --output runs/shelf"
    assert os.listdir(full / "experts") == ["some"] and ".lock" not in os.listdir(full)
    assert add(f"third={shelf / 'all'}")[1].startswith("added third")


def test_what_cannot_be_removed_is_told_and_everything_stays(run, full, tmp_path):
    before = files(full)
    refused(run("bank", "remove", full, "some", "al"), "no adapter is called 'al'. Did you mean 'all'")
    (full / "experts" / "all" / "notes.md").write_text("mine")
    refused(run("bank", "remove", full, "some", "all"), "holds what no bank add wrote, so it is not removed; move it")
    assert files(full) == {*before, "experts/all/notes.md"}
    with locked(full / ".lock", full):
        refused(run("bank", "remove", full, "some"), "bank is being written by process")
    refused(run("bank", "remove", tmp_path / "nowhere", "x"), "holds no bank.json, so it is no bank")
    refused(run("bank", "remove", full, "../some"), "no adapter is called '../some'")


def test_a_removal_killed_in_the_middle_leaves_no_half_adapter(full, run, monkeypatch):
    def killed(folder: Path) -> None:
        (folder / WEIGHTS_FILE).unlink()
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(shutil, "rmtree", killed)
        coterie.bank_remove(full, "all")
    assert open_bank(full).names == ("some",) and len(os.listdir(full / "experts")) == 2
    refused(run("bank", "remove", full, "all"), "no adapter is called 'all'")
    assert os.listdir(full / "experts") == ["some"]


def test_no_record_removes_anything(run, full, tmp_path):
    record = tmp_path / "run.yaml"
    record.write_text(f"format: 1\ncommand: bank remove\nsettings: {{folder: {full}, name: [all]}}\n")
    refused(
        run("run", record), "records 'bank remove'; these can be repeated: bank add, bank verify, bank find, select"
    )
    assert open_bank(full).names == ("all", "some")


def test_an_adapter_is_removed_by_deleting_its_folder_too(run, full):
    shutil.rmtree(full / "experts" / "all")
    assert open_bank(full).names == ("some",)
    with pytest.raises(CoterieError, match=r"no adapter is called 'som'\. Did you mean 'some'\?"):
        open_bank(full).folder_of("som")
    assert open_bank(full).folder_of("some") == full / "experts" / "some"


def test_a_bank_as_it_was_added_is_verified(run, full, add, shelf, rows):
    assert add(f"known={shelf / 'all'}", "--trained-on", f"known={rows}")[0] == 0
    code, out, _ = run("bank", "verify", full, "--device", "cpu")
    assert (code, out) == (0, "all: ok\nknown: ok\nsome: ok\n")
    flip(full / "experts" / "known" / WEIGHTS_FILE)
    code, out, _ = run("bank", "verify", full, "--json", "--device", "cpu")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and [(one["name"], one["trouble"] is None) for one in found] == [
        ("all", True),
        ("known", False),
        ("some", True),
    ]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def recard(folder: Path, **changes) -> None:
    file = folder / "card.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def harmful(folder: Path) -> None:
    rewrite_config(folder, use_dora=True)
    recard(folder, sha256=sha256_of(folder / CONFIG_FILE, folder / WEIGHTS_FILE))


WRONG = {
    "a flipped byte": (lambda f: flip(f / WEIGHTS_FILE), "its files are not the ones that were added"),
    "another config": (lambda f: rewrite_config(f, r=3), "its files are not the ones that were added"),
    "missing weights": (lambda f: (f / WEIGHTS_FILE).unlink(), ".*holds no adapter_model.safetensors"),
    "a missing card": (lambda f: (f / "card.json").unlink(), ".*card.json does not exist"),
    "a broken card": (lambda f: recard(f, rank="many"), ".*card.json is no adapter's card"),
    "a card of another": (lambda f: recard(f, name="some"), ".*card.json is the card of 'some'"),
    "a lying card": (lambda f: recard(f, rank=8, licence="mit"), "its card has another rank, licence than its files"),
    "missing questions": (lambda f: recard(f, rows=3), ".*questions.json does not exist"),
    "a new hash for a bad adapter": (harmful, ".*use_dora = True is not supported"),
}


@pytest.mark.parametrize(("spoil", "reason"), WRONG.values(), ids=WRONG)
def test_verify_finds_what_is_wrong_and_goes_on(run, full, spoil, reason):
    spoil(full / "experts" / "all")
    code, out, err = run("bank", "verify", full, "--device", "cpu")
    assert code == 2 and "Traceback" not in err
    first, second = out.splitlines()
    assert re.match(f"all: {reason}", first), first
    assert second == "some: ok"


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"keys": []}', '{"keys": ["zz"]}', '{"keys": ["ab"]}', '{"keys": 3}', '{"keys": [3]}']
)
def test_broken_questions_are_told(full, content):
    recard(full / "experts" / "all", rows=3)
    (full / "experts" / "all" / "questions.json").write_text(content)
    with pytest.raises(CoterieError, match=r"questions.json (holds no keys|is not readable)"):
        leaks(open_bank(full), load_examples(tiny.make_rows(1)))


def test_more_questions_than_rows_are_found_by_verify(full, add, shelf, rows):
    assert add(f"known={shelf / 'all'}", "--trained-on", f"known={rows}")[0] == 0
    recard(full / "experts" / "known", rows=2)
    found = {one.name: one.trouble for one in verify_bank(full, device="cpu")}
    assert found["all"] is None and found["known"].startswith("it has more questions than the 2 training rows")


def test_verify_refuses_a_base_model_that_has_changed(run, full):
    record = json.loads((full / "bank.json").read_text())
    record["base_model"]["sha256"] = "0" * 64
    (full / "bank.json").write_text(json.dumps(record))
    code, out, err = run("bank", "verify", full, "--device", "cpu")
    assert (code, out) == (2, "") and "is a bank for" in err and "sha256 000000000000" in err


# ------------------------------------------------------------------------------------------------------- no such bank


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_folder_that_is_no_bank_is_told_in_one_line(run, tmp_path, run_folder, command):
    told = (
        f"{run_folder} is a mixture, not a bank; type: coterie bank add bank/ {run_folder}/experts/\\* --model MODEL$"
    )
    refused(run("bank", command, run_folder), told)
    for folder in (tmp_path / "nowhere", tmp_path):
        code, out, err = run("bank", command, folder)
        assert (code, out) == (2, "")
        assert err == f"error: {folder} holds no bank.json, so it is no bank; make one with: " + (
            f"coterie bank add {folder} ADAPTER ... --model MODEL\n"
        )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not readable JSON"),
        ("[]", "must hold a JSON object"),
        ('{"format": 2}', "has format 2, not 1; upgrade coterie"),
        ('{"format": 1}', r"\W+base_model\W+should be"),
        ('{"format": 1, "base_model": {"id": "x", "revision": null}}', r"\W+base_model\W+sha256\W+is missing"),
        (
            '{"format": 1, "base_model": {"id": "x", "revision": null, "sha256": 3}}',
            r"\W+base_model\W+sha256\W+should be",
        ),
        ('{"a":' + "[" * 400000, "is too deeply nested"),
    ],
)
def test_a_broken_bank_is_told_by_file_and_reason(full, content, reason):
    (full / "bank.json").write_text(content)
    with pytest.raises(CoterieError, match=f"bank.json ?{reason}"):
        open_bank(full)


def test_a_new_bank_needs_a_base_model_and_a_folder_of_its_own(run, add, bank, shelf, run_folder, model_folder):
    code, _, err = run("bank", "add", bank, shelf / "all")
    assert code == 2 and err == f"error: {bank} is a new bank; say which base model it is for with --model\n"
    before = files(run_folder)
    code, _, err = run("bank", "add", run_folder, shelf / "all", "--model", model_folder)
    assert code == 2 and err == f"error: {run_folder} is there already and is no bank; choose another folder\n"
    assert files(run_folder) == before and not bank.exists()


def test_python_does_what_the_command_line_does(bank, shelf, model_folder, tmp_path):
    told = bank_add(bank, [shelf / "all", tmp_path / "nowhere"], model=str(model_folder), device="cpu")
    assert [(one.name, one.is_new, one.refusal is None) for one in told] == [
        ("all", True, True),
        ("nowhere", False, False),
    ]
    assert told[0].card == coterie.open_bank(bank).card("all")
    assert [(one.name, one.trouble) for one in coterie.verify_bank(bank, device="cpu")] == [("all", None)]
    with pytest.raises(CoterieError, match="no setting is called 'colour'"):
        coterie.bank_add(bank, [shelf / "all"], colour="red")


@pytest.mark.parametrize("command", ["add", "list", "verify"])
def test_help_is_there(run, command):
    code, out, _ = run("bank", command, "--help")
    assert code == 0 and "Usage" in out and "folder of the bank" in out


def test_counts_and_texts_are_short():
    assert [short(n) for n in (0, 999, 1000, 2_436_000, 3_000_000_000)] == ["0", "999", "1.0k", "2.4M", "3.0B"]
    assert printable("a\x1b[0m\nb\u202ec", 20) == "a [0m b c" and printable("abcdefghijk", 9) == "abcd...jk"
