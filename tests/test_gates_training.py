"""Mixtures that are trained inside the layers: the same numbers as PEFT's and as loops over tokens and experts."""

import copy
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import tiny
from coterie.artifacts import read_json, read_jsonl
from coterie.backbone.adding import Adding
from coterie.backbone.gates import Gates, Weighing
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_layers, linear_shapes
from coterie.backbone.loading import load_backbone
from coterie.backbone.row_mix import Gated
from coterie.data.batching import IGNORED, PromptFormat, TokenRow
from coterie.data.examples import load_examples
from coterie.errors import CoterieError
from coterie.experts import training
from coterie.experts.bank import ExpertBank, load_adapter, write_adapter
from coterie.experts.gated_model import GATES_ALONE, GatedModel, GateTraining, Tally, balance_loss
from coterie.experts.gates_training import collapsed, start_gates, train_mixture
from coterie.experts.trainer import TrainingCollator
from coterie.experts.training import train_adapter
from coterie.experts.training_plan import TrainingPlan, read_log
from coterie.lora import LoraPair
from coterie.routers.base import RouterParts
from coterie.routers.gate import GateRouter, spectral_router
from coterie.routers.table import load_router
from coterie.settings.groups import LoraSettings, ModelSettings
from helpers import normal

NAMES = ("law", "maths", "single")
LAYER = "model.layers.0.self_attn.q_proj"
PLAIN = GateTraining(dropout=0.0)
SCALING = 1.7


def plan(**changes) -> TrainingPlan:
    values = {"epochs": 2, "learning_rate": 5e-3, "batch_size": 4, "micro_batch_size": 2, "seed": 3}
    return TrainingPlan(**{**values, "report_to": "none", "label": "mixture", **changes})


def random_adapter(model, seed: int, rank: int, paths=None) -> dict[str, LoraPair]:
    shapes = linear_shapes(model)
    chosen = sorted(path for path in shapes if path.endswith(("q_proj", "down_proj"))) if paths is None else paths
    return {
        path: LoraPair(
            normal(rank, shapes[path][0], seed=seed + n),
            SCALING * (0.05 * normal(rank, shapes[path][1], seed=seed + n + 500)),
            SCALING,
        )
        for n, path in enumerate(chosen)
    }


@pytest.fixture(scope="module")
def adapters(backbone) -> tuple[dict[str, LoraPair], ...]:
    """Ranks 2, 4 and 1; the last one changes a single layer."""
    model = backbone.model
    return (random_adapter(model, 0, 2), random_adapter(model, 1000, 4), random_adapter(model, 2000, 1, [LAYER]))


@pytest.fixture(scope="module")
def rows(backbone) -> list[TokenRow]:
    prompts = PromptFormat(backbone.tokenizer, None)
    return [prompts.row(example) for example in load_examples(tiny.make_rows(9, seed=4))]


@pytest.fixture
def train(backbone, adapters, rows, tmp_path):
    """Train the three experts from some gates."""

    def trained(gates: Gates, training: GateTraining = PLAIN, folder: str = "mixture", **changes):
        return train_mixture(backbone, adapters, gates, rows, plan(**changes), tmp_path / folder, training)

    return trained


def batch_of(backbone, rows) -> dict[str, torch.Tensor]:
    collate = TrainingCollator(backbone.pad_id)
    batch = collate([{"input_ids": list(row.ids), "labels": row.labels()} for row in rows])
    return {name: tensor for name, tensor in batch.items() if name != "shift_labels"}


def random_gates(backbone, adapters, score: str = "linear", top_k: int | None = 2) -> Gates:
    gates = start_gates("random", backbone, adapters, NAMES, top_k=top_k, seed=1)
    return replace(gates, score=score, layers={path: 3 * gate for path, gate in gates.layers.items()})


def mean_loss(backbone, batch) -> torch.Tensor:
    """The loss of the batch under whatever is attached."""
    hidden = backbone.hidden(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
    logits = backbone.head(hidden[:, batch["logits_to_keep"]])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


# ------------------------------------------------------------------------------------------------ the forward pass


@pytest.mark.parametrize("score", ["linear", "arrow"])
@pytest.mark.parametrize("top_k", [1, 2, None], ids=str)
def test_loss_and_gradients_equal_a_loop_over_tokens_and_experts(backbone, adapters, rows, score, top_k):
    gates, batch = random_gates(backbone, adapters, score, top_k), batch_of(backbone, rows[:3])
    model = GatedModel(backbone, adapters, gates, PLAIN)
    model(**batch)["loss"].backward()
    leaves = {path: gate.clone().requires_grad_() for path, gate in gates.layers.items()}
    bare = [
        {path: [half.clone().requires_grad_() for half in (pair.down, pair.up / SCALING)] for path, pair in own.items()}
        for own in adapters
    ]

    def token(path: str, x: torch.Tensor) -> torch.Tensor:
        scores = [gate @ x if score == "linear" else (gate @ x).abs() for gate in leaves[path]]
        chosen = sorted(range(3), key=lambda expert: -float(scores[expert].detach()))[: top_k or 3]
        total = sum(scores[expert].exp() for expert in chosen)
        shares = [(scores[expert].exp() / total, bare[expert].get(path)) for expert in chosen]
        present = [share * SCALING * (pair[1].T @ (pair[0] @ x)) for share, pair in shares if pair]
        return sum(present) if present else torch.zeros(linear_shapes(backbone.model)[path][1])

    def loop(path: str, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return out + torch.stack([torch.stack([token(path, own) for own in row]) for row in x])

    with Adding(backbone.model, {path: partial(loop, path) for path in leaves})():
        expected = mean_loss(backbone, batch)
    expected.backward()
    assert float(model(**batch)["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for path, layer in zip(model.paths, model.mixed, strict=True):
        torch.testing.assert_close(layer.gate.grad, leaves[path].grad, rtol=1e-3, atol=1e-6)
        for expert, own in enumerate(bare):
            if path in own:
                down, up = (half.grad if half.grad is not None else 0 * half for half in own[path])
                torch.testing.assert_close(layer.down.grad[expert, : len(down)], down, rtol=1e-3, atol=1e-6)
                torch.testing.assert_close(layer.up.grad[expert, : len(up)], up, rtol=1e-3, atol=1e-6)


def test_the_trained_forward_pass_is_the_one_that_answers(backbone, adapters, rows):
    """Training computes all experts and weighs some with 0; answering computes the chosen alone."""
    gates, batch = random_gates(backbone, adapters), batch_of(backbone, rows)
    layers = ExpertLayers(backbone.model, adapters)
    with torch.inference_mode(), layers.running(layers.gated(Gated((0, 1, 2), gates), len(batch["input_ids"]))):
        expected = float(mean_loss(backbone, batch))
    found = GatedModel(backbone, adapters, gates, PLAIN)(**batch)["loss"]
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_choosing_all_experts_is_choosing_none(backbone, adapters, rows):
    batch = batch_of(backbone, rows[:4])
    losses = [
        GatedModel(backbone, adapters, random_gates(backbone, adapters, top_k=top_k), PLAIN)(**batch)["loss"].detach()
        for top_k in (None, 3, 2)
    ]
    assert torch.equal(losses[0], losses[1]) and abs(float(losses[0] - losses[2])) > 1e-3


def padded(batch: dict[str, torch.Tensor], width: int, pad_id: int) -> dict[str, torch.Tensor]:
    """More padding on the left, where training pads."""
    fill = {"input_ids": pad_id, "attention_mask": 0, "position_ids": 0}
    wider = {name: torch.nn.functional.pad(batch[name], (width, 0), value=value) for name, value in fill.items()}
    return {**batch, **wider, "logits_to_keep": batch["logits_to_keep"] + width}


def test_more_padding_changes_neither_the_loss_nor_the_load(backbone, adapters, rows):
    batch = batch_of(backbone, rows[:4])
    model = GatedModel(backbone, adapters, random_gates(backbone, adapters), replace(PLAIN, balance=3.0))
    found = []
    for each in (batch, padded(batch, 7, backbone.pad_id)):
        model.step.clear()
        loss = model(**each)["loss"].detach()
        found.append((loss, model.step.given.clone(), model.step.entropies.clone()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    tokens = float(batch["attention_mask"].sum())
    torch.testing.assert_close(found[0][1].sum(dim=1), torch.full((4,), tokens))


def test_dropout_is_on_the_experts_and_not_on_the_gates(backbone, adapters, rows):
    batch, gates = batch_of(backbone, rows[:2]), random_gates(backbone, adapters)
    model = GatedModel(backbone, adapters, gates, GateTraining(dropout=0.5))
    losses, first = [], []
    for mode in (True, False):
        model.train(mode).step.clear()
        losses.append(float(model(**batch)["loss"].detach()))
        first.append(model.step.given[model.paths.index(LAYER)].clone())
    assert abs(losses[0] - losses[1]) > 1e-3
    assert torch.equal(first[0], first[1]), "the first layer's gate reads what no expert has touched"
    plain = GatedModel(backbone, adapters, gates, PLAIN)(**batch)["loss"]
    assert losses[1] == float(plain.detach())


def test_gates_weigh_in_full_precision_where_the_rest_does_not(backbone, adapters, rows):
    batch = batch_of(backbone, rows[:2])
    model = GatedModel(backbone, adapters, random_gates(backbone, adapters), PLAIN)
    losses, first = [], []
    for enabled in (False, True):
        model.step.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(float(model(**batch)["loss"].detach()))
        first.append(model.step.given[model.paths.index(LAYER)].clone())
    assert losses[0] != losses[1]
    torch.testing.assert_close(first[0], first[1])


# ------------------------------------------------------------------------------------------------------- the start


def test_gates_of_zeros_weigh_all_alike(backbone, adapters):
    gates = start_gates("zeros", backbone, adapters, NAMES, top_k=None, seed=0)
    assert set(gates.layers) == {path for adapter in adapters for path in adapter} and gates.experts == NAMES
    x = normal(1, 2, tiny.WIDTH)
    torch.testing.assert_close(gates.weigh(LAYER, x).weights, torch.full((1, 2, 3), 1 / 3))


def test_random_gates_are_those_of_a_new_linear_layer(backbone, adapters):
    gates = start_gates("random", backbone, adapters, NAMES, top_k=2, seed=7)
    torch.manual_seed(7)
    shapes = linear_shapes(backbone.model)
    for path in sorted(gates.layers):
        assert torch.equal(gates.layers[path], torch.nn.Linear(shapes[path][0], 3, bias=False).weight)
    other = start_gates("random", backbone, adapters, NAMES, top_k=2, seed=8)
    assert not torch.equal(other.layers[LAYER], gates.layers[LAYER]) and gates.top_k == 2


@pytest.mark.parametrize("top_k", [2, None], ids=str)
def test_a_warm_start_is_arrow_and_training_goes_on_from_it(backbone, adapters, rows, train, top_k):
    gates = start_gates("arrow", backbone, adapters, NAMES, top_k=top_k, seed=0)
    arrow = spectral_router("arrow", backbone, ExpertBank(NAMES, adapters), top_k=top_k)
    routing = GateRouter(backbone, adapters, gates).route(rows)
    assert torch.equal(routing.weights, arrow.route(rows).weights)
    still = train(gates, learning_rate=0.0)
    assert all(torch.equal(still.gates.layers[path], gate) for path, gate in arrow.gates.layers.items())
    moved = train(gates).gates
    assert (moved.score, moved.top_k) == ("arrow", top_k)
    assert not torch.equal(moved.layers[LAYER], gates.layers[LAYER])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "zero"}, "no start of gates is called 'zero'. Did you mean 'zeros'"),
        ({"top_k": 4}, "top_k of gates must be between 1 and 3 .*, got 4"),
        ({"adapters": ({}, {}, {})}, "none of these changes any layer; add another expert"),
    ],
    ids=str,
)
def test_a_start_that_cannot_be_is_told(backbone, adapters, changes, message):
    given = {"kind": "zeros", "adapters": adapters, "names": NAMES, "top_k": 2, "seed": 0, **changes}
    with pytest.raises(CoterieError, match=message):
        start_gates(backbone=backbone, **given)


# ---------------------------------------------------------------------------------------------------- the training


def test_a_mixture_of_one_expert_is_trained_as_peft_trains_it(backbone, rows, tmp_path):
    """The first training makes an adapter with B other than 0; its scaling is 7 / 3. Adam turns rounding into steps."""
    lora = LoraSettings(rank=3, alpha=7, dropout=0.0)
    train_adapter(backbone, rows, plan(epochs=1), tmp_path / "start", lora)
    start = load_adapter(tmp_path / "start", backbone.model)
    slow = plan(learning_rate=1e-3)
    train_adapter(backbone, rows, slow, tmp_path / "peft", tmp_path / "start")
    wanted = load_adapter(tmp_path / "peft", backbone.model)
    gates = start_gates("random", backbone, [start], ["one"], top_k=None, seed=0)
    found = train_mixture(backbone, [start], gates, rows, slow, tmp_path / "mixture", PLAIN).adapters[0]
    assert list(found) == list(wanted)
    for path, pair in wanted.items():
        assert float((pair.down - start[path].down).abs().max()) > 1e-3
        torch.testing.assert_close(found[path].down, pair.down, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[path].up, pair.up, rtol=0, atol=1e-5)
    losses = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("peft", "mixture")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_experts_and_gates_are_trained_together_and_the_base_model_is_not(backbone, adapters, train):
    before = {name: parameter.clone() for name, parameter in backbone.model.named_parameters()}
    gates = random_gates(backbone, adapters)
    found = train(gates)
    assert all(torch.equal(before[name], p) for name, p in backbone.model.named_parameters())
    for own, start in zip(found.adapters, adapters, strict=True):
        assert list(own) == list(start), "no expert gains or loses a layer"
        for path, pair in own.items():
            assert pair.down.shape == start[path].down.shape and pair.scaling == SCALING
            assert not torch.equal(pair.down, start[path].down) and not torch.equal(pair.up, start[path].up)
    assert not any(torch.equal(found.gates.layers[path], gate) for path, gate in gates.layers.items())
    assert found.gates.top_k == 2 and found.gates.experts == NAMES


def test_gates_alone_leave_the_experts_as_they_are(backbone, adapters, train):
    gates = random_gates(backbone, adapters)
    found = train(gates, GATES_ALONE)
    for own, start in zip(found.adapters, adapters, strict=True):
        assert list(own) == list(start)
        assert all(torch.equal(own[path].down, start[path].down) for path in own)
        assert all(torch.equal(own[path].up, start[path].up) and own[path].scaling == SCALING for path in own)
    assert not any(torch.equal(found.gates.layers[path], gate) for path, gate in gates.layers.items())


def test_padding_of_ranks_and_missing_layers_stay_exactly_zero(backbone, adapters, rows):
    model = GatedModel(backbone, adapters, random_gates(backbone, adapters), PLAIN)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    for start in (0, 3, 6):
        optimiser.zero_grad()
        model(**batch_of(backbone, rows[start : start + 3]))["loss"].backward()
        optimiser.step()
    for path, layer in zip(model.paths, model.mixed, strict=True):
        ranks = [len(adapter[path].down) if path in adapter else 0 for adapter in adapters]
        assert layer.down.shape[1] == 4
        for expert, rank in enumerate(ranks):
            assert layer.down[expert, rank:].count_nonzero() == layer.up[expert, rank:].count_nonzero() == 0
            assert layer.up[expert, :rank].count_nonzero() == layer.up[expert, :rank].numel()


def test_a_layer_that_never_runs_inside_has_no_load_and_keeps_its_updates(backbone, rows, tmp_path):
    """The output layer stands behind the layers that experts are mixed in."""
    own = random_adapter(backbone.model, 0, 2, [LAYER, "lm_head"])
    gates = start_gates("zeros", backbone, [own, own], ["a", "b"], top_k=None, seed=0)
    found = train_mixture(backbone, [own, own], gates, rows, plan(epochs=1), tmp_path, PLAIN)
    assert list(found.load) == list(found.entropy) == [LAYER]
    assert torch.equal(found.adapters[0]["lm_head"].down, own["lm_head"].down)
    assert sum(read_log(tmp_path)[0]["expert_load"]) == pytest.approx(1, abs=1e-5)


def test_experts_are_trained_in_float32_on_a_base_model_of_half_the_bits(model_folder, adapters, rows, tmp_path):
    half = load_backbone(ModelSettings(model=str(model_folder), device="cpu", dtype="bfloat16"))
    found = train_mixture(half, adapters, random_gates(half, adapters), rows, plan(epochs=1), tmp_path, PLAIN)
    for own, start in zip(found.adapters, adapters, strict=True):
        for path, pair in own.items():
            assert pair.down.dtype == pair.up.dtype == found.gates.layers[path].dtype == torch.float32
            assert not torch.equal(pair.down, start[path].down)
            assert not torch.equal(pair.down, pair.down.bfloat16().float())


class StoppedError(BaseException):
    pass


def count_passes(patch, stop: int | None = None) -> list[int]:
    """Count forward passes of trainings, and interrupt the one after `stop` of them."""
    original, seen = GatedModel.forward, []

    def forward(self, *args, **kwargs):
        if len(seen) == stop:
            raise StoppedError
        seen.append(1)
        return original(self, *args, **kwargs)

    patch.setattr(GatedModel, "forward", forward)
    return seen


def stop_at_the_log(patch) -> None:
    """Interrupt the next training when all its epochs are over."""

    def refuse(*args):
        raise StoppedError

    patch.setattr(training, "write_jsonl", refuse)


@pytest.mark.parametrize(
    ("stop", "left"), [(lambda patch: count_passes(patch, 8), 5), (stop_at_the_log, 0)], ids=["midway", "at the end"]
)
def test_an_interrupted_training_goes_on_and_ends_the_same(
    backbone, adapters, train, tmp_path, monkeypatch, stop, left
):
    """Nine rows in micro-batches of 2 are 5 forward passes an epoch; dropout draws random numbers in each."""
    gates, training = random_gates(backbone, adapters), GateTraining(dropout=0.2)
    whole = train(gates, training, "whole")
    with monkeypatch.context() as patch:
        stop(patch)
        with pytest.raises(StoppedError):
            train(gates, training, "parts")
    assert len(list((tmp_path / "parts" / "trainer").glob("checkpoint-*"))) == 1
    with monkeypatch.context() as patch:
        passes = count_passes(patch)
        again = train(gates, training, "parts")
    assert len(passes) == left
    assert not (tmp_path / "parts" / "trainer").exists()
    for one, other in zip(again.adapters, whole.adapters, strict=True):
        assert all(torch.equal(one[path].down, pair.down) for path, pair in other.items())
        assert all(torch.equal(one[path].up, pair.up) for path, pair in other.items())
    assert all(torch.equal(again.gates.layers[path], gate) for path, gate in whole.gates.layers.items())
    assert all(torch.equal(again.load[path], load) for path, load in whole.load.items())
    assert again.entropy == whole.entropy
    logs = [read_log(tmp_path / name) for name in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 2 * 3


# ------------------------------------------------------------------------------------- load, entropy and the balance


def mean_load(backbone, adapters, gates, rows) -> torch.Tensor:
    """What a router sees in a pass of its own: (expert), the mean over layers and tokens."""
    lengths = torch.tensor([len(row.ids) for row in rows])[:, None]
    routing = GateRouter(backbone, adapters, gates).route(rows)
    return (routing.weights * lengths).sum(dim=0) / lengths.sum()


def test_every_step_logs_what_the_gates_gave(backbone, adapters, rows, train, tmp_path):
    """At a learning rate of 0 nothing moves; one step an epoch sees all rows."""
    gates = random_gates(backbone, adapters)
    found = train(gates, learning_rate=0.0, batch_size=9, micro_batch_size=3)
    expected = mean_load(backbone, adapters, gates, rows)
    entries = read_jsonl(tmp_path / "mixture" / "log.jsonl")
    assert len(entries) == 2
    for entry in entries:
        torch.testing.assert_close(torch.tensor(entry["expert_load"]), expected, rtol=1e-4, atol=1e-5)
        assert entry["gate_entropy"] == pytest.approx(sum(found.entropy.values()) / 4, rel=1e-4)
    assert list(found.load) == sorted(gates.layers)
    torch.testing.assert_close(torch.stack(list(found.load.values())).mean(dim=0), expected, rtol=1e-4, atol=1e-5)
    assert all(float(load.sum()) == pytest.approx(1, abs=1e-5) for load in found.load.values())


def test_a_steps_load_is_its_own_and_the_last_epochs_is_returned(backbone, adapters, rows, train, tmp_path):
    """One step an epoch: the second one starts where a training of one epoch ends."""
    gates = start_gates("zeros", backbone, adapters, NAMES, top_k=None, seed=0)
    options = {"learning_rate": 0.3, "batch_size": 9, "micro_batch_size": 9}
    after = mean_load(backbone, adapters, train(gates, GATES_ALONE, "one", epochs=1, **options).gates, rows)
    found = train(gates, GATES_ALONE, "two", epochs=2, **options)
    logged = [torch.tensor(entry["expert_load"]) for entry in read_log(tmp_path / "two")]
    torch.testing.assert_close(logged[0], torch.full((3,), 1 / 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logged[1], after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(list(found.load.values())).mean(dim=0), logged[1])
    assert float((logged[1] - logged[0]).abs().max()) > 0.01


def test_a_tally_of_worked_numbers():
    """Weights 1/2, 1/2 and 1, 0, and padding that would count: entropies log 2 and 0."""
    tally = Tally(2, 2)
    weights = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]])
    tally.count(1, weights, torch.tensor([[True, True, False]]))
    assert tally.load()[1].tolist() == [0.75, 0.25]
    assert float(tally.entropy()[1]) == pytest.approx(math.log(2) / 2)
    assert bool(tally.load()[0].isnan().all())
    tally.add(tally)
    assert tally.given[1].tolist() == [3.0, 1.0] and float(tally.entropies[1]) == pytest.approx(2 * math.log(2))
    tally.clear()
    assert tally.given.count_nonzero() == tally.entropies.count_nonzero() == 0


def weighing(logits: list[list[float]], top_k: int) -> Weighing:
    """What gates of the given logits make of one row: x is a token's number, one-hot."""
    gate = torch.tensor(logits).T
    gates = Gates(tuple(map(str, range(len(gate)))), {"x": gate}, top_k=top_k)
    return gates.weigh("x", torch.eye(len(logits))[None])


WORKED = [[math.log(2), 0.0, 0.0], [math.log(2), 0.0, 0.0], [0.0, math.log(2), 0.0]]
"""P is the mean of (2, 1, 1) / 4 twice and (1, 2, 1) / 4 once, (5, 4, 3) / 12; f is (2, 1, 0) / 3."""
EVEN = [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]


@pytest.mark.parametrize(
    ("logits", "top_k", "expected"),
    [
        (EVEN, 1, 1.0),
        ([[50.0, 0.0, 0.0]] * 3, 1, 3.0),
        ([[50.0, 0.0, 0.0]] * 3, 3, 1.0),
        ([[50.0, 0.0, 0.0]] * 3, 2, 1.5),  # f = 1/2, 1/2, 0 and P = 1, 0, 0
        (WORKED, 1, 3 * (2 / 3 * 5 / 12 + 1 / 3 * 4 / 12)),
    ],
    ids=["even", "collapsed", "all chosen", "two chosen", "worked"],
)
def test_the_balance_loss_of_worked_numbers(logits, top_k, expected):
    real = torch.ones(1, len(logits), dtype=torch.bool)
    assert float(balance_loss(weighing(logits, top_k), real)) == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_does_not_see_padding():
    real = torch.tensor([[True, True, True, False, False]])
    found = balance_loss(weighing([*WORKED, [0.0, 0.0, 50.0], [50.0, 0.0, 0.0]], 1), real)
    assert float(found) == pytest.approx(3.5 / 3, rel=1e-5)


def test_the_balance_loss_is_the_mean_over_layers_and_micro_batches_add_up(backbone, adapters, rows):
    gates, batch = random_gates(backbone, adapters), batch_of(backbone, rows[:4])
    layers = ExpertLayers(backbone.model, adapters)
    caught = []
    real = batch["attention_mask"].bool()

    def watch(path: str):
        return lambda module, inputs: caught.append(balance_loss(gates.weigh(path, inputs[0]), real))

    handles = [linear_layers(backbone.model)[path].register_forward_pre_hook(watch(path)) for path in gates.layers]
    with torch.no_grad(), layers.running(layers.gated(Gated((0, 1, 2), gates), len(batch["input_ids"]))):
        expected = mean_loss(backbone, batch) + 5 * torch.stack(caught).mean()
    for handle in handles:
        handle.remove()
    model = GatedModel(backbone, adapters, gates, replace(PLAIN, balance=5.0))
    found = model(**batch)["loss"].detach()
    torch.testing.assert_close(found, expected)
    half = model(**batch, num_items_in_batch=2 * (batch["labels"] != IGNORED).sum())["loss"].detach()
    torch.testing.assert_close(2 * half, found)


def test_balance_spreads_the_load(backbone, adapters, train):
    gates = replace(random_gates(backbone, adapters), top_k=1)
    even, free = (train(gates, replace(PLAIN, balance=balance), f"b{balance}", epochs=6) for balance in (3.0, 0.0))
    largest = [float(torch.stack(list(found.load.values())).max(dim=1).values.mean()) for found in (even, free)]
    assert largest[0] < largest[1] - 0.05


# ------------------------------------------------------------------------------------------------------- collapse


def leaning(backbone, adapters, expert: int) -> Gates:
    """Gates whose score |gate . x| is large for one expert, whatever x is."""
    layers = {path: torch.zeros_like(gate) for path, gate in random_gates(backbone, adapters).layers.items()}
    for path, gate in layers.items():
        gate[expert] = 1e3 * normal(gate.shape[1], seed=len(path))
    return Gates(NAMES, layers, "arrow", top_k=2)


def test_a_training_in_which_one_expert_takes_all_is_told(backbone, adapters, train):
    found = train(leaning(backbone, adapters, 1))
    assert collapsed(found.load, NAMES) == "maths"
    assert max(found.entropy.values()) < 0.1
    assert collapsed(train(random_gates(backbone, adapters), folder="other").load, NAMES) is None


def test_collapse_is_judged_on_the_mean_over_layers_and_needs_two_experts():
    one, other = torch.tensor([0.99, 0.01]), torch.tensor([0.8, 0.2])
    assert collapsed({"x": one, "y": other}, ["a", "b"]) is None  # 0.895
    assert collapsed({"x": one, "y": one, "z": other}, ["a", "b"]) == "a"  # 0.927
    assert collapsed({"x": torch.ones(1)}, ["a"]) is None


# ---------------------------------------------------------------------------------------------- writing and reading


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 7},
        {"r": 3, "lora_alpha": 7, "use_rslora": True},
        {"r": 3, "lora_alpha": 7, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.*.v_proj": 11}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_that_is_written_loads_the_same_here_and_in_peft(backbone, tmp_path, options):
    torch.manual_seed(5)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(copy.deepcopy(backbone.model), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    loaded = load_adapter(tmp_path / "peft", backbone.model)
    write_adapter(tmp_path / "own", read_json(tmp_path / "peft" / "adapter_config.json"), loaded)
    again = load_adapter(tmp_path / "own", backbone.model)
    assert list(again) == list(loaded)
    for path, pair in loaded.items():
        assert torch.equal(again[path].down, pair.down) and torch.equal(again[path].up, pair.up)
    ids = torch.tensor([[1, 2, 3, 4]])
    other = PeftModel.from_pretrained(copy.deepcopy(backbone.model), tmp_path / "own")
    with torch.inference_mode():
        torch.testing.assert_close(other(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_an_expert_whose_scaling_is_zero_changes_nothing_and_stays_finite(backbone, rows, tmp_path):
    shapes = linear_shapes(backbone.model)
    silent = {LAYER: LoraPair(normal(2, shapes[LAYER][0]), torch.zeros(2, shapes[LAYER][1]), 0.0)}
    gates = start_gates("zeros", backbone, [silent, silent], ["a", "b"], top_k=None, seed=0)
    found = train_mixture(backbone, [silent, silent], gates, rows, plan(epochs=1), tmp_path, PLAIN)
    assert found.adapters[0][LAYER].up.count_nonzero() == 0
    assert torch.equal(found.adapters[0][LAYER].down, silent[LAYER].down)


@pytest.mark.parametrize("score", ["linear", "arrow"])
def test_trained_gates_are_saved_with_their_score(backbone, adapters, rows, tmp_path, score):
    router = GateRouter(backbone, adapters, random_gates(backbone, adapters, score))
    record = json.loads(json.dumps(router.save(tmp_path)))
    assert record["score"] == score
    again = load_router(record, RouterParts(tmp_path, tmp_path, backbone, ExpertBank(NAMES, adapters)))
    assert again.kind == "gate" and torch.equal(again.route(rows).weights, router.route(rows).weights)


def test_gates_without_a_score_are_linear_and_others_are_told(backbone, adapters, tmp_path):
    parts = RouterParts(tmp_path, tmp_path, backbone, ExpertBank(NAMES, adapters))
    record = GateRouter(backbone, adapters, random_gates(backbone, adapters)).save(tmp_path)
    older = {key: value for key, value in record.items() if key != "score"}
    assert load_router(older, parts).gates.score == "linear"
    for score in ("spectr", "arow", 5):
        with pytest.raises(CoterieError, match=f"no score of gates is called '{score}'.* There are: arrow, linear"):
            load_router({**record, "score": score}, parts)
