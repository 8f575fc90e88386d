"""The arithmetic of LoRA equals the plain matrix products it stands for."""

import pytest
import torch

from coterie import lora
from coterie.lora import LoraPair, StackedPair

IN, OUT, POSITIONS = 5, 4, 3
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
    return lora.apply_by_expert(units, lora.stack([pair]), [1])[0].T


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
    alone = lora.apply_by_expert(x, lora.stack([small]), [1])
    padded = lora.stack([small, large])
    assert torch.equal(lora.apply_by_expert(x, StackedPair(padded.down[:1], padded.up[:1]), [1]), alone)
    assert torch.equal(lora.apply_weighted(x, padded, torch.tensor([[[1.0, 0.0]]])), alone)


def test_a_layer_that_nobody_changes_cannot_be_stacked():
    with pytest.raises(ValueError, match="no expert changes this layer"):
        lora.stack([None, None])


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 2, 2), (1, 3, 2), (0, 4, 1), (5, 0, 0)], ids=str)
def test_rows_by_expert_equal_a_loop_over_experts(ranks, counts):
    pairs, x = random_pairs(ranks), inputs(sum(counts))
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    expected = torch.stack([x[row] @ dense(pairs[expert]).T for row, expert in enumerate(owners)])
    torch.testing.assert_close(lora.apply_by_expert(x, lora.stack(pairs), counts), expected)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("positions", [1, POSITIONS], ids=["one weight a row", "one weight a position"])
def test_weighted_rows_equal_the_weighted_sum_of_dense_updates(ranks, positions):
    pairs, x = random_pairs(ranks), inputs(4)
    weights = random_weights(4, positions, 3)
    expected = torch.zeros(4, POSITIONS, OUT, dtype=torch.float64)
    for row in range(4):
        for position in range(POSITIONS):
            own = weights[row, position % positions]
            update = sum(w * dense(pair) for w, pair in zip(own, pairs, strict=True))
            expected[row, position] = update @ x[row, position]
    torch.testing.assert_close(lora.apply_weighted(x, lora.stack(pairs), weights), expected)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_one_hot_weights_equal_rows_by_expert(ranks):
    counts = (2, 1, 3)
    owners = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)])
    weights = torch.nn.functional.one_hot(owners, 3)[:, None, :].double()
    stacked, x = lora.stack(random_pairs(ranks)), inputs(6)
    torch.testing.assert_close(lora.apply_weighted(x, stacked, weights), lora.apply_by_expert(x, stacked, counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_dtype_of_the_input(dtype):
    stacked = StackedPair(*(half.to(dtype) for half in lora.stack(random_pairs([2, 1]))))
    x = inputs(2).to(dtype)
    weights = torch.ones(2, 1, 2)
    assert lora.apply_by_expert(x, stacked, [1, 1]).dtype == dtype
    assert lora.apply_weighted(x, stacked, weights).dtype == dtype
