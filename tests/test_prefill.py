"""Routers that need no backward pass: states of the prefill, and what a gradient router taught them."""

import copy
import json
from collections.abc import Sequence

import pytest
import torch

import tiny
from coterie.data.batching import TokenRow
from coterie.data.examples import load_examples
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor
from coterie.features.prefill import MiddleStates, PrefillStates, candidate_layers, middle_layers, prefill_states
from coterie.methods.elrea.fitted_routers import agreements
from coterie.routers.base import Router, Routing
from coterie.routers.distilled import DistilledRouter, ErrorCurve, Learnt, distil, misplaced
from coterie.routers.familiarity import Familiarity
from coterie.routers.loss import CrossFitLosses, LossRouter, Ridge
from helpers import normal, pairs_that_gain_nothing

QUESTIONS = load_examples(tiny.make_rows(5, seed=3))


def test_states_are_those_that_transformers_gives_behind_each_block(mixture):
    rows = mixture.tokens(QUESTIONS)
    found = prefill_states(mixture.backbone, rows, [1, 2])
    theirs = copy.deepcopy(mixture.backbone.model)  # transformers leaves its own hooks behind
    for number, row in enumerate(rows):
        with torch.no_grad():
            wanted = theirs(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
            last = mixture.backbone.decoder.norm(found[number, 1, 1])  # transformers gives the last block's normed
        own = wanted[1][0]
        torch.testing.assert_close(found[number, 0, 0], own[list(row.is_user_text)].mean(dim=0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[number, 0, 1], own[-1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(last, wanted[2][0, -1], rtol=1e-3, atol=1e-4)


def test_no_hook_stays_and_nothing_needs_a_gradient(mixture):
    PrefillStates(mixture.backbone, 2, "mean").rows(mixture.tokens(QUESTIONS))
    assert not any(block._forward_hooks for block in mixture.backbone.blocks)


def test_a_kind_of_text_is_told_by_the_states_half_and_three_quarters_of_the_way_each_of_unit_length(mixture):
    rows, layers = mixture.tokens(QUESTIONS), middle_layers(mixture.backbone)
    assert layers == [1, 2]  # of two blocks
    found = MiddleStates(mixture.backbone, layers).rows(rows)
    states = prefill_states(mixture.backbone, rows, layers)
    parts = [
        own / own.norm(dim=-1, keepdim=True) for layer in (0, 1) for own in (states[:, layer, 0], states[:, layer, 1])
    ]
    torch.testing.assert_close(found, torch.cat(parts, dim=1))
    assert MiddleStates(mixture.backbone, [2]).rows(rows).shape == (5, 2 * states.shape[-1])
    with pytest.raises(CoterieError, match="this model has blocks 1 to 2, and none 3; fit again"):
        MiddleStates(mixture.backbone, [1, 3])


def test_a_router_and_its_refusal_read_a_prompt_in_one_pass(grid, monkeypatch):
    """The same as in a pass of each; other prompts, and equal ones of another request, are read anew."""
    refusing = grid.cell("prefill").router
    rows = [grid.own.tokens(QUESTIONS) for _ in range(2)]
    alone = refusing.router.read(rows[0]), refusing.extractor(rows[0].copy())
    passes, run = [], type(grid.own.backbone).hidden
    monkeypatch.setattr(type(grid.own.backbone), "hidden", lambda self, *_: passes.append(1) or run(self, *_))
    both = refusing.read(rows[1])
    assert len(passes) == 1
    for own, wanted in zip(both, alone, strict=True):
        assert torch.equal(own, wanted)
    refusing.read(rows[1][:3])
    refusing.read(grid.own.tokens(QUESTIONS))
    assert len(passes) == 3


def test_a_router_chooses_among_quarters_of_the_depth(mixture):
    assert candidate_layers(mixture.backbone) == [1, 2]  # of two blocks
    with pytest.raises(CoterieError, match="this model has blocks 1 to 2, and none 3; fit again"):
        PrefillStates(mixture.backbone, 3, "mean")


def test_the_prefill_router_reads_no_gradient(grid, monkeypatch):
    cell = grid.cell("prefill")
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a backward pass was run"))
    assert cell.route(QUESTIONS).weights.shape == (5, 4)
    assert isinstance(cell.router.router, LossRouter) and cell.router.router.kind == "prefill"


def test_its_weights_can_be_renewed_while_an_answer_is_written_and_are_then_those_of_the_text_so_far(grid):
    """Its experts meet in the logits, which take the prompt's weights alone, so then they meet in the layers."""
    cell = grid.cell("prefill:every=2+caution=off")
    assert grid.cell("prefill").combiner.kind == "logits" == grid.cell("prefill:every=inf").combiner.kind
    assert cell.combiner.kind == "layers"
    plain, moved = grid.cell("prefill:caution=off"), set()
    for prompt, answer in zip(plain.tokens(QUESTIONS), cell.generate(QUESTIONS, max_new_tokens=6), strict=True):
        for place, own in enumerate(answer.trace.weights):
            known = prompt.extended(answer.token_ids[: place - place % 2])
            wanted = plain.router.route([known]).normalized().row(0)
            assert own == pytest.approx([wanted[name] for name in answer.trace.experts], abs=1e-3)
            moved.add((prompt, answer.trace.experts, own))
    assert len(moved) > len(QUESTIONS)


# ------------------------------------------------------------------------------------------------------------ distilled


class Teacher(Router):
    """Favours `a` where the first feature is positive, and counts how many prompts it was asked about."""

    kind = "teacher"

    def __init__(self) -> None:
        self.asked = 0

    def read(self, prompts: Sequence[TokenRow]) -> torch.Tensor:
        self.asked += len(prompts)
        return torch.tensor([[float(prompt.ids[0])] for prompt in prompts])

    def weigh(self, read: torch.Tensor) -> Routing:
        return Routing(("a", "b"), torch.cat([read, 4 - read], dim=1))


def taught(count: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    features = normal(count, 8, seed=seed)
    share = (4 * torch.nn.functional.normalize(features, dim=1)[:, 0]).sigmoid()
    return features, torch.stack([share, 1 - share], dim=1)


def test_weights_that_follow_the_states_are_learnt():
    learnt = distil(*taught())
    features, wanted = taught(100, seed=5)
    found = (torch.nn.functional.normalize(features, dim=1) @ learnt.ridge.weight.T + learnt.ridge.bias).softmax(dim=1)
    assert float(misplaced(found, wanted).mean()) < 0.03
    assert learnt.error < 0.03
    assert float(learnt.curve(learnt.familiarity(features)).mean()) < 0.05


def test_weights_that_hang_on_nothing_there_have_a_large_estimated_error():
    features, wanted = taught()
    learnt = distil(features, wanted[torch.randperm(200, generator=torch.Generator().manual_seed(1))])
    assert learnt.error > 0.15
    assert float(learnt.curve(learnt.familiarity(features)).mean()) == pytest.approx(learnt.error, abs=0.03)


def test_the_estimated_error_falls_with_familiarity_and_is_unknown_below_all_that_was_seen():
    curve = ErrorCurve(torch.tensor([0.2, 0.5]), torch.tensor([0.3, 0.1]))
    assert curve(torch.tensor([0.1, 0.2, 0.4, 0.5, 0.9])).tolist() == pytest.approx([1.0, 0.3, 0.3, 0.1, 0.1])
    error = distil(*taught(60)).curve.error
    assert bool((error.diff() <= 1e-6).all())


def test_the_teacher_is_asked_where_the_pupil_is_unsure_and_nowhere_else():
    """Both know the first two axes; the third prompt points elsewhere."""
    teacher, features = Teacher(), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    extractor = FeatureExtractor("prefill", lambda prompts: features, {})
    curve = ErrorCurve(torch.tensor([0.3]), torch.tensor([0.05]))
    ridge = Ridge(torch.zeros(2, 3), torch.tensor([0.0, 1.0986123]))  # 1 to 3
    known = torch.nn.functional.normalize(torch.tensor([[1.0, 0.4, 0.0], [0.4, 1.0, 0.0]]), dim=1)
    familiarity = Familiarity(known, torch.ones(2))
    router = DistilledRouter(teacher, extractor, ridge, ["a", "b"], familiarity, curve)
    found = router.route([TokenRow((3,), 1, (False,), (True,))] * 3)
    assert teacher.asked == 1
    assert found.weights.tolist() == [pytest.approx(own) for own in ([0.25, 0.75], [0.25, 0.75], [0.75, 0.25])]


def test_agreement_is_told_as_top_1_rank_correlation_weight_and_loss():
    """The second row favours another expert: ranks (0, 1, 2) and (0, 2, 1) correlate by 0.5."""
    wanted = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    pupil = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    nll = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    losses = CrossFitLosses(("a", "b", "c"), nll, pairs_that_gain_nothing(nll), torch.tensor([3.0, 1.0]))
    learnt = Learnt(
        Ridge(torch.zeros(3, 1), torch.zeros(3)),
        Familiarity(torch.ones(1, 1), torch.ones(1)),
        ErrorCurve(*torch.ones(2, 1)),
        pupil,
        0.0,
    )
    found = agreements(learnt, wanted, losses)
    assert found["top_1"] == 0.5
    assert found["rank_correlation"] == pytest.approx(0.75)
    assert found["misplaced"] == pytest.approx(0.15)
    assert found["nll"] == pytest.approx((3 * (1.5 - 1.7) + 1 * (2.1 - 2.3)) / 4)


def test_the_distilled_router_of_a_run_tells_its_agreement(grid):
    told = json.loads((grid.extras["distilled"].folder / "ingredient.json").read_text())["agreement"]
    assert set(told) == {"top_1", "rank_correlation", "misplaced", "nll"} and 0 <= told["top_1"] <= 1
