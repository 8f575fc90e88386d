"""The arithmetic of LoRA equals the plain matrix products it stands for."""

import pytest
import torch

from coterie import lora
from coterie.backbone.row_mix import alone, chosen, unused
from coterie.lora import LoraPair, StackedPair

IN, OUT, POSITIONS = 5, 4, 3
CPU = torch.device("cpu")
RANKS = [[2, 2, 2], [1, 3, 2], [4, None, 1]]
"""Ranks of three experts; None is an expert that does not change the layer."""


def random_pairs(ranks: list[int | None], seed: int = 0) -> list[LoraPair | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [None if rank is None else LoraPair(normal(rank, IN), normal(rank, OUT)) for rank in ranks]


def dense(pair: LoraPair | None) -> torch.Tensor:
    """The update as one matrix (O, I), summed rank by rank."""
    update = torch.zeros(OUT, IN, dtype=torch.float64)
    for down, up in [] if pair is None else zip(pair.down, pair.up, strict=True):
        update += torch.outer(up, down)
    return update


def update_of(pair: LoraPair) -> torch.Tensor:
    """The update (O, I) as the layer's own code applies it: what it makes of the unit vectors."""
    units = torch.eye(pair.down.shape[1], dtype=pair.down.dtype)[None]
    out = units.new_zeros(1, pair.down.shape[1], pair.up.shape[1])
    return lora.add_in_order(out, units, lora.stack([pair]))[0].T


def inputs(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, POSITIONS, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_weights(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_update_of_worked_numbers():
    """down [1, 2], up [3, 5]: the update is [[3, 6], [5, 10]]."""
    pair = LoraPair(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
    assert update_of(pair).tolist() == [[3.0, 6.0], [5.0, 10.0]]


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_the_update_is_the_sum_of_outer_products(ranks):
    for pair in filter(None, random_pairs(ranks)):
        torch.testing.assert_close(update_of(pair), dense(pair))


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_stacking_keeps_every_number_and_pads_with_exact_zeros(ranks):
    pairs = random_pairs(ranks)
    stacked = lora.stack(pairs)
    assert stacked.down.shape == (3, max(filter(None, ranks)), IN)
    assert stacked.up.shape == (3, max(filter(None, ranks)), OUT)
    for number, pair in enumerate(pairs):
        kept = 0 if pair is None else pair.down.shape[0]
        for whole, half in zip(stacked, pair[:2] if pair else (torch.zeros(0, IN), torch.zeros(0, OUT)), strict=True):
            assert torch.equal(whole[number, :kept], half.to(whole))
            assert whole[number, kept:].count_nonzero() == 0


def test_padding_to_a_larger_rank_does_not_change_one_bit():
    """Integers make every product exact, so any difference would be the padding's."""
    small = LoraPair(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
    large = LoraPair(torch.ones(7, 2), torch.ones(7, 2))
    x = torch.tensor([[[1.0, -4.0], [2.0, 9.0]]])
    alone = lora.add_in_order(torch.zeros(1, 2, 2), x, lora.stack([small]))
    padded = lora.stack([small, large])
    assert torch.equal(lora.add_in_order(torch.zeros(1, 2, 2), x, padded.part(0, 1)), alone)
    assert torch.equal(lora.add_weighted(torch.zeros(1, 2, 2), x, padded, torch.tensor([[[1.0, 0.0]]])), alone)


def test_a_layer_that_nobody_changes_cannot_be_stacked():
    with pytest.raises(ValueError, match="no expert changes this layer"):
        lora.stack([None, None])


def by_loop(x: torch.Tensor, pairs: list[LoraPair | None], weights: torch.Tensor) -> torch.Tensor:
    """What every row and position gets, vector by vector and expert by expert, on top of ones."""
    weights = weights.expand(len(x), POSITIONS, len(pairs))
    result = torch.ones(len(x), POSITIONS, OUT, dtype=x.dtype)
    for row in range(len(x)):
        for position in range(POSITIONS):
            for weight, pair in zip(weights[row, position], pairs, strict=True):
                result[row, position] += weight * (dense(pair) @ x[row, position])
    return result


def kernels(weights: torch.Tensor) -> dict:
    """Every way to compute weights that can compute these: (out, x, stack) to the sum."""
    rows = weights[:, 0].float() if weights.shape[1] == 1 else torch.zeros(0)
    ways = {"weighted": lambda out, x, pair: lora.add_weighted(out, x, pair, weights, unused(weights, CPU))}
    every = weights.expand(-1, POSITIONS, -1)
    ways["chosen"] = lambda out, x, pair: lora.add_chosen(out, x, pair, every)
    if not len(rows):
        return ways
    if (own := alone(rows, CPU)) and own.places is None:
        ways["in order"] = lambda out, x, pair: lora.add_in_order(out, x, pair.part(own.first, own.end))
    elif own:
        ways["padded"] = lambda out, x, pair: lora.add_padded(out, x, pair.part(own.first, own.end), *own.places)
    if few := chosen(rows, CPU):
        ways["by row"] = lambda out, x, pair: lora.add_by_row(out, x, pair, *few)
    return ways


OWNERS = {
    "in order": [0, 0, 1, 1, 2, 2],
    "some in order": [1, 1, 2, 2],
    "one": [2, 2, 2],
    "in turn": [0, 1, 2, 0, 1, 2],
    "unequally many": [2, 0, 1, 0, 2],
    "nearly all of one": [1, 1, 1, 1, 0, 1, 2],
}


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("owners", OWNERS)
def test_rows_of_one_expert_each_equal_a_loop_over_experts(ranks, owners):
    pairs, rows = random_pairs(ranks), OWNERS[owners]
    weights = torch.eye(3, dtype=torch.float64)[rows][:, None]
    x = inputs(len(rows))
    expected, ways = by_loop(x, pairs, weights), kernels(weights)
    assert ("in order" in ways) == (owners in ("in order", "some in order", "one"))
    assert ("padded" in ways) == (owners in ("in turn", "unequally many"))
    for add in ways.values():
        torch.testing.assert_close(add(torch.ones(len(rows), POSITIONS, OUT).double(), x, lora.stack(pairs)), expected)


MIXED = {
    "one set a row": torch.tensor([[[0.2, 0.5, 0.4]], [[0.1, 0.0, 0.7]], [[1.0, 0.0, 0.0]]]),
    "some a row": torch.tensor([[[0.2, 0.5, 0.0]], [[0.0, 0.0, 0.7]], [[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]]),
    "one set a position": random_weights(3, POSITIONS, 3).masked_fill(random_weights(3, POSITIONS, 3) < 0.4, 0.0),
}


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("kind", MIXED)
def test_mixed_rows_equal_a_loop_over_experts(ranks, kind):
    pairs, weights = random_pairs(ranks), MIXED[kind].double()
    x = inputs(len(weights))
    expected, ways = by_loop(x, pairs, weights), kernels(weights)
    assert ("by row" in ways) == (kind == "some a row")
    for add in ways.values():
        found = add(torch.ones(len(x), POSITIONS, OUT).double(), x, lora.stack(pairs))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


BROKEN = {
    "NaN in down": lambda down, up: down[0].fill_(torch.nan),
    "infinity in up": lambda down, up: up[0, 0].fill_(torch.inf),
    "products too large": lambda down, up: down.fill_(1e308),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("kind", ["some a row", "one set a position", *OWNERS])
def test_an_expert_whose_numbers_are_not_finite_touches_nobody_that_does_not_run_it(kind, how):
    weights = MIXED[kind].double() if kind in MIXED else torch.eye(3, dtype=torch.float64)[OWNERS[kind]][:, None]
    pairs, x = random_pairs([2, 2, 2]), inputs(len(weights))
    spared = weights.expand(-1, POSITIONS, -1)[..., 1] == 0
    expected = by_loop(x, pairs, weights)
    BROKEN[how](pairs[1].down, pairs[1].up)
    stacked = lora.contained(lora.stack(pairs))
    for name, add in kernels(weights).items():
        found = add(torch.ones(len(x), POSITIONS, OUT).double(), x, stacked)
        torch.testing.assert_close(found[spared], expected[spared], rtol=1e-6, atol=1e-6, msg=name)
        assert bool(spared.all()) or not bool(found[~spared].isfinite().all())


@pytest.mark.parametrize("grad", [False, True])
def test_outputs_change_in_place_only_where_no_gradient_is_wanted(grad):
    pairs, ways = lora.stack(random_pairs([2, 1])), kernels(torch.eye(2)[:, None].double())
    with torch.set_grad_enabled(grad):
        for name in ("in order", "weighted", "by row"):
            out = torch.ones(2, POSITIONS, OUT).double()
            found = ways[name](out, inputs(2), pairs)
            assert not torch.equal(found, torch.ones_like(out))
            assert torch.equal(found, out) != grad


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_outputs_keep_their_type_whatever_the_updates_have(wide):
    stacked = StackedPair(*(half.to(wide) for half in lora.stack(random_pairs([2, 1]))))
    weights = torch.eye(2)[[1, 0]][:, None]
    for own in (weights, torch.full_like(weights, 0.5)):
        found = [add(torch.ones(2, POSITIONS, OUT), inputs(2).to(wide), stacked) for add in kernels(own).values()]
        assert {tensor.dtype for tensor in found} == {torch.float32}
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])


def test_a_call_with_other_types_or_shapes_fails_every_test_that_makes_it():
    """The checks that all tests run under: of plain types, of one array, and of sizes that two arrays share."""
    ranks, weights = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3)
    assert torch.equal(lora._weighed(ranks, weights, None), ranks)
    for call in (
        lambda: lora.copying_pays(1, 1, 1, "1"),
        lambda: lora._weighed(ranks[0], weights, None),
        lambda: lora._weighed(ranks, weights[..., :2], None),
        lambda: lora._weighed(ranks, weights.int(), None),
    ):
        with pytest.raises(TypeError, match="violates type hint"):
            call()
