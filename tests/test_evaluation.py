"""An evaluation measures what each method would measure alone, and its records tell what it did."""

import json

import pytest
import torch

import tiny
from conftest import GRID, write_rows
from coterie import evaluate
from coterie.artifacts import read_json, read_run_record
from coterie.combiners.texts import majority
from coterie.combiners.weights import WeightCombiner
from coterie.data.examples import load_examples
from coterie.engine.text import TextStream
from coterie.errors import CoterieError
from coterie.evaluation import compare
from coterie.evaluation import shared_scores as routed
from coterie.evaluation.answers import TestRow, answer
from coterie.evaluation.clusters import cluster_records, feature_map
from coterie.evaluation.compare import run_evaluation
from coterie.evaluation.shared_scores import SharedRouting, score_methods
from coterie.methods.elrea.methods import METHODS
from coterie.methods.registry import FAMILIES
from coterie.mixture import Mixture
from coterie.routers.base import Routing
from coterie.settings.commands import EvaluationSettings
from coterie.settings.groups import SamplingSettings
from coterie.settings.reading import checked, from_flat
from helpers import same_answers

EXAMPLES = load_examples(tiny.make_rows(9, seed=21))
NAMES = [*METHODS, "elrea:top_k=1", "elrea:d_proj=64"]
SETTINGS = {**GRID.model_dump(), "max_new_tokens": 5, "resamples": 100}


@pytest.fixture(scope="module")
def result(grid_folder):
    return evaluate(Mixture.from_pretrained(grid_folder, device="cpu"), EXAMPLES, methods=NAMES, **SETTINGS)


@pytest.fixture(scope="module")
def scored(grid):
    rows = [grid.own.prompts.row(example) for example in EXAMPLES]
    return rows, score_methods(grid, rows, NAMES)


def test_every_method_of_the_table_is_in_the_records(result):
    assert result.summary["methods"] == NAMES
    assert {row["method"] for row in result.summary["table"]} == set(NAMES)
    assert all(set(row["methods"]) == set(NAMES) for row in result.rows)
    json.dumps([result.summary, result.rows], allow_nan=False)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("self-consistency", "oracle", "random-oracle")]
)
def test_scores_of_the_shared_pass_are_those_of_a_method_alone(grid, scored, name):
    rows, found = scored
    cell = grid.cell(name)
    routing = cell.router.route([row.prompt() for row in rows])
    alone = cell.score_rows(rows, routing, name)
    torch.testing.assert_close(found.nll[name], alone.nll[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(found.tokens, alone.tokens)


def test_the_oracle_has_the_smallest_loss_of_the_fitted_experts_in_every_row(grid, scored):
    rows, found = scored
    alone = torch.stack(
        [
            cell.score_rows(rows, cell.router.route(rows), name).nll[0]
            for name in grid.fitted
            for cell in [single(grid, name)]
        ]
    )
    torch.testing.assert_close(found.expert_nll.T, alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.nll["oracle"], alone.min(dim=0).values, rtol=1e-3, atol=1e-4)
    chosen = found.routed["oracle"].routing.weights.argmax(dim=1)
    assert torch.equal(chosen, found.expert_nll.argmin(dim=1))


def test_the_oracle_of_random_clusters_has_the_smallest_loss_of_their_experts_and_the_base(grid, scored):
    rows, found = scored
    experts = ["base", *grid.extras["random-clusters"].bank.names]
    cells = [single(grid, name) for name in experts]
    alone = torch.stack([cell.score_rows(rows, cell.router.route(rows), "").nll[0] for cell in cells])
    torch.testing.assert_close(found.nll["random-oracle"], alone.min(dim=0).values, rtol=1e-3, atol=1e-4)
    assert found.routed["random-oracle"].routing.experts == tuple(experts)


def single(grid, name):
    return grid.mixture.replace(router=name, combiner="logits")


def test_all_cells_share_one_stack_of_the_bank(grid):
    assert len({id(grid.cell(name).layers) for name in NAMES}) == 1


def test_prompts_are_described_once_for_all_routers_of_one_description(grid):
    counted = []
    extractor = grid.own.router.extractor
    original = extractor.extract
    object.__setattr__(extractor, "extract", lambda rows: counted.append(len(rows)) or original(rows))
    try:
        shared, found = SharedRouting(grid.own.tokens(["add 3 4", "SPELL AB NOW"])), {}
        for name in ("elrea", "elrea:top_k=1", "elrea:d_proj=64", "moe-routing", "elrea-refusing"):
            found[name] = shared(grid.cell(name).router).routing.weights
        assert counted == [2]
        for name, weights in found.items():
            assert torch.equal(weights, grid.cell(name).router.route(shared.prompts).weights)
    finally:
        object.__setattr__(extractor, "extract", original)


def test_answers_are_those_that_the_method_gives_by_itself(grid, result):
    for name in ("elrea", "mole", "moe-merging", "per-dataset"):
        alone = grid.cell(name).generate(EXAMPLES, max_new_tokens=5)
        assert [row["methods"][name]["text"] for row in result.rows] == [given.text for given in alone]


def test_an_evaluation_measures_the_answers_that_the_method_gives_by_itself_where_samples_vote(grid):
    """The vote looks at the samples alone; the reference must not help what is right to be read alike."""
    cell = grid.cell("self-consistency")
    tests = [TestRow(example, example) for example in EXAMPLES]
    routing = cell.router.route(grid.own.tokens(EXAMPLES))
    found = answer(cell, tests, routing, "x", 4, SamplingSettings(max_new_tokens=4, seed=2)).completions
    same_answers(found, cell.generate(EXAMPLES, max_new_tokens=4, seed=2))


def test_the_majority_wins_and_ties_fall_evenly_and_by_seed():
    assert majority(["b", "a", "a", "c"]) == 1
    found = [majority(["a", "b", "b", "a", "c"], seed) for seed in range(200)]
    assert found == [majority(["a", "b", "b", "a", "c"], seed) for seed in range(200)]
    assert set(found) == {0, 1} and 60 < found.count(0) < 140
    with pytest.raises(ValueError, match="no vote was cast"):
        majority([])


def test_methods_that_only_answer_have_no_likelihood(result):
    entries = [row["methods"]["self-consistency"] for row in result.rows]
    assert all(entry["nll"] is None and entry["tokens"] == 0 and entry["text"] is not None for entry in entries)


def test_the_error_of_the_merge_is_recorded(grid, result, scored):
    weights = scored[1].routed["moe-merging"].routing.aligned(grid.mixture.bank.names).weights
    cell = grid.cell("moe-merging")
    assert isinstance(cell.combiner, WeightCombiner)
    errors = [cell.layers.merge_error(tuple(row), "factors") for row in weights.tolist()]
    assert result.summary["merge_error"] == {"moe-merging": pytest.approx(sum(errors) / len(errors))}


def test_memory_counts_the_base_the_experts_that_run_and_the_cache_of_their_rows(grid, result):
    memory, model = result.summary["memory"], grid.mixture.backbone.model
    base = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    adapter = 4 * sum(pair.down.numel() + pair.up.numel() for pair in grid.own.bank.adapters[0].values())
    rows = [grid.own.prompts.row(example) for example in EXAMPLES]
    cache = 4 * 2 * tiny.LAYERS * 2 * (tiny.WIDTH // 4) * round(sum(len(row.ids) for row in rows) / len(rows))
    assert memory["backbone"] == round(base + cache)
    assert memory["base"] == round(base + adapter + cache)
    assert memory["uniform-weights"] == round(base + 4 * adapter + 4 * cache)
    assert memory["moe-routing"] == round(base + 4 * adapter + cache)


def test_training_is_counted_for_the_methods_that_need_it(grid, result):
    seconds = result.summary["seconds"]
    assert "train" not in seconds["elrea"] and "train" not in seconds["moe-merging"]
    assert seconds["mole"]["train"] == grid.extras["gates"].seconds > 0
    parts = [read_json(grid.own.folder / f"methods/{name}/ingredient.json") for name in ("loss", "judged", "unlike")]
    assert seconds["loss-routing"]["train"] == pytest.approx(sum(part["seconds"] for part in parts))


@pytest.mark.parametrize("named", [None, "elrea"])
def test_the_control_is_the_simple_rival_that_does_best_unless_it_is_named(grid, named):
    """`backbone` and `base` are one model each; the loss of their references is all that is measured here."""
    names = ["uniform-weights", "backbone", "elrea", "base"]
    found = evaluate(grid.own, EXAMPLES, methods=names, control=named, generate=False, resamples=100)
    lines = by_method(found.summary["table"])
    best = min(("backbone", "base"), key=lambda name: lines[name]["nll"])
    assert found.record.control == (named or best)
    assert found.record.control_among == (() if named else ("backbone", "base"))
    least = min(line["nll_p"] for line in lines.values() if line["nll_p"] is not None)
    assert named or least >= 2 * 2 / 2**9  # nine rows allow 2 / 2**9, and the choice between two doubles it
    assert ("the strongest of 2 simple rivals" in str(found).replace("\n", " ")) is not bool(named)


def test_simple_rivals_are_one_expert_or_the_untouched_base_model():
    simple = {name: family.simple_rivals(family.methods) for name, family in FAMILIES.items()}
    assert simple["elrea"] == ["backbone", "base", "one-lora-same-budget", "best-single"]
    assert simple["token-level"] == ["backbone"]
    assert simple["kshot-moe"] == ["backbone", "best-by-shots", "best-tuned"]
    assert FAMILIES["elrea"].simple_rivals(["expert:a", "oracle", "base"]) == ["expert:a", "base"]


def test_what_is_scored_together_has_one_time_for_all_and_none_of_its_own(result):
    (shared,) = result.summary["shared_seconds"]
    scored = {name for name, line in by_method(result.summary["table"]).items() if line["nll"] is not None}
    alone = {name for name, stages in result.summary["seconds"].items() if "score" in stages}
    assert shared["stage"] == "score" and shared["seconds"] > 0
    assert {"backbone", "base", "elrea", "oracle"} <= set(shared["methods"]) and alone == {
        "moe-routing",
        "moe-merging",
        "mole",
        "logo",
    }
    assert set(shared["methods"]) == scored - alone


def test_the_mean_length_of_answers_is_recorded(result):
    tokens = result.summary["answer_tokens"]
    assert set(tokens) == set(NAMES) and all(0 < mean <= 5 for mean in tokens.values())


def by_method(table):
    return {line["method"]: line for line in table if line["source"] == "all"}


def test_weights_are_averaged_over_the_rows_of_a_source(result):
    for source, means in result.summary["routing"].items():
        rows = [row["weights"] for row in result.rows if row["source"] == source]
        assert means == pytest.approx({name: sum(row[name] for row in rows) / len(rows) for name in means})


def test_the_map_has_a_point_a_row_and_the_clusters_of_several_seeds(grid_folder, caplog):
    caplog.set_level("INFO")
    found = feature_map(grid_folder)
    assert caplog.text == ""  # nobody has asked for these clusters
    assert found.kind == "t-SNE" and found.seeds == (0, 1, 2)
    assert len(found.points) == 36
    assert all(len(point.clusters) == 3 for point in found.points)
    assert found.stability == pytest.approx(1) and found.agreement == pytest.approx((1, 1, 1))
    assert cluster_records(grid_folder)["composition"]["cluster-0"] == {"sum": 12}


def test_without_a_folder_there_is_no_map():
    assert feature_map(None) is None
    assert cluster_records(None) == {"clusters": {}, "composition": {}, "clustering": {}}


def test_rows_with_tests_need_a_word_about_running_code(mixture):
    rows = [{**tiny.make_rows(1)[0], "tests": {"entry_point": "f", "test_list": ["assert f() == 1"]}}]
    with pytest.raises(CoterieError, match="1 rows are graded by running the code that the methods write; add --allow"):
        evaluate(mixture, load_examples(rows), methods=["base"])
    found = evaluate(mixture, load_examples(rows), methods=["base"], allow_code_execution=False, max_new_tokens=3)
    assert found.rows[0]["methods"]["base"]["correct"] is None
    assert found.summary["notes"] == ["1 rows bring tests of code, which was not run: they are not graded."]


def test_code_is_graded_by_its_tests_where_that_is_allowed(mixture, monkeypatch):
    rows = [{**tiny.make_rows(1)[0], "tests": {"entry_point": "f", "test_list": ["assert f(2) == 4"]}}]
    for code, is_right in (("def f(x):\n    return x * x", True), ("def f(x):\n    return x + 1", False)):
        monkeypatch.setattr(TextStream, "push", lambda self, token: "")
        monkeypatch.setattr(TextStream, "finish", lambda self, code=code: code)
        found = evaluate(mixture, load_examples(rows), methods=["base"], allow_code_execution=True, max_new_tokens=1)
        entry = found.rows[0]["methods"]["base"]
        assert (entry["correct"], entry["extracted"]) == (is_right, code)
        assert "was run in a limited child process" in found.summary["notes"][0]


def test_solved_examples_stand_before_every_question(mixture, tmp_path):
    shots = write_rows(tmp_path / "shots.jsonl", tiny.make_rows(6, seed=50))
    plain = evaluate(mixture, EXAMPLES[:3], methods=["base"], generate=False)
    found = evaluate(mixture, EXAMPLES[:3], methods=["base"], generate=False, few_shot=[str(shots)], few_shot_count=1)
    assert [row["prompt"] for row in found.rows] == [row["prompt"] for row in plain.rows]
    assert [row["methods"]["base"]["nll"] for row in found.rows] != [
        row["methods"]["base"]["nll"] for row in plain.rows
    ]
    assert "1.0 on average" in found.summary["notes"][0]
    none = evaluate(
        mixture,
        EXAMPLES[:3],
        methods=["base"],
        generate=False,
        few_shot=[str(shots)],
        few_shot_count=1,
        longest_prompt=8,
    )
    assert "3 rows have none" in none.summary["notes"][0]
    assert [row["methods"]["base"]["nll"] for row in none.rows] == [row["methods"]["base"]["nll"] for row in plain.rows]


def test_a_data_set_without_an_adapter_is_told_before_anything_is_trained(mixture, run_folder, tmp_path):
    strange = load_examples([{**tiny.make_rows(1)[0], "source": "elsewhere"}])
    with pytest.raises(CoterieError, match="per-dataset has no adapter for the source 'elsewhere'"):
        evaluate(mixture, strange, methods=["base", "per-dataset"])
    assert not (run_folder / "methods").exists()


def test_all_methods_of_strange_rows_leave_that_one_out(grid_folder, tmp_path):
    data = write_rows(tmp_path / "test.jsonl", [{**row, "source": "elsewhere"} for row in tiny.make_rows(3)])
    flat = {**GRID.model_dump(), "mixture": str(grid_folder), "data": [str(data)], "output": str(tmp_path / "eval")}
    settings = from_flat(EvaluationSettings, {**flat, "methods": "all", "generate": False, "device": "cpu"})
    assert run_evaluation(settings).summary["methods"] == [
        name for name in METHODS if name not in ("per-dataset", "auto")
    ]
    assert (tmp_path / "eval" / "rows.jsonl").exists()


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(grid_folder, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "test.jsonl", tiny.make_rows(6, seed=4))

    def settings(output):
        flat = {"mixture": str(grid_folder), "data": [str(data)], "output": str(tmp_path / output), "device": "cpu"}
        names = "base,elrea,moe-routing,self-consistency"
        return from_flat(EvaluationSettings, {**flat, "methods": names, "max_new_tokens": 4, "resamples": 100})

    whole = run_evaluation(settings("whole"))
    calls = []
    original = compare.answer

    def counted(cell, tests, routing, label, *rest):
        calls.append(label)
        if calls == ["base", "elrea", "moe-routing"]:
            raise KeyboardInterrupt
        return original(cell, tests, routing, label, *rest)

    monkeypatch.setattr(compare, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(settings("parts"))
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(routed, "score_votes", None)  # what was scored is not scored again
    again = run_evaluation(settings("parts"))
    assert calls[3:] == ["moe-routing", "self-consistency"]
    assert again.rows == whole.rows
    assert again.summary["table"] == whole.summary["table"]
    left = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert left == ["cached", "evaluation.json", "rows.jsonl", "run.yaml", "stages.jsonl"]


def test_the_record_repeats_where_extras_were_trained_in_another_way(grid_folder, tmp_path):
    """The grid's ensemble has 2 members, the default is 4: nobody asked, so the record must not ask either."""
    test = write_rows(tmp_path / "test.jsonl", tiny.make_rows(3, seed=9))
    names = {"mixture": str(grid_folder), "data": [str(test)], "methods": "base,lora-ensembles", "generate": False}
    first = run_evaluation(from_flat(EvaluationSettings, {**names, "output": str(tmp_path / "one"), "resamples": 100}))
    record = read_run_record(tmp_path / "one" / "run.yaml")["settings"]
    assert record["extras"] is None
    again = run_evaluation(checked(EvaluationSettings, {**record, "output": str(tmp_path / "two")}))
    assert again.summary["table"] == first.summary["table"]
    asked = {**names, "output": str(tmp_path / "three"), "resamples": 100, "judge_folds": 2}
    run_evaluation(from_flat(EvaluationSettings, asked))
    record = read_run_record(tmp_path / "three" / "run.yaml")["settings"]
    assert record["extras"] == {"judge_folds": 2}, "one was asked for, the others not"
    run_evaluation(checked(EvaluationSettings, {**record, "output": str(tmp_path / "four")}))


def test_a_setting_that_does_not_exist_is_told(mixture):
    with pytest.raises(CoterieError, match="no setting is called 'max_token'. Did you mean 'max_new_tokens'"):
        evaluate(mixture, EXAMPLES, max_token=3)


def test_a_routing_keeps_its_gates_when_requests_are_taken(grid):
    routing = grid.router("gates").route(grid.own.tokens(["add 3 4", "SPELL AB NOW"]))
    assert routing.take([1]).gates is routing.gates
    assert isinstance(routing, Routing)
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(2))


def test_a_method_that_is_added_to_an_evaluation_answers_alone(grid_folder, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "test.jsonl", tiny.make_rows(3, seed=5))

    def evaluated(output: str, names: str, **more: object):
        flat = {"mixture": str(grid_folder), "data": [str(data)], "output": str(tmp_path / output), "device": "cpu"}
        flat |= {"methods": names, "max_new_tokens": 4, "resamples": 100, **more}
        return run_evaluation(from_flat(EvaluationSettings, flat))

    evaluated("run", "base,elrea")
    answered, original = [], compare.answer
    monkeypatch.setattr(compare, "answer", lambda *given: answered.append(given[3]) or original(*given))
    added = evaluated("run", "base,elrea,moe-routing", overwrite=True, control="elrea")
    assert answered == ["moe-routing"]
    fresh = evaluated("fresh", "base,elrea,moe-routing", control="elrea")
    assert added.rows == fresh.rows
    answered.clear()
    evaluated("run", "base,elrea", overwrite=True, max_new_tokens=3)
    assert answered == ["base", "elrea"]
