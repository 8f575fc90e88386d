"""The command line does what Python does, and bad input gets one line, exit code 2, and leaves nothing behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from conftest import FIT, write_rows
from coterie.errors import shown
from coterie.methods import FAMILIES
from coterie.mixture import Mixture
from helpers import refused

PROMPT = "add 3 4"


def flags(settings: dict[str, object]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


@pytest.fixture
def fit(run, model_folder, train_file, tmp_path):
    """Fit with one thing changed; the output is in an empty folder."""

    def command(*words: object, **changes: object):
        settings = {"model": model_folder, "data": train_file, "output": tmp_path / "out" / "run", **FIT, **changes}
        return run("fit", "elrea", *flags(settings), *words)

    return command


def test_generate_prints_what_python_returns(run, run_folder, mixture):
    code, out, _ = run("generate", run_folder, PROMPT, "SPELL ABCD NOW", "--max-new-tokens", 6, "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        answer.record() for answer in mixture.generate([PROMPT, "SPELL ABCD NOW"], max_new_tokens=6)
    ]


def test_a_record_has_the_documented_fields(mixture):
    record = mixture.generate([PROMPT], max_new_tokens=3)[0].record()
    assert list(record) == ["prompt", "text", "token_ids", "logprobs", "finish_reason", "routing"]
    assert sum(record["routing"]["weights"].values()) == pytest.approx(1)


def test_several_answers_to_a_prompt_stand_side_by_side(run, run_folder):
    words = ["generate", run_folder, "add 3 4", "add 5 6", "--n", 2, "--temperature", 1, "--max-new-tokens", 8]
    code, out, _ = run(*words, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in found] == ["add 3 4", "add 3 4", "add 5 6", "add 5 6"]
    assert found[0]["token_ids"] != found[1]["token_ids"]


def test_streamed_text_is_the_text(run, run_folder, mixture):
    code, out, _ = run("generate", run_folder, PROMPT, "--max-new-tokens", 8, "--stream")
    assert code == 0 and out == shown(mixture.generate([PROMPT], max_new_tokens=8)[0].text, keep="\n\t") + "\n"


def test_sampling_with_a_seed_is_the_same_in_python(run, run_folder, mixture):
    code, out, _ = run("generate", run_folder, PROMPT, "--temperature", 1, "--seed", 5, "--max-new-tokens", 6, "--json")
    expected = mixture.generate([PROMPT], temperature=1.0, seed=5, max_new_tokens=6)[0]
    assert code == 0 and json.loads(out)["token_ids"] == list(expected.token_ids)


def test_how_tokens_are_drawn_is_told_in_flags(run, run_folder, mixture):
    options = {"temperature": 0.9, "min_p": 0.2, "presence_penalty": 1, "frequency_penalty": 0.5, "top_logprobs": 3}
    biases = ("--logit-bias", "9=-100", "--logit-bias", "20=2.5")
    code, out, _ = run("generate", run_folder, PROMPT, *flags(options), *biases, "--max-new-tokens", 6, "--json")
    (expected,) = mixture.generate(PROMPT, max_new_tokens=6, logit_bias={9: -100, 20: 2.5}, **options)
    assert code == 0 and json.loads(out) == expected.record()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--top-logprobs", 3), "--top-logprobs stands in the answers' JSON objects; add --json or --output"),
        (("--logit-bias", "9"), "--logit-bias: give a token id and what is added to its logit, such as 1734=-100"),
        (("--logit-bias", "99999=1"), "--logit-bias 99999: the model's tokens have the ids 0 to"),
        (("--min-p", 2), "--min-p: input should be less than or equal to 1, got 2"),
    ],
)
def test_how_tokens_cannot_be_drawn_is_told_in_one_line(run, run_folder, given, told):
    refused(run("generate", run_folder, PROMPT, *given), re.escape(told))


def test_route_prints_weights_and_similarities_by_name(run, run_folder, mixture):
    code, out, _ = run("route", run_folder, PROMPT, "--json")
    record = json.loads(out)
    routing = mixture.route([PROMPT])
    assert code == 0 and record["prompt"] == PROMPT
    assert record["weights"] == pytest.approx(routing.row(0), rel=1e-5)
    assert set(record["similarities"]) == {"cluster-0", "cluster-1", "cluster-2"}
    assert record["weights"]["base"] == pytest.approx(1 - max(record["similarities"].values()), rel=1e-5)


def test_many_prompts_come_from_a_file(run, run_folder, tmp_path):
    rows = [{"instruction": "add 1 2"}, {"messages": [{"role": "user", "content": "SPELL AB NOW"}]}]
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    code, out, _ = run("route", run_folder, "--input", file, "--json")
    assert code == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["add 1 2", "SPELL AB NOW"]


def test_inputs_of_prompts_join_as_those_that_the_mixture_was_fitted_on(run, mixture, tmp_path):
    file = write_rows(tmp_path / "prompts.jsonl", [{"instruction": "Add.", "input": "1 2"}])
    mixture.save_pretrained(tmp_path / "plain")
    record = tmp_path / "plain" / "mixture.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"input_template": "{input}: {instruction}"}))
    Mixture.from_pretrained(tmp_path / "plain", device="cpu").save_pretrained(tmp_path / "copy")  # keeps the template
    words = ("--input", file, "--json", "--device", "cpu")
    for folder, others, prompt in (
        ("copy", (), "1 2: Add."),
        ("copy", ("--input-template", r"{instruction}\n{input}"), "Add.\n1 2"),
        ("copy", ("--ignore-fields", "input,tools"), "Add."),
    ):
        code, out, _ = run("route", tmp_path / folder, *words, *others)
        assert code == 0 and json.loads(out)["prompt"] == prompt
    assert mixture.prompts.reading.record()["input_template"] == r"{instruction}\n\n{input}"


def test_another_router_is_a_flag(run, run_folder):
    code, out, _ = run("route", run_folder, PROMPT, "--json", "--router", "cluster-1")
    assert code == 0 and json.loads(out)["weights"] == {"base": 0, "cluster-0": 0, "cluster-1": 1, "cluster-2": 0}


def test_another_combiner_and_another_method_are_flags(run, grid_folder, grid):
    code, out, _ = run("generate", grid_folder, PROMPT, "--json", "--max-new-tokens", 4, "--combiner", "weights:svd:1")
    wanted = grid.own.replace(combiner="weights:svd:1").generate([PROMPT], max_new_tokens=4)[0]
    assert code == 0 and json.loads(out) == wanted.record()
    code, out, _ = run("generate", grid_folder, PROMPT, "--json", "--max-new-tokens", 4, "--method", "mole")
    wanted, found = grid.cell("mole").generate([PROMPT], max_new_tokens=4)[0], json.loads(out)
    assert code == 0 and found["token_ids"] == list(wanted.token_ids)
    assert found["routing"]["weights"] == pytest.approx(wanted.weights)  # sums over another bank round differently
    refused(
        run("generate", grid_folder, PROMPT, "--combiner", "weight"), "no combiner is called 'weight'. Did you mean"
    )
    refused(run("generate", grid_folder, PROMPT, "--method", "oracle"), "exists in `coterie eval` only")


def test_methods_are_listed_from_the_table(run):
    code, out, _ = run("methods", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    wanted = [(fitted, name) for fitted, family in FAMILIES.items() for name in family.methods]
    assert code == 0 and [(row["on"], row["method"]) for row in rows] == wanted
    assert rows[wanted.index(("elrea", "mole"))]["trains"] == ["gates"]
    heads, *lines = run("methods")[1].splitlines()
    assert heads.split() == ["on", "method", "combiner", "router", "bank"]
    assert [tuple(line.split()[:2]) for line in lines] == wanted


def test_extras_are_trained_by_their_own_command_and_taken_as_they_are(run, grid_folder, tmp_path):
    words = ["--methods", "lora-ensembles", "--device", "cpu"]
    code, out, _ = run("train-extras", grid_folder, *words, "--ensemble-size", 2)
    assert code == 0 and out.startswith(f"{grid_folder / 'methods' / 'seeds'}: seeds, 1 expert")
    refused(run("train-extras", grid_folder, *words), r"seeds was trained with --ensemble-size 2, not 4")
    data = write_rows(tmp_path / "test.jsonl", tiny.make_rows(3, seed=9))
    words = ["eval", grid_folder, "--data", data, "--no-generate", "--resamples", 100, *words]
    assert run(*words, "--output", tmp_path / "as-it-is")[0] == 0
    code, _, err = run(*words, "--output", tmp_path / "asked", "--ensemble-size", 3)
    assert code == 2 and "seeds was trained with --ensemble-size 2, not 3" in err


def test_the_evaluation_and_its_report(run, run_folder, tmp_path):
    data = write_rows(tmp_path / "test.jsonl", tiny.make_rows(9, seed=9))
    out_folder = tmp_path / "eval"
    words = ["--methods", "backbone,base,elrea,uniform-weights,moe-routing", "--max-new-tokens", 4]
    code, out, _ = run("eval", run_folder, "--data", data, "--output", out_folder, *words)
    assert code == 0 and "elrea" in out
    summary = json.loads((out_folder / "evaluation.json").read_text())
    assert summary["rows"] == 9 and summary["sources"] == ["pick", "spell", "sum"]
    assert sum(map(sum, (counts.values() for counts in summary["clusters"].values()))) == 36
    code, out, _ = run("report", out_folder)
    assert code == 0 and out.strip() == str(out_folder / "report.html")
    assert "<html" in (out_folder / "report.html").read_text()
    refused(run("eval", run_folder, "--data", data, "--output", out_folder), "exists; choose another --output")


def test_a_run_is_repeated_from_its_record(run, fit, tmp_path):
    assert fit()[0] == 0
    record = tmp_path / "out" / "run" / "run.yaml"
    copy = tmp_path / "again.yaml"
    copy.write_text(record.read_text().replace(str(tmp_path / "out" / "run"), str(tmp_path / "again")))
    assert run("run", copy)[0] == 0
    for name in ("experts/cluster-0/adapter_model.safetensors", "clusters.jsonl", "router/centroids.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / "run" / name).read_bytes()


BAD_DATA = {
    "empty": ("", r"holds no examples"),
    "broken": ('{"instruction": "a", "response": "b"}\n{"instruction": ', r"line 2 is not valid JSON"),
    "field": ('{"ask": "a"}\n', r"line 1 has the fields ask"),
    "response": ('{"instruction": "a", "response": " "}\n', r"line 1 has an empty response"),
    "prompt": ('{"instruction": "", "response": "b"}\n', r"line 1 has an empty prompt"),
    "few": ('{"instruction": "a", "response": "b"}\n', r"1 examples cannot make 3 clusters"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_refused(fit, tmp_path, kind):
    text, pattern = BAD_DATA[kind]
    (tmp_path / "bad.jsonl").write_text(text)
    refused(fit(data=tmp_path / "bad.jsonl"), pattern)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"max_length": 8}, r"all 36 examples are longer than 8 tokens .*raise --max-length"),
        ({"model": "smolm2-135m"}, r"no model folder or alias is called 'smolm2-135m'. Did you mean 'smollm2-135m'"),
        ({"data": "/nowhere.jsonl"}, r"/nowhere.jsonl does not exist"),
        ({"form": "adm"}, r"form"),
        ({"dropout": 2}, r"--dropout: .*less than 1, got 2"),
        ({"device": "quantum"}, r"device 'quantum' is not there"),
        ({"blocks": "last:7"}, r"blocks must be all or last:K with K from 1 to 2"),
        ({"clusters": 40}, r"36 examples cannot make 40 clusters"),
        ({"learning_rate": 1e30}, r"the training loss became"),
    ],
)
def test_bad_settings_are_refused(fit, tmp_path, changes, pattern):
    refused(fit(**changes), pattern)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_output_that_exists_is_kept_unless_overwriting_is_asked_for(fit, run, tmp_path):
    output = tmp_path / "out" / "run"
    output.mkdir(parents=True)
    (output / "precious.txt").write_text("mine")
    refused(fit(), r"run exists; choose another --output, or add --overwrite")
    refused(fit("--overwrite"), r"is not a run folder, so it is not replaced")
    assert (output / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["generate", "/nowhere", "hi"], r"there is no mixture folder /nowhere"),
        (["generate", "MIXTURE"], r"give prompts either as arguments or with --input"),
        (["generate", "MIXTURE", " "], r"prompt 1 is empty"),
        (["generate", "MIXTURE", "hi", "--json", "--stream"], r"use one of them"),
        (["generate", "MIXTURE", "hi", "--stream", "--n", "2", "--temperature", "1"], r"one answer while .*, not 2"),
        (["generate", "MIXTURE", "hi", "--n", "2"], r"at temperature 0 all 2 answers to a prompt are equal"),
        (["generate", "MIXTURE", "hi", "--n", "2", "--combiner", "texts"], r"makes one answer of 5 samples, not 2"),
        (["generate", "MIXTURE", "hi", "--every", "inf", "--cache", "keep"], r"--cache says how to re-route; add"),
        (["route", "MIXTURE", "hi", "--top-k-experts", "9"], r"between 1 and 4"),
        (["route", "MIXTURE", "hi", "--router", "cluster-9"], r"no router or expert is called 'cluster-9'"),
        (["eval", "MIXTURE", "--data", "DATA", "--output", "OUT", "--methods", "base,elera"], r"Did you mean 'elrea'"),
        (
            ["eval", "MIXTURE", "--data", "DATA", "--output", "OUT", "--methods", "elrea", "--control", "base"],
            r"no method to compare with",
        ),
        (["report", "/nowhere"], r"/nowhere"),
        (["run", "/nowhere.yaml"], r"run.yaml"),
        (["fit", "elrae"], r"elrea"),
        (["generate", "MIXTURE", "hi", "--top-q", "1"], r"--top-q"),
    ],
)
def test_bad_calls_are_refused(run, run_folder, train_file, tmp_path, words, pattern):
    places = {"MIXTURE": run_folder, "DATA": train_file, "OUT": tmp_path / "eval"}
    refused(run(*(places.get(word, word) for word in words)), pattern)
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_made_for_another_base_model_is_refused(run, mixture, tmp_path):
    mixture.save_pretrained(tmp_path / "copy")
    other = tiny.save_model(tmp_path / "other", seed=1)
    record = json.loads((tmp_path / "copy" / "mixture.json").read_text())
    record["base_model"]["id"] = str(other)
    (tmp_path / "copy" / "mixture.json").write_text(json.dumps(record))
    refused(run("generate", tmp_path / "copy", "hi"), r"was trained on .* but the base model loaded is")


def test_a_truncated_expert_is_refused(run, mixture, tmp_path):
    mixture.save_pretrained(tmp_path / "copy")
    file = tmp_path / "copy" / "experts" / "cluster-1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(run("generate", tmp_path / "copy", "hi"), r"cluster-1/adapter_model.safetensors is truncated")


def test_ctrl_c_is_one_line(run, run_folder, monkeypatch):
    def interrupted(*args: object, **kwargs: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(Mixture, "generate", interrupted)
    code, out, err = run("generate", run_folder, "hi")
    assert (code, out) == (130, "") and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("stopped")


def test_answers_are_written_over_nothing_that_is_there(run, run_folder, tmp_path):
    questions, answers = write_rows(tmp_path / "q.jsonl", [{"prompt": PROMPT}]), tmp_path / "answers.jsonl"
    words = ["generate", run_folder, "--input", questions, "--max-new-tokens", 2]
    for more in ((), ("--overwrite",)):
        refused(run(*words, "--output", questions, *more), "is or belongs to .*q.jsonl, which this call reads")
    inside = run_folder / "mixture.json"
    refused(run(*words, "--output", inside, "--overwrite"), "belongs to .*, which this call reads")
    assert run(*words, "--output", answers)[0] == 0
    before = answers.read_bytes()
    refused(run(*words, "--output", answers), "answers.jsonl exists; choose another --output, or add --overwrite")
    assert run(*words, "--output", answers, "--overwrite")[0] == 0 and answers.read_bytes() == before
    assert run(*words, "--output", "/dev/null")[0] == 0 and not Path("/dev/null").is_file()
    refused(run(*words, "--output", "/dev/full"), "no space left on the disk while writing /dev/full")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"command": "x" * 10_000}, "records 'xxx"),
        (
            {"settings": {"model": "m", "data": ["d"], "output": "o", "d_proj": 2**63}},
            "--d-proj: .* less than or equal",
        ),
    ],
)
def test_an_absurd_record_is_refused_in_one_short_line(change, told, run, tmp_path):
    record = tmp_path / "run.yaml"
    record.write_text(json.dumps({"command": "fit elrea", "settings": {}, **change}))
    code, _, err = run("run", record)
    assert code == 2 and re.search(told, err) and len(err) < 500 and err.count("\n") == 1


def test_a_record_alone_cannot_ask_to_overwrite_and_tells_first_what_it_does(run, run_folder, train_file, tmp_path):
    out = tmp_path / "eval"
    words = ["eval", run_folder, "--data", train_file, "--output", out, "--methods", "base", "--limit", 3]
    assert run(*words, "--no-generate")[0] == 0
    text = (out / "run.yaml").read_text()
    record = tmp_path / "strangers.yaml"
    record.write_text(text.replace("overwrite: false", "overwrite: true"))
    code, _, err = run("run", record)
    told = [f"{record}: coterie eval", f"  reads     mixture {run_folder}", f"  reads     data {train_file}"]
    assert code == 2 and err.splitlines()[:4] == [*told, f"  writes    {out}"]
    assert err.splitlines()[-1].endswith("eval exists; choose another --output, or add --overwrite to replace it")
    assert (out / "run.yaml").read_text() == text
    assert run("run", out)[2].splitlines()[-1] == err.splitlines()[-1]  # a run's folder stands for its record
    code, _, err = run("run", record, "--overwrite")
    assert code == 0 and err.splitlines()[3:5] == [f"  writes    {out}", f"  replaces  {out}"]


@pytest.mark.parametrize("output", ["MIXTURE", "AROUND THE MIXTURE", "AROUND THE DATA"])
def test_an_evaluation_deletes_neither_its_mixture_nor_its_data(output, run, run_folder, train_file, tmp_path):
    """As a run of the same command, so that nothing but what is in them keeps them."""
    words = ["eval", run_folder, "--data", train_file, "--methods", "base", "--limit", 3, "--no-generate"]
    assert run(*words, "--output", tmp_path / "out")[0] == 0
    shutil.copytree(run_folder, tmp_path / "out" / "methods" / "mixture")
    data = write_rows(tmp_path / "out" / "methods" / "test.jsonl", tiny.make_rows(3))
    inside = ["eval", tmp_path / "out" / "methods" / "mixture", "--data", train_file]
    words = {"MIXTURE": ["eval", tmp_path / "out", "--data", train_file], "AROUND THE MIXTURE": inside}.get(
        output, ["eval", run_folder, "--data", data]
    )
    refused(run(*words, "--output", tmp_path / "out", "--overwrite"), "is or holds .*, which this call reads")
    assert data.exists()


def test_a_report_is_written_over_no_other_page(run, run_folder, train_file, tmp_path):
    words = ["--methods", "base", "--limit", 3, "--no-generate", "--output", tmp_path / "out"]
    assert run("eval", run_folder, "--data", train_file, *words)[0] == 0
    page = tmp_path / "out" / "report.html"
    (tmp_path / ".bashrc").write_text("precious")
    page.symlink_to(tmp_path / ".bashrc")
    refused(run("report", tmp_path / "out"), "report.html exists and is another page; move it away, or add --overwrite")
    page.unlink()
    assert run("report", tmp_path / "out")[0] == run("report", tmp_path / "out")[0] == 0  # it is the same page
    page.write_text(page.read_text() + "<!-- mine -->")
    refused(run("report", tmp_path / "out"), "is another page")
    assert run("report", tmp_path / "out", "--overwrite")[0] == 0 and "mine" not in page.read_text()
    assert (tmp_path / ".bashrc").read_text() == "precious"


def test_domains_from_the_command_line(run, model_folder, tmp_path):
    """Fit, build from the fitted adapters, ask with weights drawn: the same numbers as in Python."""
    rows = tiny.make_rows(12, seed=4)
    files = [write_rows(tmp_path / f"{name}.jsonl", rows[n::2]) for n, name in enumerate(("law", "maths"))]
    named = [f"{name}={file}" for name, file in zip(("law", "maths"), files, strict=True)]
    common = ["--encoder", "hidden", "--every", 2, "--device", "cpu", "--routing-temperature", 0.2]
    data = [word for one in named for word in ("--data", one)]
    fitted = tmp_path / "fitted"
    words = ["--model", model_folder, *data, "--output", fitted, "--epochs", 1, "--learning-rate", 0.01, *common]
    code, out, _ = run("fit", "token-level", *words)
    assert code == 0 and out.strip() == f"{fitted}: 2 experts (law, maths)"
    adapters = [word for name in ("law", "maths") for word in ("--adapter", f"{name}={fitted}/experts/{name}")]
    texts = [word for one in named for word in ("--centroid-data", one)]
    code, out, _ = run("fit", "from-adapters", *adapters, *texts, "--output", tmp_path / "built", *common)
    assert code == 0 and out.strip() == f"{tmp_path / 'built'}: 2 experts (law, maths)"
    mixture = Mixture.from_pretrained(tmp_path / "built", device="cpu")
    code, out, _ = run("generate", tmp_path / "built", PROMPT, "--json", "--max-new-tokens", 5)
    assert code == 0 and json.loads(out) == mixture.generate([PROMPT], max_new_tokens=5)[0].record()
    wanted = mixture.rerouted(1, cache="recompute", combiner="weights").generate([PROMPT], max_new_tokens=5)[0]
    words = ["--every", 1, "--cache", "recompute", "--combiner", "weights"]
    code, out, _ = run("generate", tmp_path / "built", PROMPT, "--json", "--max-new-tokens", 5, *words)
    assert code == 0 and json.loads(out) == wanted.record()
    code, out, _ = run("generate", tmp_path / "built", PROMPT, "--show-weights", "--max-new-tokens", 5)
    lines = out.splitlines()
    assert code == 0 and lines[-6].split() == ["l", "law", "m", "maths"]
    for line, weights in zip(lines[-5:], mixture.generate([PROMPT], max_new_tokens=5)[0].trace.weights, strict=True):
        bar = line[17:57]
        assert bar.count("l") == pytest.approx(40 * weights[0], abs=1)
        assert bar == "l" * bar.count("l") + "m" * bar.count("m")
        assert line.endswith(f"{('law', 'maths')[weights[1] > weights[0]]} {max(weights):.2f}")
    code, out, _ = run("run", tmp_path / "built" / "run.yaml")
    refused((code, out, _), "exists; choose another --output")


def test_a_router_is_asked_for_by_its_name(run, grid_folder):
    mixture = Mixture.from_pretrained(grid_folder, device="cpu")
    code, out, _ = run("route", grid_folder, PROMPT, "--router", "loss", "--json")
    assert code == 0
    assert json.loads(out)["weights"] == pytest.approx(mixture.replace(router="loss").route([PROMPT]).row(0), abs=1e-5)
    for kind in ("arrow", "spectr", "gate"):  # which the mixture's own combiner does not follow, and one other does
        wanted = mixture.replace(router=kind, combiner="layers").generate([PROMPT], max_new_tokens=3)[0]
        assert mixture.replace(router=kind).generate([PROMPT], max_new_tokens=3)[0] == wanted
        code, out, _ = run("generate", grid_folder, PROMPT, "--router", kind, "--json", "--max-new-tokens", 3)
        assert code == 0 and json.loads(out) == wanted.record()
        code, out, _ = run("route", grid_folder, PROMPT, "--router", kind, "--json")
        assert code == 0 and json.loads(out)["weights"].keys() == wanted.weights.keys()
    refused(
        run("generate", grid_folder, PROMPT, "--router", "arrow", "--combiner", "logits"),
        "'arrow' gives them anew at every layer; use layers",
    )
    refused(
        run("route", grid_folder, PROMPT, "--router", "similarity"), "has no router 'similarity'. There are: ariadne"
    )
    refused(
        run("route", grid_folder, PROMPT, "--router", "los"),
        "no router or expert is called 'los'. Did you mean 'loss'[?] There are: ariadne, arrow, avengers, base, "
        "cluster-0, cluster-1, cluster-2, distilled, gate, gradient-centroids, logo, lorauter, loss, membership, "
        "performance-centroids, prefill, refusal, spectr, uniform",
    )


def test_rerouting_flags_that_do_not_fit_are_refused(run, run_folder):
    refused(run("generate", run_folder, PROMPT, "--cache", "keep"), "--cache says how to re-route; add --every")
    refused(
        run("generate", run_folder, PROMPT, "--every", 0), "--every: give a number of tokens from 1 upwards, or inf"
    )
    refused(run("generate", run_folder, PROMPT, "--every", 2), "use layers or weights")
    code, out, _ = run("generate", run_folder, PROMPT, "--every", 2, "--combiner", "layers", "--max-new-tokens", 2)
    assert code == 0 and out.strip()
    refused(run("generate", run_folder, PROMPT, "--json", "--show-weights"), "use one of them")
    code, out, _ = run("generate", run_folder, PROMPT, "--show-weights", "--max-new-tokens", 2)
    assert code == 0 and out.splitlines()[-1].startswith("(every token)")


SPINNING = """
import ctypes, glob, importlib.util, os, sys
from coterie.cli.process import bound_spinning
bound_spinning()
assert "torch" not in sys.modules
library, = glob.glob(os.path.join(os.path.dirname(importlib.util.find_spec("torch").origin), "lib", "libgomp*"))
ctypes.CDLL(library)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP comes with torch on Linux")
@pytest.mark.parametrize(
    ("own", "spins", "policy"),
    [
        ({}, "10000", "PASSIVE"),
        ({"GOMP_SPINCOUNT": "7"}, "7", "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None, "ACTIVE"),
    ],
)
def test_threads_wait_for_a_bounded_time_unless_the_user_says_how(own, spins, policy):
    """GNU OpenMP itself tells, as it is loaded, what it was told."""
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env = {**kept, **own, "OMP_DISPLAY_ENV": "VERBOSE"}
    result = subprocess.run([sys.executable, "-c", SPINNING], env=env, capture_output=True, text=True, check=True)
    told = dict(re.findall(r"(GOMP_SPINCOUNT|OMP_WAIT_POLICY) = '(\w+)'", result.stderr))
    assert told["OMP_WAIT_POLICY"] == policy
    assert spins is None or told["GOMP_SPINCOUNT"] == spins


def test_a_command_bounds_the_waiting_of_threads_before_it_runs(run, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    run("methods")
    assert os.environ.pop("GOMP_SPINCOUNT") == "10000"
