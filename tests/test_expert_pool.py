"""A pool's list of experts: what they are is found out, checked when it is made, and again when it is read."""

import inspect
import json
import os
import shutil
from typing import Any

import pytest

import tiny
from coterie.artifacts import locked
from coterie.errors import CoterieError
from coterie.experts import expert_pool
from coterie.experts.expert_pool import init_pool, read_pool
from coterie.settings.commands import ExpertPoolSettings
from helpers import refused


@pytest.fixture
def adapter(run_folder, tmp_path):
    """An expert's folder that a test may change."""
    return shutil.copytree(run_folder / "experts" / "cluster-0", tmp_path / "maths")


def made(folder, *experts: str, **settings: object):
    init_pool(ExpertPoolSettings(folder=str(folder), expert=list(experts), **settings))
    return read_pool(folder)


def test_every_kind_of_expert_is_told_by_its_source(tmp_path, adapter, model_folder):
    pool = made(
        tmp_path / "pool", f"base={model_folder}", f"maths={adapter}", "big=http://127.0.0.1:8001/v1/#org/some-model"
    )
    assert pool.names == ("base", "maths", "big")
    assert [(e.kind, e.source, e.model) for e in pool.experts] == [
        ("model", str(model_folder), str(model_folder)),
        ("adapter", str(adapter), str(model_folder)),
        ("endpoint", "http://127.0.0.1:8001/v1", "org/some-model"),
    ]
    assert [e.sha256 is None for e in pool.experts] == [False, False, True]
    assert len({e.identity for e in pool.experts}) == 3


def test_the_base_of_adapters_can_be_given(tmp_path, adapter, model_folder):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(CoterieError, match="names no base model; add --base MODEL"):
        made(tmp_path / "pool", f"maths={adapter}")
    assert made(tmp_path / "pool", f"maths={adapter}", base=str(model_folder)).expert("maths").model == str(
        model_folder
    )


def test_an_adapter_in_a_mixture_brings_its_system_prompt(tmp_path, adapter):
    inside = tmp_path / "run" / "experts" / "maths"
    shutil.copytree(adapter, inside)
    (tmp_path / "run" / "mixture.json").write_text(json.dumps({"system_prompt": "Be brief."}))
    pool = made(tmp_path / "pool", f"a={inside}", f"b={adapter}")
    assert [e.system_prompt for e in pool.experts] == ["Be brief.", None]
    assert pool.expert("a").sha256 == pool.expert("b").sha256
    assert pool.expert("a").identity != pool.expert("b").identity


def test_an_adapter_that_was_trained_on_is_not_the_same_any_more(tmp_path, adapter):
    made(tmp_path / "pool", f"maths={adapter}")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CoterieError, match="'maths' .* has other weights than when .*pool.json was written"):
        read_pool(tmp_path / "pool")
    weights.unlink()
    with pytest.raises(CoterieError, match="the adapter of 'maths' is not in .* any more"):
        read_pool(tmp_path / "pool")


def test_a_base_model_with_other_weights_is_not_the_same_any_more(tmp_path):
    model = tiny.save_model(tmp_path / "model")
    made(tmp_path / "pool", f"base={model}")
    tiny.save_model(tmp_path / "model", seed=1)
    with pytest.raises(CoterieError, match="'base' .* has other weights"):
        read_pool(tmp_path / "pool")


SECRET = "sk-secret"


@pytest.mark.parametrize(
    ("expert", "pattern"),
    [
        ("maths", "is not of the form NAME=FOLDER"),
        ("=x", "is not of the form"),
        ("../x=smollm2-135m", "cannot be an expert's name"),
        ("a=smolm2-135m", "Did you mean 'smollm2-135m'"),
        ("a=/nowhere/adapter", "no model folder or alias is called '/nowhere/adapter'"),
        ("a=http://127.0.0.1:8001/v1", "with the model's name there"),
        ("a=ftp://host/v1#m", "has the form http://HOST/v1#MODEL"),
        ("a=http://[::1/v1#m", "has the form http://HOST/v1#MODEL"),
        ("a=http://host:99999/v1#m", "has the form http://HOST/v1#MODEL"),
        (f"a=https://user:{SECRET}@host/v1#m", "put the key into the environment"),
        (f"a=https://host/v1?key={SECRET}#m", "put the key into the environment"),
    ],
)
def test_bad_experts_are_refused_and_leave_nothing(tmp_path, expert, pattern):
    with pytest.raises(CoterieError, match=pattern) as error:
        made(tmp_path / "pool", expert)
    assert SECRET not in str(error.value) and not (tmp_path / "pool").exists()


def test_names_are_given_once_and_pools_are_kept(tmp_path, model_folder):
    with pytest.raises(CoterieError, match="a name of their own each, got a, a"):
        made(tmp_path / "pool", f"a={model_folder}", "a=http://h/v1#m")
    made(tmp_path / "pool", f"a={model_folder}")
    with pytest.raises(CoterieError, match="exists; choose another folder, or add --overwrite"):
        made(tmp_path / "pool", f"b={model_folder}")
    assert made(tmp_path / "pool", f"b={model_folder}", overwrite=True).names == ("b",)


ENTRY = {"kind": "endpoint", "source": "http://h/v1", "model": "m", "sha256": None, "system_prompt": None}


def test_a_broken_entry_is_refused_where_python_leaves_assertions_out():
    without: dict[str, Any] = {"__name__": expert_pool.__name__}
    exec(compile(inspect.getsource(expert_pool), "without assertions", "exec", optimize=1), without)  # noqa: S102
    with pytest.raises(CoterieError, match=r"pool\.json: the entry of the expert 'a' is broken; make the pool again"):
        without["pool_from"]({"a": ENTRY | {"model": 3}}, "pool.json")


@pytest.mark.parametrize(
    ("experts", "pattern"),
    [
        ({}, "lists no experts"),
        ([], "lists no experts"),
        ({"a": {}}, "the entry of the expert 'a' is broken"),
        ({"a": {**ENTRY, "kind": "pickle"}}, "the entry of the expert 'a' is broken"),
        ({"a": {**ENTRY, "model": 3}}, "the entry of the expert 'a' is broken"),
        ({"a": {**ENTRY, "sha256": ["x"]}}, "the entry of the expert 'a' is broken"),
        ({"a": "http://h/v1"}, "the entry of the expert 'a' is broken"),
        ({"a": {**ENTRY, "more": 3}}, "the entry of the expert 'a' is broken"),
        ({"a": {**ENTRY, "source": "http://u:p@h/v1"}}, "put the key into the environment"),
        ({"a/b": ENTRY}, "cannot be an expert's name"),
    ],
)
def test_a_broken_list_is_refused(tmp_path, experts, pattern):
    (tmp_path / "pool.json").write_text(json.dumps({"format": 1, "experts": experts}))
    with pytest.raises(CoterieError, match=pattern):
        read_pool(tmp_path)


def test_another_format_and_no_pool_are_told(tmp_path):
    with pytest.raises(CoterieError, match="make it with: coterie experts init"):
        read_pool(tmp_path)
    (tmp_path / "pool.json").write_text('{"format": 2}')
    with pytest.raises(CoterieError, match="has format 2, not 1"):
        read_pool(tmp_path)


# ------------------------------------------------------------------------------------------------ add, list, remove


@pytest.fixture
def pool(tmp_path, model_folder):
    made(tmp_path / "pool", f"base={model_folder}", "big=http://127.0.0.1:8001/v1#some-model")
    return tmp_path / "pool"


def test_experts_are_added_listed_and_removed(run, pool, adapter):
    code, out, err = run("experts", "add", pool, "--expert", f"maths={adapter}", "--expert", "more=http://h/v1#m")
    assert code == 0 and out.splitlines()[-1] == f"{pool}: 4 experts"
    assert err.splitlines() == [f"wrote {pool}", f"next: coterie profile {pool} --data val.jsonl --overwrite"]
    assert read_pool(pool).names == ("base", "big", "maths", "more")
    code, out, _ = run("experts", "list", pool, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(row["name"], row["kind"]) for row in rows] == [
        ("base", "model"),
        ("big", "endpoint"),
        ("maths", "adapter"),
        ("more", "endpoint"),
    ]
    code, out, _ = run("experts", "remove", pool, "big", "maths")
    assert code == 0 and read_pool(pool).names == ("base", "more") and adapter.is_dir()
    code, out, _ = run("experts", "list", pool)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["expert", "base", "more"]


def test_the_same_expert_again_is_listed_already_and_another_one_of_its_name_needs_a_word(run, pool, adapter):
    before = (pool / "pool.json").read_bytes()
    assert run("experts", "add", pool, "--expert", "big=http://127.0.0.1:8001/v1#some-model")[0] == 0
    words = ("experts", "add", pool, "--expert", f"big={adapter}")
    refused(run(*words), "another expert is listed as 'big' in .*; give another name, or add --overwrite to replace it")
    assert (pool / "pool.json").read_bytes() == before
    assert run(*words, "--overwrite")[0] == 0
    assert [(one.name, one.kind) for one in read_pool(pool).experts] == [("base", "model"), ("big", "adapter")]


def test_an_expert_that_has_changed_can_be_listed_replaced_and_removed(run, pool, adapter):
    assert run("experts", "add", pool, "--expert", f"maths={adapter}")[0] == 0
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CoterieError, match="has other weights"):
        read_pool(pool)
    assert run("experts", "list", pool)[0] == 0
    assert run("experts", "add", pool, "--expert", f"maths={adapter}", "--overwrite")[0] == 0
    assert run("experts", "remove", pool, "maths")[0] == 0 and read_pool(pool).names == ("base", "big")


def test_what_cannot_be_added_or_removed_is_told_and_the_list_stays(run, pool, tmp_path):
    before = (pool / "pool.json").read_bytes()
    refused(run("experts", "remove", pool, "bigg"), "no expert is called 'bigg'. Did you mean 'big'")
    refused(run("experts", "remove", pool, "big", "base"), "would list no experts; delete .* instead")
    refused(run("experts", "add", pool, "--expert", "x=/nowhere"), "'/nowhere'")
    with locked(pool / ".lock", pool):
        for words in (("add", pool, "--expert", "x=http://h/v1#m"), ("remove", pool, "big")):
            refused(run("experts", *words), "pool is being written by process")
    assert (pool / "pool.json").read_bytes() == before and os.listdir(pool) == ["pool.json"]
    for command in ("add --expert x=http://h/v1#m", "remove x", "list"):
        word, *rest = command.split()
        refused(run("experts", word, tmp_path / "none", *rest), "pool.json does not exist; make it with: coterie")
    assert not (tmp_path / "none").exists()


def test_the_old_name_of_the_group_has_all_of_its_commands(run, pool):
    assert run("pool", "add", pool, "--expert", "more=http://h/v1#m")[0] == 0
    code, out, err = run("pool", "list", pool, "--json")
    assert code == 0 and len(out.splitlines()) == 3 and "pool list is now called: coterie experts list" in err
    assert run("pool", "remove", pool, "more")[0] == 0 and read_pool(pool).names == ("base", "big")
