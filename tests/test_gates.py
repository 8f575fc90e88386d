"""Gates inside layers, learned or read off the experts' updates, equal the dense formulas, computed token by token."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model

from coterie.backbone.gates import Gates
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_layers, linear_shapes
from coterie.backbone.prototypes import PROTOTYPES, prototypes
from coterie.backbone.row_mix import Gated
from coterie.combiners.layers import LayerCombiner
from coterie.data.batching import PromptFormat, TokenRow
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank, load_bank
from coterie.lora import LoraPair, add_chosen, add_weighted, stack
from coterie.mixture import Mixture
from coterie.routers.base import RouterParts
from coterie.routers.gate import GateRouter, spectral_router
from coterie.routers.table import load_router
from helpers import normal
from tiny import delta

IN, OUT, POSITIONS = 5, 4, 3
RANKS = [[2, 2, 2], [1, 3, 2], [4, None, 1], [6, 1, 2]]
"""Ranks of three experts; None does not change the layer, and 6 is more than the layer has room for."""
LAYER = "model.layers.0.self_attn.q_proj"
KINDS = tuple(PROTOTYPES)


def random_pairs(ranks: list[int | None], seed: int = 0) -> list[LoraPair | None]:
    """Updates with a scaling of 3 in `up`, as loaded ones have it."""
    return [
        None
        if rank is None
        else LoraPair(normal(rank, IN, seed=seed + n), 3 * normal(rank, OUT, seed=seed + 50 + n), 3.0)
        for n, rank in enumerate(ranks)
    ]


def dense(pair: LoraPair | None) -> torch.Tensor:
    return torch.zeros(OUT, IN) if pair is None else delta(pair)


def make_gates(score: str, pairs: list[LoraPair | None], **options) -> Gates:
    gate = normal(len(pairs), IN, seed=9) if score == "linear" else prototypes(score, pairs)
    return Gates(tuple("abc"[: len(pairs)]), {"x": gate}, score, **options)


# ------------------------------------------------------------------------------------------------------- prototypes


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_arrows_prototype_is_the_top_right_singular_vector_of_the_dense_update(ranks):
    pairs = random_pairs(ranks)
    found = prototypes("arrow", pairs)
    assert found.shape == (3, IN)
    for pair, own in zip(pairs, found, strict=True):
        if pair is None:
            assert own.count_nonzero() == 0
            continue
        wanted = torch.from_numpy(np.linalg.svd(dense(pair).double().numpy())[2][0]).float()
        torch.testing.assert_close(own * (own @ wanted).sign(), wanted)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_spectrs_prototype_is_the_whole_right_half_of_the_decomposition(ranks):
    pairs = random_pairs(ranks)
    for pair, own in zip(pairs, prototypes("spectr", pairs), strict=True):
        values, directions = np.linalg.svd(dense(pair).double().numpy(), full_matrices=False)[1:]
        kept = min(len(own), len(values))
        torch.testing.assert_close(
            own.norm(dim=1)[:kept], torch.from_numpy(values[:kept]).float(), rtol=1e-4, atol=1e-4
        )
        assert own[kept:].count_nonzero() == 0
        wanted = torch.from_numpy(directions.T * values**2 @ directions).float()
        torch.testing.assert_close(own.T @ own, wanted, rtol=1e-4, atol=1e-4)


def test_an_update_of_zeros_has_no_direction():
    """A LoRA that was never trained: B is zero, A is not."""
    fresh = LoraPair(normal(2, IN), torch.zeros(2, OUT))
    assert prototypes("arrow", [fresh, random_pairs([2])[0]])[0].count_nonzero() == 0


def test_a_layer_that_nobody_changes_has_no_prototypes():
    with pytest.raises(ValueError, match="no expert changes this layer"):
        prototypes("arrow", [None, None])


# ----------------------------------------------------------------------------------------------- scores and weights


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_spectrs_score_is_the_norm_of_what_the_update_answers(ranks):
    pairs, x = random_pairs(ranks), normal(2, POSITIONS, IN, seed=1)
    expected = torch.stack([(x @ dense(pair).T).norm(dim=-1) for pair in pairs], dim=-1)
    torch.testing.assert_close(make_gates("spectr", pairs).scores("x", x), expected, rtol=1e-4, atol=1e-4)


ONE = LoraPair(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))
OTHER = LoraPair(torch.tensor([[0.0, -3.0]]), torch.tensor([[1.0]]))
"""Updates x -> 2 x_0 and x -> -3 x_1."""


@pytest.mark.parametrize(
    ("score", "options", "expected"),
    [
        ("arrow", {}, [0.26894142, 0.73105858]),  # scores 1 and 2: 1 / (1 + e)
        ("arrow", {"temperature": 0.5}, [0.11920292, 0.88079708]),  # 1 / (1 + e^2)
        ("arrow", {"top_k": 1}, [0.0, 1.0]),
        ("spectr", {"temperature": 2.0}, [0.11920292, 0.88079708]),  # scores 2 and 6: 1 / (1 + e^2)
    ],
    ids=str,
)
def test_the_weights_of_worked_numbers(score, options, expected):
    gates = Gates(("a", "b"), {"x": prototypes(score, [ONE, OTHER])}, score, **options)
    x = torch.tensor([[[1.0, -2.0], [-1.0, -2.0]]])
    torch.testing.assert_close(gates.weigh("x", x).weights, torch.tensor([[expected, expected]]))


def test_learned_gates_keep_the_sign_of_their_scores():
    """Scores 1 and -2: 1 / (1 + e^-3)."""
    found = Gates(("a", "b"), {"x": torch.eye(2)}).weigh("x", torch.tensor([[[1.0, -2.0]]])).weights
    torch.testing.assert_close(found, torch.tensor([[[0.95257413, 0.04742587]]]))


def test_the_score_of_an_expert_that_leaves_the_layer_alone_is_zero_and_counts():
    """Scores 1 and 0."""
    gates = Gates(("a", "b"), {"x": prototypes("arrow", [ONE, None])}, "arrow")
    found = gates.weigh("x", torch.tensor([[[1.0, 5.0]]])).weights
    torch.testing.assert_close(found, torch.tensor([[[0.73105858, 0.26894142]]]))


def test_equal_scores_keep_the_earlier_experts():
    gates = Gates(tuple("abc"), {"x": torch.zeros(3, IN)}, top_k=2)
    assert gates.weigh("x", normal(1, 1, IN)).weights.tolist() == [[[0.5, 0.5, 0.0]]]


@pytest.mark.parametrize("score", ["linear", *KINDS])
@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_gated_layers_equal_a_loop_over_tokens_and_chosen_experts(score, top_k, ranks):
    pairs, x = random_pairs(ranks), normal(4, POSITIONS, IN, seed=1)
    gates = make_gates(score, pairs, top_k=top_k, temperature=1.5)
    expected = torch.zeros(4, POSITIONS, OUT)
    for row, position in np.ndindex(4, POSITIONS):
        token = x[row, position]
        scores = gates.scores("x", token[None, None])[0, 0]
        chosen = sorted(range(3), key=lambda expert: -float(scores[expert]))[:top_k]
        shares = [float((scores[expert] / 1.5).exp()) for expert in chosen]
        for expert, share in zip(chosen, shares, strict=True):
            expected[row, position] += share / sum(shares) * (dense(pairs[expert]) @ token)
    weights = gates.weigh("x", x).weights
    for add in (add_weighted, add_chosen):
        found = add(torch.ones(4, POSITIONS, OUT), x, stack(pairs), weights)
        torch.testing.assert_close(found, 1 + expected, rtol=1e-4, atol=1e-4)


def test_experts_that_are_not_chosen_are_not_computed():
    """Factors of NaN would spoil every token that they are multiplied with, whatever the weight."""
    pairs, x = random_pairs([2, 2, 2]), normal(2, POSITIONS, IN, seed=1)
    gate = torch.cat([normal(2, IN), torch.full((1, IN), -1e9)])
    gates = Gates(tuple("abc"), {"x": gate}, top_k=2)
    x = x.abs()  # so that the third expert's score is the smallest everywhere
    broken = LoraPair(torch.full((2, IN), torch.nan), torch.full((2, OUT), torch.nan))
    weights = gates.weigh("x", x).weights
    expected = add_chosen(torch.zeros(2, POSITIONS, OUT), x, stack(pairs), weights)
    assert bool(torch.isfinite(expected).all())
    found = add_chosen(torch.zeros(2, POSITIONS, OUT), x, stack([*pairs[:2], broken]), weights)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("add", [add_weighted, add_chosen])
@pytest.mark.parametrize("top_k", [None, 2])
def test_chosen_experts_pass_gradients_to_their_gate(top_k, add):
    pairs, x = random_pairs([2, 1, 3]), normal(2, POSITIONS, IN, seed=1)
    gate = normal(3, IN, seed=9).double().requires_grad_()
    stacked = stack([LoraPair(pair.down.double(), pair.up.double()) for pair in pairs])

    def loss(gate: torch.Tensor) -> torch.Tensor:
        weights = Gates(tuple("abc"), {"x": gate}, top_k=top_k).weigh("x", x).weights
        return add(torch.zeros(2, POSITIONS, OUT).double(), x.double(), stacked, weights).square().sum()

    loss(gate).backward()
    step = torch.zeros_like(gate)
    step[0, 1] = 1e-2
    with torch.no_grad():
        slope = (loss(gate + step) - loss(gate - step)) / 2e-2
    assert float(gate.grad[0, 1]) == pytest.approx(float(slope), rel=1e-2)
    assert abs(float(slope)) > 1e-2


# --------------------------------------------------------------------------------------------------- a whole model


def random_adapter(model, seed: int, ranks=(2, 3), paths=None) -> dict[str, LoraPair]:
    shapes = linear_shapes(model)
    chosen = [path for path in shapes if "lm_head" not in path] if paths is None else paths
    return {
        path: LoraPair(
            normal(ranks[n % len(ranks)], shapes[path][0], seed=seed + n),
            0.05 * normal(ranks[n % len(ranks)], shapes[path][1], seed=seed + n + 500),
        )
        for n, path in enumerate(chosen)
    }


@pytest.fixture(scope="module")
def bank(backbone) -> ExpertBank:
    """Two experts for all layers, one for a single layer, and one that changes nothing."""
    model = backbone.model
    single = random_adapter(model, 3000, ranks=(1,), paths=[LAYER])
    adapters = (random_adapter(model, 1000), random_adapter(model, 2000, ranks=(4,)), single, {})
    return ExpertBank(("law", "maths", "single", "null"), adapters)


def rows(*texts: str) -> list[TokenRow]:
    ids = [tuple(text.encode()) for text in texts]
    return [TokenRow(own, len(own), (False,) * len(own), (True,) * len(own)) for own in ids]


PROMPTS = rows("add 3 and 4", "SPELL", "which of these is a city, (A) Rome or (B) rum?")


def gated_logits(backbone, adapters, gates: Gates, ids) -> torch.Tensor:
    layers = ExpertLayers(backbone.model, adapters)
    gated = Gated(tuple(range(len(gates.experts))), gates)
    with torch.inference_mode(), layers.running(layers.gated(gated, 1)):
        return backbone.head(backbone.hidden(torch.tensor([ids])))[0]


def save_peft_adapter(backbone, folder, alpha: int, seed: int):
    """A PEFT adapter whose first singular value stands out, so that PEFT's power iteration reaches its vector."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=alpha, target_modules="all-linear")
    model = get_peft_model(copy.deepcopy(backbone.model), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.data[:, 0] *= 10
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.7), (3, 2.0)])
def test_arrow_equals_pefts(backbone, tmp_path, top_k, temperature):
    folders = {f"e{n}": save_peft_adapter(backbone, tmp_path / f"e{n}", 4 * (n + 1), seed=n) for n in range(3)}
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    model = create_arrow_model(copy.deepcopy(backbone.model), [str(folder) for folder in folders.values()], config)
    ids = PROMPTS[2].ids
    with torch.inference_mode():
        expected = model.eval()(input_ids=torch.tensor([ids])).logits[0].float()
    found = load_bank(folders, backbone.model)
    router = spectral_router("arrow", backbone, found, top_k=top_k, temperature=temperature)
    logits = gated_logits(backbone, found.adapters, router.gates, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    signed = Gates(router.gates.experts, router.gates.layers, "linear", top_k, temperature)
    assert float((gated_logits(backbone, found.adapters, signed, ids) - expected).abs().max()) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_routing_is_the_average_of_the_weights_that_acted(backbone, bank, kind):
    """The layers' own inputs are caught here and weighed one token at a time."""
    router = spectral_router(kind, backbone, bank, top_k=3, null="null", null_cosine=0.2)
    caught: dict[str, torch.Tensor] = {}
    modules = linear_layers(backbone.model)

    def keep(path: str):
        return lambda module, inputs: caught.setdefault(path, inputs[0])

    handles = [modules[path].register_forward_pre_hook(keep(path)) for path in router.gates.layers]
    gated_logits(backbone, bank.adapters, router.gates, PROMPTS[0].ids)
    for handle in handles:
        handle.remove()
    assert len(caught) == 14
    single = [
        router.gates.weigh(path, x[:, i : i + 1]).weights[0, 0] for path, x in caught.items() for i in range(x.shape[1])
    ]
    routing = router.route(PROMPTS)
    torch.testing.assert_close(routing.weights[0], torch.stack(single).mean(dim=0))
    torch.testing.assert_close(routing.weights, torch.cat([router.route([row]).weights for row in PROMPTS]))
    assert routing.experts == bank.names and float(routing.weights[:, 3].min()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_experts_permutes_their_weights(backbone, bank, kind):
    order = ("null", "single", "maths", "law")
    one = spectral_router(kind, backbone, bank, top_k=2, null="null").route(PROMPTS)
    other = spectral_router(kind, backbone, bank, order, top_k=2, null="null").route(PROMPTS)
    assert other.experts == order
    torch.testing.assert_close(other.aligned(bank.names).weights, one.weights)


def test_layers_that_no_routed_expert_changes_stay_as_they_are(backbone, bank):
    """`single` changes one layer; the bank's other experts, which are attached too, change all."""
    router = spectral_router("arrow", backbone, bank, ["single"])
    layers = ExpertLayers(backbone.model, bank.adapters)
    with torch.inference_mode(), layers.running(layers.gated(Gated((2,), router.gates), 1)):
        found = backbone.hidden(torch.tensor([PROMPTS[0].ids]))
    alone = ExpertLayers(backbone.model, [bank.adapters[2]])
    with torch.inference_mode(), alone.running(alone.gated(Gated((0,), router.gates), 1)):
        torch.testing.assert_close(found, backbone.hidden(torch.tensor([PROMPTS[0].ids])))


# -------------------------------------------------------------------------------------------------- the null expert


def away_from(gates: Gates, path: str) -> torch.Tensor:
    """A vector that no expert's prototype sees."""
    seen = gates.layers[path].flatten(0, -2)
    return normal(seen.shape[1], seed=4) @ (torch.eye(seen.shape[1]) - torch.linalg.pinv(seen) @ seen)


@pytest.mark.parametrize("kind", KINDS)
def test_the_null_expert_takes_what_no_expert_answers_and_leaves_what_one_does(backbone, bank, kind):
    gates = spectral_router(kind, backbone, bank, ["law", "maths"], top_k=1, null="null").gates
    assert gates.experts == ("law", "maths", "null")
    strange = away_from(gates, LAYER)
    strongest = torch.linalg.svd(delta(bank.adapters[1][LAYER])).Vh[0]
    found = gates.weigh(LAYER, torch.stack([strange, 100 * strange, strongest, -5 * strongest])[None]).weights
    assert found[0].tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_null_expert_changes_nothing_where_it_wins(backbone, bank, kind):
    pairs = [adapter.get(LAYER) for adapter in (bank.adapters[0], bank.adapters[1], {})]
    gates = spectral_router(kind, backbone, bank, ["law", "maths"], top_k=1, null="null").gates
    x = torch.stack([away_from(gates, LAYER), bank.adapters[0][LAYER].down[0]])[None]
    width = pairs[0].up.shape[1]
    update = add_weighted(torch.zeros(1, 2, width), x, stack(pairs), gates.weigh(LAYER, x).weights)
    assert update[0, 0].count_nonzero() == 0 and update[0, 1].count_nonzero() > 0


@pytest.mark.parametrize(("cosine", "winner"), [(0.29, "law"), (0.31, "null")])
def test_arrows_null_expert_wins_below_its_cosine(backbone, bank, cosine, winner):
    gates = spectral_router("arrow", backbone, bank, ["law"], top_k=1, null="null", null_cosine=cosine).gates
    aside = torch.nn.functional.normalize(away_from(gates, LAYER), dim=0)
    x = 7 * (0.3 * gates.layers[LAYER][0] - (1 - 0.3**2) ** 0.5 * aside)
    assert gates.experts[int(gates.weigh(LAYER, x[None, None]).weights.argmax())] == winner


@pytest.mark.parametrize(("cosine", "winner"), [(0.29, "maths"), (0.31, "null")])
def test_spectrs_null_expert_wins_below_its_share_of_the_strongest_answer(backbone, bank, cosine, winner):
    """The first expert's update, made ten times smaller, does not lower what the null expert asks of an answer."""
    weak = {path: LoraPair(pair.down, pair.up / 10) for path, pair in bank.adapters[0].items()}
    bank = ExpertBank(("weak", "maths", "null"), (weak, bank.adapters[1], {}))
    gates = spectral_router("spectr", backbone, bank, top_k=1, null="null", null_cosine=cosine).gates
    aside = torch.nn.functional.normalize(away_from(gates, LAYER), dim=0)
    strongest = torch.linalg.svd(delta(bank.adapters[1][LAYER])).Vh[0]
    x = 7 * (0.3 * strongest - (1 - 0.3**2) ** 0.5 * aside)
    assert gates.experts[int(gates.weigh(LAYER, x[None, None]).weights.argmax())] == winner


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_with_a_null_expert_answers_alike_alone_and_together(backbone, bank, kind):
    router = spectral_router(kind, backbone, bank, top_k=2, null="null", null_cosine=0.2)
    mixture = Mixture(backbone, bank, router, LayerCombiner(), PromptFormat(backbone.tokenizer, None), "test")
    questions = ["add 3 and 4", "SPELL AB NOW, and then some more"]
    together = mixture.generate(questions, max_new_tokens=4)
    alone = [mixture.generate([question], max_new_tokens=4)[0] for question in questions]
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, rel=1e-3, abs=1e-4)
        assert one.weights["null"] > 0 and sum(one.weights.values()) == pytest.approx(1)


# -------------------------------------------------------------------------------------------- records and bad input


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2, "temperature": 0.5, "null": "null", "null_cosine": 0.3}], ids=["plain", "all"]
)
def test_a_loaded_router_weighs_as_the_saved_one_and_has_no_files(backbone, bank, tmp_path, kind, options):
    router = spectral_router(kind, backbone, bank, ["maths", "law", "single"], **options)
    record = json.loads(json.dumps(router.save(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    again = load_router(record, RouterParts(tmp_path, tmp_path, backbone, bank))
    assert again.kind == kind and again.save(tmp_path) == record
    one, other = router.route(PROMPTS), again.route(PROMPTS)
    assert one.experts == other.experts and torch.equal(one.weights, other.weights)


def test_a_learned_gates_choice_is_saved_with_it(backbone, bank, tmp_path):
    shapes = linear_shapes(backbone.model)
    layers = {path: normal(2, shapes[path][0], seed=n) for n, path in enumerate(bank.adapters[0])}
    router = GateRouter(backbone, bank.adapters[:2], Gates(("law", "maths"), layers, top_k=1, temperature=3.0))
    record = json.loads(json.dumps(router.save(tmp_path)))
    parts = RouterParts(tmp_path, tmp_path, backbone, bank)
    again = load_router(record, parts)
    assert torch.equal(again.route(PROMPTS).weights, router.route(PROMPTS).weights)
    older = {"kind": record["kind"], "experts": record["experts"]}  # as it was written before gates could choose
    assert (load_router(older, parts).gates.top_k, load_router(older, parts).gates.temperature) == (None, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "arow"}, "no way to route by spectra is called 'arow'. Did you mean 'arrow'"),
        ({"top_k": 5}, "top_k of gates must be between 1 and 4 .*, got 5"),
        ({"top_k": 0}, "top_k of gates must be between 1 and 4 .*, got 0"),
        ({"temperature": 0.0}, "temperature of gates must be a number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature of gates must be a number above 0, got nan"),
        ({"null": "nul"}, "no expert is called 'nul'. Did you mean 'null'"),
        ({"null": "law"}, "'law' changes layers; name an empty expert"),
        ({"null": "null", "null_cosine": 0.0}, "cosine must be above 0 and at most 1, got 0.0"),
        ({"null": "null", "null_cosine": 1.5}, "cosine must be above 0 and at most 1, got 1.5"),
        ({"experts": ["law", "mahts"]}, "no expert is called 'mahts'. Did you mean 'maths'"),
        ({"experts": ["law", "law"]}, "experts need a name of their own each"),
        ({"experts": ["null"]}, "none of them changes any layer"),
    ],
    ids=str,
)
def test_bad_input_is_told(backbone, bank, options, message):
    with pytest.raises(CoterieError, match=message):
        spectral_router(**{"kind": "arrow", "backbone": backbone, "bank": bank, **options})


def test_a_score_that_does_not_exist_is_told():
    with pytest.raises(CoterieError, match="no score of gates is called 'liner'. Did you mean 'linear'"):
        Gates(("a",), {}, "liner")


@pytest.mark.parametrize("change", [{"null": 5}, {"top_k": "many"}, {"temperature": None}, {"experts": 3}], ids=str)
def test_a_broken_entry_is_told_by_its_kind(backbone, bank, tmp_path, change):
    record = {**spectral_router("arrow", backbone, bank).save(tmp_path), **change}
    with pytest.raises(CoterieError, match="the entry of the router 'arrow' is broken"):
        load_router(record, RouterParts(tmp_path, tmp_path, backbone, bank))
