"""`coterie fit auto` trains, judges, compares and writes a mixture of what evidence chose, with its reasons."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import coterie
from conftest import FIT
from coterie.artifacts import write_tensors
from coterie.errors import CoterieError
from coterie.evaluation import auto, candidates
from coterie.evaluation.choice import Candidate, choose
from coterie.evaluation.clusters import feature_map
from coterie.experts.names import BASE
from coterie.methods import common
from coterie.methods.elrea import fit, refusing
from coterie.methods.elrea.extras import EXTRAS
from coterie.methods.elrea.refusing import FEATURES, unlike_rows
from coterie.methods.elrea.run import ElreaRun, within_budget
from coterie.methods.extras import load_extra, prepare_extras
from coterie.methods.registry import make_grid
from coterie.mixture import Mixture
from coterie.records.auto import AutoRecord
from coterie.routers.centroid import CentroidRouter
from coterie.routers.fixed import FixedRouter
from coterie.routers.loss import CrossFitLosses
from coterie.routers.refusal import RefusalRouter
from coterie.settings.groups import ExtrasSettings
from helpers import pairs_that_gain_nothing


@pytest.fixture(scope="module")
def folder(model_folder, train_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("auto") / "run"
    coterie.auto(str(model_folder), str(train_file), output=output, device="cpu", **FIT)
    return output


@pytest.fixture(scope="module")
def opened(folder) -> ElreaRun:
    return ElreaRun.open(Mixture.from_pretrained(folder, device="cpu"), ExtrasSettings())


def test_what_was_chosen_is_written_with_its_reasons_and_the_mixture_does_it(folder):
    record = AutoRecord.model_validate(json.loads((folder / "auto.json").read_text()))
    mixture = Mixture.from_pretrained(folder, device="cpu")
    assert mixture.method == "auto"
    assert mixture.combiner.kind == record.combiner
    if record.chosen == BASE:
        assert isinstance(mixture.router, FixedRouter) and mixture.router.weights[BASE] == 1
    else:
        assert isinstance(mixture.router, RefusalRouter)
    page = (folder / "auto.md").read_text()
    assert page == record.page()
    assert all(sentence in page for sentence in record.sentences)
    names = [one.name for one in record.candidates]
    assert names[0] == BASE and {"uniform", "elrea", "elrea:top_k=1", "membership", "loss", "prefill"} <= set(names)
    assert {"avengers", "lorauter", "ariadne", "avengers:top_k=1"} <= set(names) and "ariadne:top_k=1" not in names
    assert not (folder / "working").exists()


def test_what_is_chosen_is_what_the_losses_say(folder, opened):
    """The record's losses are those of the mixtures that the candidates' weights make of the judged experts."""
    record = AutoRecord.model_validate(json.loads((folder / "auto.json").read_text()))
    losses = opened.losses
    ways = list(candidates.ways(opened, losses, 0.1))
    again = choose([Candidate(w.name, w.cost, losses.mixture_nll(w.weights)) for w in ways], losses.tokens)
    assert record.outweighed or again.chosen == record.chosen
    for one, other in zip(again.compared, record.candidates, strict=True):
        assert (one.candidate.name, one.nll) == (other.name, pytest.approx(other.nll, abs=1e-6))
    for way in ways:
        torch.testing.assert_close(way.weights.sum(dim=1), torch.ones(len(losses.tokens)))


def test_methods_of_its_family_work_on_the_run_and_elrea_is_still_elreas_routing(opened):
    grid = make_grid(opened.mixture, ["base", "elrea", "auto", "loss-routing"])
    assert grid.cell("elrea").router.kind == "gradient-centroids"
    assert grid.cell("auto").router is opened.mixture.router
    assert grid.cell("auto").combiner.kind == opened.mixture.combiner.kind


def test_where_one_expert_is_the_best_everywhere_it_is_not_asked_for_its_two_largest_weights(opened, monkeypatch):
    def trained(run, name, original=candidates._trained):
        found = original(run, name)
        if name == "performance":
            found = CentroidRouter.by_performance(found.features, {"cluster-0": torch.ones(1, run.features.shape[1])})
        return found

    monkeypatch.setattr(candidates, "_trained", trained)
    losses = opened.losses
    names = {way.name for way in candidates.ways(opened, losses, 0.1)}
    assert "performance" in names and not {"performance:top_k=1", "performance:top_k=2"} & names
    assert {"elrea:top_k=1", "elrea:top_k=2"} <= names


def test_an_evaluation_of_its_run_has_the_map_of_its_clusters(folder):
    found = feature_map(folder)
    assert found is not None and found.seeds == (0, 1, 2)


def test_an_interrupted_run_ends_with_the_same_choice(folder, model_folder, train_file, tmp_path, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(auto, "choose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            coterie.auto(str(model_folder), str(train_file), output=output, device="cpu", **FIT)
    for place in (fit, common):
        monkeypatch.setattr(place, "train_adapter", lambda *_: pytest.fail("the adapters were there already"))
    coterie.auto(str(model_folder), str(train_file), output=output, device="cpu", **FIT)
    for name in ("auto.json", "auto.md", "mixture.json"):
        assert (output / name).read_text() == (folder / name).read_text()


def test_a_saved_copy_keeps_the_reasons(folder, tmp_path):
    Mixture.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "auto.md").read_text() == (folder / "auto.md").read_text()


# ------------------------------------------------------------------------------------- made-up losses, known answers


def made_up(opened: ElreaRun, planted: float) -> CrossFitLosses:
    """Losses of experts that are good at the rows of their own clusters by `planted` nats, and else noise."""
    names, labels = opened.mixture.bank.names, torch.tensor(opened.labels)
    generator = torch.Generator().manual_seed(0)
    nll = 2 + 0.3 * torch.randn(len(labels), 1, generator=generator).abs()
    nll = nll + 0.02 * torch.randn(len(labels), len(names), generator=generator)
    for place, name in enumerate(names):
        if name != BASE:
            nll[labels == int(name.rpartition("-")[2]), place] -= planted
    pairs = pairs_that_gain_nothing(nll)
    return CrossFitLosses(names, nll, pairs, torch.full((len(labels),), 10.0))


def chosen(opened: ElreaRun, losses: CrossFitLosses) -> str:
    ways = list(candidates.ways(opened, losses, 0.1))
    return choose([Candidate(w.name, w.cost, losses.mixture_nll(w.weights)) for w in ways], losses.tokens).chosen


def test_routing_is_chosen_where_experts_are_good_at_their_own_rows(opened):
    assert chosen(opened, made_up(opened, 0.5)) not in (BASE, "uniform", "best-single")


def test_the_base_is_chosen_where_experts_are_noise(opened):
    assert chosen(opened, made_up(opened, 0.0)) == BASE


@pytest.mark.parametrize("harm", [0.5, -0.5])
def test_the_single_best_expert_refuses_unlike_rows_where_it_harms_them(opened, monkeypatch, harm):
    """Alone it would be the cheapest of all that beat the base adapter, whatever it does to strangers."""

    def beside_base(losses: CrossFitLosses, more: float) -> CrossFitLosses:
        nll = losses.nll.clone()
        nll[:, losses.experts.index("cluster-0")] = nll[:, losses.experts.index(BASE)] + more
        return replace(losses, nll=nll, pairs=pairs_that_gain_nothing(nll))

    losses, unlike = beside_base(made_up(opened, 0.0), -0.5), unlike_rows(opened)
    monkeypatch.setattr(refusing, "unlike_rows", lambda run: unlike._replace(losses=beside_base(unlike.losses, harm)))
    single = next(way for way in candidates.ways(opened, losses, 0.1) if way.name == "best-single")
    assert isinstance(single.router, RefusalRouter) and single.cost > 1
    assert single.router.router.weights["cluster-0"] == 1
    refused, count = single.router.refused, len(losses.nll)
    if harm > 0:
        assert refused["inside"] == pytest.approx(int(0.1 * count) / count) and refused["outside"] > 0.9
    else:
        assert refused == {"inside": 0.0, "outside": 0.0}


@pytest.mark.parametrize(("more", "combiner"), [(0.001, "layers"), (0.1, "logits")])
def test_logits_which_run_a_row_for_each_expert_are_taken_where_the_layers_lose_a_tenth_of_the_gain(
    opened, monkeypatch, more, combiner
):
    """Every row gains 0.2 nats a token in the layers, and more in the logits: the difference is always significant."""
    losses = opened.losses
    base = losses.nll[:, losses.experts.index(BASE)]
    tried = {way.name: way for way in candidates.ways(opened, losses, 0.1)}
    gains = {"layers": 0.2, "logits": 0.2 + more}
    monkeypatch.setattr(auto, "_scored", lambda run, weights, losses, name: base - gains[name])
    choice = choose([Candidate(BASE, 1.0, base), Candidate("uniform", 1.5, base - 0.3)], losses.tokens)
    assert choice.chosen == "uniform"
    record = auto._recorded(choice, tried, opened, losses, opened.settings)
    assert record.combiner == combiner
    assert record.expected == pytest.approx(-gains[combiner], abs=1e-5)


def recorded(**facts) -> AutoRecord:
    candidates = [
        {"name": "base", "cost": 1.0, "nll": 1.2, "difference": 0.0, "p": 0.001},
        {"name": "loss:top_k=1", "cost": 3.5, "nll": 1.1, "difference": -0.1, "interval": [-0.12, -0.08], "p": 1.0},
    ]
    return AutoRecord.model_validate(
        {"combiner": "layers", "rows": 9, "trained_tokens": 1, "candidates": candidates, **facts}
    )


def test_the_reasons_are_plain_sentences():
    chosen = {"chosen": "loss:top_k=1", "expected": -0.09, "interval": [-0.11, -0.07], "p": 0.0002}
    told = recorded(**chosen, refused={"inside": 0.02, "outside": 0.9}).sentences
    assert told == (
        "Chosen: routing by the loss that the prompt's gradient predicts for each expert, the 1 largest weight only, "
        "with the experts mixed in the layers.",
        "It is the best of all that were tried.",
        "On held-out rows the loss changes by -0.0900 nats a token against the base adapter (95% interval -0.1100 to "
        "-0.0700, p < 0.001); the choice was made on the same rows, so expect a little less.",
        "A request costs about 3.50 times what one adapter costs.",
        "Prompts unlike the data go to the base adapter, and where that tells too little, those like rows on which "
        "nothing was gained: 2.0% of the rows here, 90.0% of the unlike ones.",
    )
    warned = recorded(**chosen, refused={"inside": 0.02, "outside": 0.4}).sentences
    assert warned[-2].endswith("40.0% of the unlike ones.") and warned[-1].startswith(
        "Most unlike ones look like the data"
    )
    single = {"name": "best-single", "cost": 1.0, "nll": 1.15, "difference": -0.05, "p": 0.2}
    found = recorded(chosen="best-single")
    alone = found.model_copy(update={"candidates": (*found.candidates, found.candidates[0].model_validate(single))})
    assert alone.sentences[0] == "Chosen: the single best expert for everything."
    assert recorded(chosen="base").sentences[0] == "No mixture helps here: use the base adapter."
    assert "not significantly better when it was scored" in recorded(chosen="base", outweighed=True).sentences[1]


# --------------------------------------------------------------------------------------------------------- the budget


def test_a_budget_bounds_the_tokens_that_are_trained_on(opened):
    """Each row is trained on for two epochs and one, in the final fit and in all folds but one."""
    kept = opened.kept
    times = opened.settings.passes
    assert times == 3 * opened.settings.judge_folds
    every = times * sum(len(row.ids) for row in kept.rows)
    for budget in (every // 2, every - 1):
        settings = opened.settings.model_copy(update={"budget": budget})
        some = within_budget(kept, settings)
        assert times * sum(len(row.ids) for row in some.rows) <= budget
        assert 0.8 * budget < times * sum(len(row.ids) for row in some.rows)
        ids = [int(example.id[1:]) for example in some.examples]
        assert ids == sorted(ids)
    everything = within_budget(kept, opened.settings.model_copy(update={"budget": every}))
    assert list(everything.rows) == list(kept.rows)


def test_too_few_rows_to_judge_are_refused_at_once(model_folder, train_file, tmp_path):
    told = "10 examples are too few to judge 3 clusters in 4 folds; give 12 or more"
    with pytest.raises(CoterieError, match=f"^{told}, or lower --clusters or --judge-folds$"):
        coterie.auto(str(model_folder), str(train_file), output=tmp_path / "run", device="cpu", limit=10, **FIT)
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.partial").exists()


def test_a_budget_for_too_few_rows_to_judge_is_refused_at_once_and_the_one_that_is_named_does(
    opened, model_folder, train_file, tmp_path
):
    told = (
        r"--budget 100 does for \d rows, and 3 clusters judged in 4 folds need 12; give --budget (\d+), or lower "
        "--clusters or --judge-folds"
    )
    with pytest.raises(CoterieError, match=told) as refused:
        coterie.auto(str(model_folder), str(train_file), output=tmp_path / "run", device="cpu", budget=100, **FIT)
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.partial").exists()
    assert opened.settings.least_rows == 12
    named = int(re.search(told, str(refused.value)).group(1))
    for seed in range(5):
        settings = opened.settings.model_copy(update={"budget": named, "seed": seed})
        assert len(within_budget(opened.kept, settings).rows) >= 12


def test_prompts_are_compared_with_unlike_rows_that_are_given_and_not_with_those_that_come_along(
    folder, opened, train_file, tmp_path
):
    crossing = unlike_rows(opened).crossing_kinds
    for name in ("refusal", "loss", "prefill"):
        assert torch.equal(load_extra(opened.mixture, name).router.familiarity.strangers, crossing)
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "methods" / "unlike")
    mixture = Mixture.from_pretrained(copy, device="cpu")
    run = ElreaRun.open(mixture, ExtrasSettings(unlike=str(train_file)))
    with pytest.raises(
        CoterieError, match=r"methods/loss was made from a .*/methods/unlike that is gone; delete it, too"
    ):
        prepare_extras(run, ("loss",), EXTRAS, in_run=True)
    for name in ("loss", "prefill", "refusal"):  # of which the last had ELREA's own routing, too
        shutil.rmtree(copy / "methods" / name)
    made = prepare_extras(run, ("loss", "prefill"), EXTRAS, in_run=True)
    seen = unlike_rows(run)
    assert torch.equal(seen.crossing_kinds, crossing)
    torch.testing.assert_close(made["loss"].router.familiarity.strangers, torch.cat([crossing, seen.kinds]))
    wrapped = [way.router for way in candidates.ways(run, run.losses, 0.1) if isinstance(way.router, RefusalRouter)]
    for router in (*wrapped, *(made[name].router for name in ("loss", "prefill"))):
        assert len(router.familiarity.strangers) == len(crossing) + 36 == 36 + 36


@pytest.mark.parametrize("crossed", [torch.zeros(3, 2), torch.full((36, 2), 36.0), torch.full((36, 2), -1.0)])
def test_features_that_do_not_tell_what_crosses_the_rows_are_refused(folder, tmp_path, crossed):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    file = copy / "methods/unlike" / FEATURES
    tensors = load_file(file)
    assert tensors["crossed"].shape == (36, 2) and tensors["crossed"].max() < 36
    write_tensors(file, {**tensors, "crossed": crossed})
    run = ElreaRun.open(Mixture.from_pretrained(copy, device="cpu"), ExtrasSettings())
    with pytest.raises(CoterieError, match=r"unlike/features\.safetensors does not tell what crosses its rows; delete"):
        unlike_rows(run)


def test_runs_of_before_know_no_requests_that_cross_their_clusters(folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    file = copy / "methods/unlike" / FEATURES
    tensors = {name: own for name, own in load_file(file).items() if not name.startswith("cross")}
    write_tensors(file, {name: own.clone() for name, own in tensors.items()})
    seen = unlike_rows(ElreaRun.open(Mixture.from_pretrained(copy, device="cpu"), ExtrasSettings()))
    assert len(seen.crossing_kinds) == 0 and seen.strangers is None


def test_unlike_rows_that_are_not_there_are_told_before_anything_is_trained(model_folder, train_file, tmp_path):
    with pytest.raises(CoterieError, match=r"nowhere\.jsonl"):
        coterie.auto(str(model_folder), str(train_file), output=tmp_path / "run", unlike="nowhere.jsonl", **FIT)
    assert not (tmp_path / "run.partial").exists()
