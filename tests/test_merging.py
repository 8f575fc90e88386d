"""Merging equals its formula, computed by brute force in float64, and PEFT's own result where PEFT has it."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from coterie import lora
from coterie.backbone.layers import MERGED_KEPT, ExpertLayers
from coterie.backbone.row_mix import RequestRows
from coterie.errors import CoterieError
from coterie.experts.bank import load_adapter
from coterie.lora import LoraPair
from tiny import delta

IN, OUT = 7, 6
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def factors(seed: int, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's A (R, I) and B (O, R)."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, IN, generator=generator, dtype=torch.float64),
        torch.randn(OUT, rank, generator=generator, dtype=torch.float64),
    )


SCALINGS = (4.0, 2.0, 0.5)
FACTORS = [factors(seed) for seed in range(3)]
PAIRS = [LoraPair(a, (s * b).T.contiguous(), s) for (a, b), s in zip(FACTORS, SCALINGS, strict=True)]
UPDATES = [s * b @ a for (a, b), s in zip(FACTORS, SCALINGS, strict=True)]
EXACT = sum(w * update for w, update in zip(WEIGHTS, UPDATES, strict=True))


def formula(how: str) -> torch.Tensor:
    """The published formula on A, B and the scaling, as one matrix."""
    triples = list(zip(WEIGHTS, SCALINGS, FACTORS, strict=True))
    if how == "factors":
        return sum(w * s * b for w, s, (_, b) in triples) @ sum(w * a for w, _, (a, _) in triples)
    if how == "peft-linear":
        roots = [(w * s).sqrt() for w, s, _ in triples]
        down = sum(root * a for root, (_, _, (a, _)) in zip(roots, triples, strict=True))
        return sum(root * b for root, (_, _, (_, b)) in zip(roots, triples, strict=True)) @ down
    if how == "peft-0.4-linear":
        return sum(b for _, _, (_, b) in triples) @ sum(w * s * a for w, s, (a, _) in triples)
    return EXACT


@pytest.mark.parametrize("how", lora.MERGES)
def test_a_merge_is_its_formula(how):
    torch.testing.assert_close(delta(lora.merge(PAIRS, WEIGHTS, how)), formula(how))


@pytest.mark.parametrize("ranks", [(1, 3, 2), (2, 2, 2)], ids=str)
def test_the_exact_merge_takes_any_ranks(ranks):
    pairs = [LoraPair(a, b.T.contiguous()) for a, b in (factors(n, rank) for n, rank in enumerate(ranks))]
    expected = sum(w * delta(pair) for w, pair in zip(WEIGHTS, pairs, strict=True))
    merged = lora.merge(pairs, WEIGHTS)
    torch.testing.assert_close(delta(merged), expected)
    assert merged.down.shape[0] == sum(ranks)


@pytest.mark.parametrize("how", [*lora.MERGES, "svd"])
def test_a_single_expert_of_weight_one_is_itself_however_it_is_merged(how):
    torch.testing.assert_close(delta(lora.merge(PAIRS[:1], torch.ones(1), how)), UPDATES[0])


def test_copies_of_one_expert_stay_that_expert_exactly_but_not_by_their_factors():
    """With weights that sum to 1, (sum w B)(sum w A) is right too; with halves of 1 each it is four times too large."""
    torch.testing.assert_close(delta(lora.merge([PAIRS[0]] * 3, WEIGHTS)), UPDATES[0])
    doubled = lora.merge([PAIRS[0]] * 2, torch.ones(2), "factors")
    torch.testing.assert_close(delta(doubled), 4 * UPDATES[0])


def test_opposite_experts_cancel_exactly():
    """Adding factors instead of updates leaves the cross terms: (A + A)(B - B) is 0, but (A1 + A2)(B1 - B2) is not."""
    one, other = LoraPair(PAIRS[0].down, PAIRS[0].up), LoraPair(PAIRS[0].down.clone(), -PAIRS[0].up)
    assert delta(lora.merge([one, other], torch.tensor([0.5, 0.5]))).abs().max() < 1e-12


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_the_truncated_merge_is_the_nearest_of_its_rank(rank):
    """Eckart and Young: keep the largest singular values of the dense update."""
    u, values, vh = torch.linalg.svd(EXACT)
    kept = min(rank, len(values))
    expected = u[:, :kept] * values[:kept] @ vh[:kept]
    merged = lora.merge(PAIRS, WEIGHTS, f"svd:{rank}")
    torch.testing.assert_close(delta(merged), expected)
    assert merged.down.shape[0] == min(rank, IN, OUT, 9)


def test_without_a_number_svd_keeps_the_largest_rank_of_the_experts():
    assert lora.merge(PAIRS, WEIGHTS, "svd").down.shape[0] == 3


def test_norms_and_distances_are_those_of_the_dense_updates():
    merged = lora.merge(PAIRS, WEIGHTS, "factors")
    assert lora.squared_norm(PAIRS[0]) == pytest.approx(float(UPDATES[0].square().sum()))
    expected = float((formula("factors") - EXACT).square().sum())
    assert lora.squared_distance(merged, lora.merge(PAIRS, WEIGHTS)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("linear", "no way to merge is called 'linear'. Did you mean .peft-linear.. There are: exact, factors"),
        ("exact:3", "only svd takes a rank"),
        ("svd:0", "only svd takes a rank, a whole number from 1 upwards, got 'svd:0'"),
        ("svd:many", "only svd takes a rank"),
    ],
)
def test_a_merge_that_does_not_exist_is_told(how, message):
    with pytest.raises(CoterieError, match=message):
        lora.merge(PAIRS, WEIGHTS, how)


def test_factors_of_unequal_ranks_cannot_be_added():
    pairs = [LoraPair(a, b.T.contiguous()) for a, b in (factors(0, 2), factors(1, 3))]
    with pytest.raises(CoterieError, match="needs one rank, got 2, 3; use exact or svd"):
        lora.merge(pairs, torch.ones(2), "factors")


# ------------------------------------------------------------------------------------------------ on a whole model


@pytest.fixture(scope="module")
def adapters(backbone, tmp_path_factory):
    """Three adapters of unequal scaling, as folders that PEFT wrote."""
    folders = []
    for number, alpha in enumerate((8, 4, 2)):
        torch.manual_seed(number)
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
        folder = tmp_path_factory.mktemp("adapters") / str(number)
        get_peft_model(copy.deepcopy(backbone.model), config).save_pretrained(str(folder))
        folders.append(folder)
    return folders


@pytest.mark.parametrize(("how", "combination"), [("exact", "cat"), ("peft-linear", "linear"), ("svd", "svd")])
def test_merges_that_peft_has_are_pefts(backbone, adapters, how, combination):
    model = PeftModel.from_pretrained(copy.deepcopy(backbone.model), adapters[0], adapter_name="0")
    for number in (1, 2):
        model.load_adapter(adapters[number], adapter_name=str(number))
    model.add_weighted_adapter(["0", "1", "2"], WEIGHTS.tolist(), "all", combination_type=combination)
    ours = ExpertLayers(backbone.model, [load_adapter(folder, backbone.model) for folder in adapters])
    merged = ours.merged(tuple(WEIGHTS.tolist()), how)
    assert len(merged) == len(ours.paths)
    for path, pair in merged.items():
        layer = model.base_model.model.get_submodule(path)
        torch.testing.assert_close(delta(pair), layer.get_delta_weight("all").detach(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def hidden(backbone, layers, mix):
    with layers.running(mix):
        return backbone.hidden(torch.arange(40).reshape(len(mix.weights), -1) + 50)


def test_merged_rows_equal_rows_mixed_in_the_layers(backbone, adapters):
    layers = ExpertLayers(backbone.model, [load_adapter(folder, backbone.model) for folder in adapters])
    rows = torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3], [1.5, 0.0, 0.1], [0.0, 0.0, 0.0]])
    mixed = hidden(backbone, layers, layers.weighted(rows))
    alone = ExpertLayers(backbone.model, [layers.merged(tuple(row)) for row in rows.tolist()])
    torch.testing.assert_close(hidden(backbone, alone, alone.weighted(torch.eye(4))), mixed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["factors", "svd:2", "svd:20"])
def test_requests_of_several_merges_share_a_batch_with_others(backbone, adapters, how):
    """A merged adapter is a further expert, which leaves the stacks only when no batch runs it any more."""
    layers = ExpertLayers(backbone.model, [load_adapter(folder, backbone.model) for folder in adapters])
    first = layers.mix([RequestRows(WEIGHTS[None], torch.ones(1), merge=how)] * 2)
    wanted = hidden(backbone, layers, first)
    rows = torch.tensor([[0.1, 0.2 * n, 0.3] for n in range(2 * MERGED_KEPT)])
    for row in rows:
        layers.mix([RequestRows(row[None], torch.ones(1), merge=how)])
    torch.testing.assert_close(hidden(backbone, layers, first), wanted)
    requests = [
        RequestRows(rows[:1], torch.ones(1), merge=how),
        RequestRows(torch.eye(3)[:2], torch.ones(2)),
        RequestRows(rows[1:2], torch.ones(1), merge="peft-linear"),
        RequestRows(rows[1:2], torch.ones(1)),
    ]
    merged = [layers.merged(tuple(rows[0].tolist()), how), layers.merged(tuple(rows[1].tolist()), "peft-linear")]
    alone = ExpertLayers(backbone.model, [*layers.adapters, *merged])
    weights = torch.eye(5)[[3, 0, 1, 4, 4]]
    weights[4] = torch.tensor([*rows[1], 0, 0])
    found = hidden(backbone, layers, layers.mix(requests))
    torch.testing.assert_close(found, hidden(backbone, alone, alone.weighted(weights)), rtol=1e-4, atol=1e-4)
    assert layers.stacked_experts <= 3 + MERGED_KEPT + 3


def test_merged_adapters_come_in_and_out_of_inference_mode(backbone, adapters):
    layers = ExpertLayers(backbone.model, [load_adapter(folder, backbone.model) for folder in adapters])
    weights = [torch.tensor([[0.1, 0.2 * number, 0.3]]) for number in range(MERGED_KEPT + 6)]
    *others, a, b, c, d = (RequestRows(row, torch.ones(1), merge="factors") for row in weights)
    with torch.inference_mode():
        for own in others:
            layers.mix([own])
    rows = [a, b, c, d]  # in the places of the first ones
    found = hidden(backbone, layers, layers.mix(rows))
    alone = ExpertLayers(backbone.model, [layers.merged(tuple(row.weights[0].tolist()), "factors") for row in rows])
    torch.testing.assert_close(found, hidden(backbone, alone, alone.weighted(torch.eye(4))), rtol=1e-4, atol=1e-4)


def test_the_error_of_a_merge_is_that_of_all_dense_updates_together(backbone, adapters):
    layers = ExpertLayers(backbone.model, [load_adapter(folder, backbone.model) for folder in adapters])
    weights = (0.2, 0.5, 0.3)
    exact, other = layers.merged(weights), layers.merged(weights, "factors")
    distance = sum(float((delta(other[p]) - delta(exact[p])).double().square().sum()) for p in exact)
    size = sum(float(delta(pair).double().square().sum()) for pair in exact.values())
    assert layers.merge_error(weights, "factors") == pytest.approx((distance / size) ** 0.5, rel=1e-4)
    assert layers.merge_error(weights, "exact") < 1e-6
    assert layers.merge_error((0.0, 1.0, 0.0), "factors") < 1e-6
    assert layers.merge_error(weights, "svd:1") > layers.merge_error(weights, "svd:4") > 0
