"""Every router with every combiner, from one bank: each cell works and obeys the laws, or says what would fit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from coterie.combiners.table import COMBINERS, fits, make_combiner
from coterie.data.batching import TokenRow
from coterie.data.examples import load_examples
from coterie.engine.scoring import score_responses
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank
from coterie.mixture import Mixture
from coterie.mixture.core import elected
from coterie.routers.centroid import CentroidRouter, Weighting
from coterie.routers.derived import DerivedRouter
from coterie.routers.feature import growing_text_extractor
from coterie.routers.fixed import uniform
from coterie.routers.gate import spectral_router
from coterie.routers.logo import LogoRouter
from coterie.routers.table import ROUTERS
from coterie.routers.token import TokenLevel
from coterie.settings.groups import SamplingSettings
from helpers import close, same_answers

QUESTIONS = load_examples(tiny.make_rows(3, seed=11))
TOKENS = 4
IN_LAYERS = ("gate", "arrow", "spectr")
"""Routers whose weights depend on the inputs of layers."""


@pytest.fixture(scope="module")
def routers(grid):
    """One router of every kind that mixture.json knows, on the common bank."""
    extractor, encoder = growing_text_extractor("hidden", None, grid.own.backbone)
    generator = torch.Generator().manual_seed(0)
    centroids = {name: torch.randn(1, encoder.dimensions, generator=generator) for name in grid.fitted}
    similarity = CentroidRouter.by_similarity(extractor, centroids, weighting=Weighting(0.2))
    made = [
        uniform(grid.fitted),
        grid.own.router,
        grid.router("embedding-clusters"),
        grid.router("performance"),
        grid.router("loss").router,
        grid.router("gates"),
        grid.router("datasets"),
        DerivedRouter(grid.own.router, top_k=2, normalised=True),
        similarity,
        TokenLevel(similarity, every=2),
        *(grid.router(extra) for extra in ("membership", "refusal", "distilled", "avengers", "lorauter", "ariadne")),
        grid.router("prefill").router,
        LogoRouter(grid.own.backbone, grid.own.bank),
        spectral_router("arrow", grid.own.backbone, grid.own.bank, top_k=2),
        spectral_router("spectr", grid.own.backbone, grid.own.bank, temperature=2.0),
    ]
    return {router.kind: router for router in made}


def test_the_suite_has_every_router(routers):
    assert set(routers) == set(ROUTERS)


CELLS = [(router, combiner) for router in ROUTERS for combiner in COMBINERS]


@pytest.mark.parametrize(("router", "combiner"), CELLS)
def test_every_cell_answers_alike_alone_and_together_or_names_what_fits(grid, routers, router, combiner):
    if not fits(routers[router].grain, make_combiner(combiner)):
        with pytest.raises(
            CoterieError, match=f"combiner '{combiner}' takes weights once a (prompt|step), .* use layers"
        ):
            grid.mixture.replace(router=routers[router], combiner=combiner)
        return
    cell = grid.mixture.replace(router=routers[router], combiner=combiner)
    together = cell.generate(QUESTIONS, max_new_tokens=TOKENS, batch_size=2)
    alone = [cell.generate([question], max_new_tokens=TOKENS)[0] for question in QUESTIONS]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-3, atol=1e-4)
        assert sum(one.weights.values()) == pytest.approx(1)


def uncached(cell: Mixture, question, answer) -> torch.Tensor:
    """Log-probabilities of an answer's tokens, from its whole text at once."""
    prompt = cell.tokens([question])[0]
    plan = cell.combiner.plan(cell.router.route([prompt]).aligned(cell.bank.names))
    text = [*prompt.ids, *answer.token_ids]
    positions = range(len(prompt.ids), len(text))
    votes = [[own.votes for own in plan]]
    return score_responses(cell.backbone, cell.layers, plan, votes, [(text, list(positions))])[0][0].logprobs


LEGAL = [
    (router, combiner)
    for router, combiner in CELLS
    if (router not in IN_LAYERS or combiner == "layers")
    and (router != "token-level" or combiner not in ("logits", "texts"))
]
"""That these are the cells which exist is what the test above and the documented table say."""


@pytest.mark.parametrize(
    ("router", "combiner"), [cell for cell in LEGAL if cell[1] != "texts" and cell[0] != "token-level"]
)
def test_step_by_step_with_the_cache_equals_the_whole_text_at_once(grid, routers, router, combiner):
    """Weights that are renewed have slow loops of their own to equal, in tests/test_token_level.py."""
    cell = grid.mixture.replace(router=routers[router], combiner=combiner)
    for question in QUESTIONS[:2]:
        answer = cell.generate([question], max_new_tokens=TOKENS)[0]
        found = torch.tensor(answer.logprobs)
        torch.testing.assert_close(found, uncached(cell, question, answer), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router", [kind for kind in ROUTERS if kind not in IN_LAYERS])
def test_mixing_weights_equals_mixing_in_the_layers(grid, routers, router):
    inside, merged = (grid.mixture.replace(router=routers[router], combiner=name) for name in ("layers", "weights"))
    same_answers(*(cell.generate(QUESTIONS, max_new_tokens=TOKENS) for cell in (inside, merged)))


@pytest.mark.parametrize("combiner", [name for name in COMBINERS if name != "texts"])
@pytest.mark.parametrize("expert", ["base", "cluster-1", "seed-1", "backbone"])
def test_one_hot_weights_are_that_expert_alone_at_every_depth(grid, combiner, expert):
    """The backbone's row is the base model itself: an expert without updates leaves every layer as it is."""
    wanted = grid.mixture.replace(router=expert, combiner="logits").generate(QUESTIONS, max_new_tokens=TOKENS)
    found = grid.mixture.replace(router=expert, combiner=combiner).generate(QUESTIONS, max_new_tokens=TOKENS)
    same_answers(found, wanted)


@pytest.mark.parametrize("router", IN_LAYERS)
def test_gates_find_their_experts_by_name_in_a_bank_of_another_order(grid, routers, router):
    bank = grid.mixture.bank
    turned = replace(grid.mixture, bank=ExpertBank(bank.names[::-1], bank.adapters[::-1]))
    cells = [mixture.replace(router=routers[router], combiner="layers") for mixture in (grid.mixture, turned)]
    same_answers(*(cell.generate(QUESTIONS, max_new_tokens=TOKENS) for cell in cells))


@pytest.mark.parametrize("router", IN_LAYERS)
def test_gates_report_their_average_weights_without_a_pass_of_their_own(grid, routers, router):
    """A prompt is read once, whatever weighs it: one pass for it, and one for every token but the last."""
    cell = grid.mixture.replace(router=routers[router], combiner="layers")
    passes: list[int] = []
    embedding = cell.backbone.model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, inputs: passes.append(1))
    try:
        answers = cell.generate(QUESTIONS, max_new_tokens=3, batch_size=len(QUESTIONS))
    finally:
        handle.remove()
    assert len(passes) == max(len(answer.token_ids) for answer in answers)
    wanted = cell.route(QUESTIONS)
    for number, answer in enumerate(answers):
        assert answer.weights == pytest.approx(wanted.row(number), abs=1e-5)
    given = cell.generate(QUESTIONS[:1], routing=wanted.take([0]), max_new_tokens=1)[0].weights
    assert given == pytest.approx(wanted.row(0), abs=1e-6)  # shares of a sum that is 1 up to rounding


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        *(("loss", "loss"), ("prefill", "prefill"), ("distilled", "distilled"), ("membership", "membership")),
        *(("avengers", "avengers"), ("lorauter", "lorauter")),
        *(("performance-centroids", "performance"), ("gate", "gates")),
    ],
)
def test_a_router_that_was_trained_for_a_mixture_is_found_by_its_kind(grid, name, extra):
    cell = grid.own.replace(router=name, combiner="layers")
    trained = grid.router(extra)
    wanted = trained.with_caution(None) if trained.kind == "refusal" else trained
    found, wanted = (router.route(cell.tokens(QUESTIONS)) for router in (cell.router, wanted))
    assert found.experts == wanted.experts
    assert torch.equal(found.weights, wanted.weights)


def test_a_mixtures_own_router_and_those_of_the_bank_are_found_by_their_kinds(grid):
    turned = grid.own.replace(router="uniform")
    assert grid.own.replace(router="gradient-centroids").router is grid.own.router
    assert turned.replace(router="cluster-1").route(QUESTIONS[:1]).row(0)["cluster-1"] == 1
    for kind in ("arrow", "spectr"):
        router = spectral_router(kind, grid.own.backbone, grid.own.bank)
        found = turned.replace(router=kind, combiner="layers").route(QUESTIONS)
        assert torch.equal(found.weights, router.route(turned.tokens(QUESTIONS)).weights)


def test_the_experts_without_updates_are_the_null_expert_of_a_router_of_the_bank(grid):
    """The common bank holds the base model itself, which no score can reach, so it takes what nobody answers."""
    cell = grid.mixture.replace(router="arrow", combiner="layers")
    assert cell.router.null == {"name": "backbone", "cosine": 0.1}


def test_an_unknown_router_is_told_with_all_that_there_are(grid):
    """The routers to other experts were trained too, but this bank does not hold their experts."""
    with pytest.raises(CoterieError, match="no router or expert is called 'sourc'") as told:
        grid.own.replace(router="sourc")
    names = str(told.value).partition("There are: ")[2].split("; ")[0]
    assert set(names.split(", ")) == {
        *("uniform", *grid.own.bank.names),
        *("gradient-centroids", "loss", "prefill", "distilled", "membership", "refusal", "avengers", "lorauter"),
        *("performance-centroids", "gate", "arrow", "spectr", "ariadne", "logo"),
    }
    assert grid.mixture.replace(router="source").router.kind == "source"


def test_cells_of_one_bank_share_their_stacked_experts_and_another_bank_has_its_own(grid):
    cell = grid.mixture.replace(router="uniform", combiner="layers")
    assert cell.layers is grid.mixture.layers
    assert grid.own.layers is not grid.mixture.layers
    assert len(replace(cell, bank=grid.own.bank).layers.adapters) == len(grid.own.bank)


def test_approximate_merges_do_differ_from_the_exact_one(grid, routers):
    exact = grid.mixture.replace(router=routers["fixed"], combiner="weights").generate(QUESTIONS[:1], max_new_tokens=2)
    for how in ("factors", "peft-0.4-linear", "svd:1"):
        cell = grid.mixture.replace(router=routers["fixed"], combiner=f"weights:{how}")
        assert cell.generate(QUESTIONS[:1], max_new_tokens=2)[0].logprobs != pytest.approx(exact[0].logprobs, abs=1e-4)


@pytest.mark.parametrize("combiner", sorted(COMBINERS))
def test_base_weights_are_bit_identical_afterwards_and_no_hook_stays(grid, routers, combiner):
    model = grid.mixture.backbone.model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fitting = [router for router in routers.values() if fits(router.grain, make_combiner(combiner))]
    for router in fitting:
        grid.mixture.replace(router=router, combiner=combiner).generate(QUESTIONS[:1], max_new_tokens=2)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("router", [kind for kind in ROUTERS if kind not in ("embedding-centroids", "source")])
def test_a_saved_cell_answers_as_before(grid, routers, router, tmp_path):
    """Embedding centroids and data sets route to experts of their own, which are no part of the fitted bank."""
    combiner = "layers" if router in (*IN_LAYERS, "token-level") else "logits"
    cell = grid.own.replace(router=routers[router], combiner=combiner)
    cell.save_pretrained(tmp_path / "copy")
    again = Mixture.from_pretrained(tmp_path / "copy", device="cpu")
    assert (again.router.kind, again.combiner.kind) == (router, combiner)
    assert again.generate(QUESTIONS, max_new_tokens=3) == cell.generate(QUESTIONS, max_new_tokens=3)


def test_a_cell_whose_experts_lie_elsewhere_is_not_saved(grid, routers, tmp_path):
    cell = grid.mixture.replace(router=routers["embedding-centroids"])
    with pytest.raises(CoterieError, match="the expert 'dataset-pick' has no files in"):
        cell.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_finished_answers_cannot_be_streamed(grid):
    with pytest.raises(CoterieError, match="lets finished answers vote, so it cannot stream"):
        next(grid.mixture.replace(combiner="texts").stream(QUESTIONS[0]))


@pytest.mark.parametrize(("router", "combiner"), [cell for cell in LEGAL if cell[1] in ("logits", "layers", "weights")])
def test_several_answers_to_a_prompt_are_those_of_their_seeds_alone(grid, routers, router, combiner):
    """Prompts are read once for all their answers, which then go on as if each had been drawn in a call of its own."""
    cell = grid.mixture.replace(router=routers[router], combiner=combiner)
    options = {"max_new_tokens": TOKENS, "temperature": 1.0}
    found = cell.generate(QUESTIONS, n=3, seed=5, batch_size=6, **options)
    seeds = [own.seed for own in cell.combiner.draws(SamplingSettings(seed=5, temperature=1.0), 3)]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    for place, seed in enumerate(seeds):
        alone = cell.generate(QUESTIONS, seed=seed, **options)
        same_answers(found[place::3], alone)
        for one, other in zip(found[place::3], alone, strict=True):
            assert one.prompt == other.prompt
            assert list(one.weights) == list(other.weights)
            close(list(one.weights.values()), list(other.weights.values()))


def test_a_vote_is_between_the_answers_that_five_seeds_give(grid):
    cell, single = (grid.mixture.replace(router="base", combiner=name) for name in ("texts", "logits"))
    drawn = single.generate(QUESTIONS[:2], n=5, max_new_tokens=TOKENS, temperature=1.0, seed=3)
    assert len({answer.token_ids for answer in drawn[:5]}) > 1
    for number, winner in enumerate(cell.generate(QUESTIONS[:2], max_new_tokens=TOKENS, seed=3)):
        own = drawn[5 * number :][:5]
        same_answers([winner], [elected(QUESTIONS[number], own, 3)])


def test_the_documented_table_of_cells_is_the_codes(routers):
    """docs/architecture.md has a line for every router and a column for every combiner; a dot marks the cells."""
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    table = [line.strip()[1:-1] for line in text.splitlines() if re.match(r"\| (router|`)", line)]
    rows = [[cell.strip() for cell in line.split("|")] for line in table]
    head, *lines = rows[next(i for i, row in enumerate(rows) if row[0] == "router") :]
    documented = {
        (line[0].strip("`"), combiner.strip("`")): mark == "●"
        for line in lines[: len(ROUTERS)]
        for combiner, mark in zip(head[1:], line[1:], strict=True)
    }
    assert documented == {(kind, name): fits(routers[kind].grain, make_combiner(name)) for kind, name in CELLS}


def test_prompts_without_a_source_cannot_be_routed_by_data_set(grid, routers):
    prompt = TokenRow((1,), 1, (False,), (True,))
    with pytest.raises(CoterieError, match="prompt 1 has the source None, but there are experts for pick, spell, sum"):
        routers["source"].route([prompt])
