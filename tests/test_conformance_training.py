"""Architectures whose layers are unlike Llama's: training, features, gates and every choice of rows, against PEFT.

Each reference reads one row alone, without a cache or padding; ours reads rows of unequal length together.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import architectures
import tiny
from conftest import write_rows
from coterie import methods
from coterie.artifacts import read_json
from coterie.backbone.gates import Gates
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_layers
from coterie.backbone.model import Backbone, BaseModelIdentity
from coterie.backbone.row_mix import Gated
from coterie.data.batching import IGNORED, PromptFormat, TokenRow, pad
from coterie.data.examples import load_examples
from coterie.errors import CoterieError
from coterie.experts import fresh_adapter
from coterie.experts.bank import CONFIG_FILE, load_adapter, write_adapter
from coterie.experts.checkpoint import load_checkpoint
from coterie.experts.fresh_adapter import check_fresh_adapter
from coterie.experts.gated_model import GatedModel, GateTraining
from coterie.experts.gates_training import start_gates
from coterie.experts.plain_adapter import write_null_adapter
from coterie.experts.target_layers import is_transposed, layers_to_change, unchangeable
from coterie.experts.trainer import TrainingCollator
from coterie.experts.training import train_adapter
from coterie.experts.training_plan import TrainingPlan
from coterie.features.gradient import AdamState, Checkpoint, GradientFeatures, Moments, adam_step
from coterie.lora import Adapter, LoraPair
from coterie.settings.groups import FeatureSettings, LoraSettings
from helpers import KeepsEverything, autograd_gradients, normal, peft_factors, save_adapter, table
from tiny import delta

UNLIKE_LLAMA = (
    "deepseek_v3",
    "falcon",
    "gpt2",
    "gpt_oss",
    "jamba",
    "llama4_text",
    "mixtral",
    "opt",
    "phi3",
    "phimoe",
    "qwen2_moe",
    "qwen3_next",
)
NAMES = ("a", "b", "c")
WEIGHTS = torch.tensor([[0.5, 0.3, 0.2], [-0.2, 0.7, 0.5], [0.0, 1.0, 0.0]])
"""Of three rows over three experts."""


IDENTITY = BaseModelIdentity("random", None, "0" * 64)


@dataclass(frozen=True)
class Place:
    """A base model with three experts, of unequal ranks and layers, saved by PEFT, and some rows."""

    backbone: Backbone
    folder: Path
    adapters: list[Adapter]
    rows: list[TokenRow]


def make_backbone(name: str) -> Backbone:
    model = architectures.make_model(name).requires_grad_(False)
    return Backbone(model, tiny.make_tokenizer(), IDENTITY)


def some_rows(backbone: Backbone, count: int) -> list[TokenRow]:
    return [PromptFormat(backbone.tokenizer).row(example) for example in load_examples(tiny.make_rows(count))]


@pytest.fixture(scope="module", params=UNLIKE_LLAMA)
def place(request, tmp_path_factory) -> Place:
    backbone = make_backbone(request.param)
    layers = layers_to_change(backbone.model, "all-linear")
    configs = [
        {"r": 2, "lora_alpha": 3, "target_modules": layers},
        {"r": 4, "lora_alpha": 4, "target_modules": layers[::2]},
        {"r": 1, "lora_alpha": 2, "target_modules": layers, "use_rslora": True},
    ]
    folder = tmp_path_factory.mktemp(request.param)
    for seed, (expert, config) in enumerate(zip(NAMES, configs, strict=True)):
        transposed = is_transposed(backbone.model, layers)
        save_adapter(backbone.model, folder / expert, {**config, "fan_in_fan_out": transposed}, seed)
    adapters = [load_adapter(folder / expert, backbone.model) for expert in NAMES]
    return Place(backbone, folder, adapters, some_rows(backbone, 4))


def read_together(place: Place, rows: list[TokenRow]) -> list[torch.Tensor]:
    """The last hidden states of rows read in one batch, padded on the left as when they are answered."""
    batch = pad([row.ids for row in rows], place.backbone.tokenizer.pad_token_id, side="left")
    with torch.inference_mode():
        hidden = place.backbone.hidden(*batch)
    return [states[-len(row.ids) :] for row, states in zip(rows, hidden, strict=True)]


def read_alone(model: PreTrainedModel, row: TokenRow) -> torch.Tensor:
    with torch.inference_mode():
        return Backbone(model, tiny.make_tokenizer(), IDENTITY).hidden(torch.tensor([row.ids]))[0]


def same_states(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@contextmanager
def gated_densely(place: Place, gates: Gates) -> Iterator[None]:
    """Every vector that a layer reads gets the softmax of its own scores over the dense updates: no rows, no shapes."""

    def add(path, module, inputs, output):
        x = inputs[0]
        updates = [delta(adapter[path]) if path in adapter else None for adapter in place.adapters]
        shares = (x @ gates.layers[path].T).softmax(dim=-1)
        return output + sum(shares[..., [n]] * (x @ u.T) for n, u in enumerate(updates) if u is not None)

    modules = linear_layers(place.backbone.model)
    handles = [modules[path].register_forward_hook(partial(add, path)) for path in gates.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------------------------------------- choices of rows


def test_each_row_runs_its_own_expert_as_in_peft(place):
    layers = ExpertLayers(place.backbone.model, place.adapters)
    order = [0, 1, 1, 2]  # unequal counts
    with layers.running(layers.weighted(torch.eye(3)[order])):
        found = read_together(place, place.rows)
    wanted = []
    for expert, row in zip(order, place.rows, strict=True):
        model = PeftModel.from_pretrained(copy.deepcopy(place.backbone.model), place.folder / NAMES[expert])
        wanted.append(read_alone(model.eval().base_model.model, row))
    same_states(found, wanted)


def test_each_row_runs_a_mixture_of_its_own_as_in_peft(place):
    rows = place.rows[:3]
    model = PeftModel.from_pretrained(copy.deepcopy(place.backbone.model), place.folder / "a", adapter_name="a")
    for expert in NAMES[1:]:
        model.load_adapter(place.folder / expert, adapter_name=expert)
    wanted = []
    for number, (row, weights) in enumerate(zip(rows, WEIGHTS.tolist(), strict=True)):
        used = {expert: weight for expert, weight in zip(NAMES, weights, strict=True) if weight}
        model.base_model.add_weighted_adapter(list(used), list(used.values()), f"mixed{number}", "cat")
        model.set_adapter(f"mixed{number}")
        wanted.append(read_alone(model.eval().base_model.model, row))
    layers = ExpertLayers(place.backbone.model, place.adapters)
    with layers.running(layers.weighted(WEIGHTS)):
        same_states(read_together(place, rows), wanted)


@pytest.mark.parametrize("top_k", [None, 3])
def test_gates_weigh_every_token_of_every_row(place, top_k):
    gates = random_gates(place)
    layers = ExpertLayers(place.backbone.model, place.adapters)
    with layers.running(layers.gated(Gated((0, 1, 2), replace(gates, top_k=top_k)), len(place.rows))):
        found = read_together(place, place.rows)
    with gated_densely(place, gates):
        same_states(found, [read_alone(place.backbone.model, row) for row in place.rows])


def random_gates(place: Place) -> Gates:
    return start_gates("random", place.backbone, place.adapters, NAMES, top_k=None, seed=0)


# --------------------------------------------------------------------------------------------------- training


PLAN = TrainingPlan(
    epochs=2,
    learning_rate=0.01,
    batch_size=3,
    micro_batch_size=2,
    seed=1,
    report_to="none",
    label="x",
    keep_epochs=True,
)


def test_an_adapter_is_trained_in_every_layer_and_reads_back_in_peft_and_here(place, tmp_path):
    train_adapter(place.backbone, place.rows, PLAN, tmp_path, LoraSettings(rank=2, dropout=0))
    adapter = load_adapter(tmp_path, place.backbone.model)
    assert set(adapter) == set(layers_to_change(place.backbone.model, "all-linear"))
    assert all(pair.up.any() for pair in adapter.values())
    layers = ExpertLayers(place.backbone.model, [adapter])
    with layers.running(layers.weighted(torch.ones(1, 1))):
        found = [read_alone(place.backbone.model, row) for row in place.rows]
    model = PeftModel.from_pretrained(copy.deepcopy(place.backbone.model), tmp_path).eval().base_model.model
    same_states(found, [read_alone(model, row) for row in place.rows])
    write_adapter(tmp_path / "ours", read_json(tmp_path / CONFIG_FILE), adapter)
    model = PeftModel.from_pretrained(copy.deepcopy(place.backbone.model), tmp_path / "ours").eval().base_model.model
    same_states(found, [read_alone(model, row) for row in place.rows])
    checkpoint = load_checkpoint(tmp_path / "epoch-1", place.backbone.model)
    features = GradientFeatures(place.backbone, [checkpoint], FeatureSettings(d_proj=16))(place.rows)
    assert features.isfinite().all() and (features.norm(dim=1) > 0).all()


class Indexed(nn.Module):
    """Feeds forward as much as an index says, to which no gradient leads."""

    def __init__(self) -> None:
        super().__init__()
        self.index, self.proj = nn.Linear(32, 2), nn.Linear(32, 32)

    def forward(self, x):
        return self.proj(x) * self.index(x).argmax(dim=-1, keepdim=True)


def test_a_layer_without_a_gradient_is_left_as_it_starts(tmp_path):
    backbone = make_backbone("llama")
    backbone.model.model.layers[0].mlp = Indexed().requires_grad_(False)
    check_fresh_adapter(backbone, LoraSettings(rank=2))
    rows = some_rows(backbone, 4)
    train_adapter(backbone, rows, PLAN, tmp_path, LoraSettings(rank=2, dropout=0))
    checkpoint = load_checkpoint(tmp_path / "epoch-1", backbone.model)
    assert not checkpoint.adapter["model.layers.0.mlp.index"].up.any()
    assert checkpoint.adapter["model.layers.0.mlp.proj"].up.any()
    assert not checkpoint.adam.moments["model.layers.0.mlp.index.lora_B"].square.any()
    features = GradientFeatures(backbone, [checkpoint], FeatureSettings(d_proj=16))(rows)
    assert features.isfinite().all()


def test_training_goes_on_from_an_adapter_of_somebody_else(place, tmp_path):
    train_adapter(place.backbone, place.rows, replace(PLAN, keep_epochs=False), tmp_path, place.folder / "b")
    trained, start = load_adapter(tmp_path, place.backbone.model), place.adapters[1]
    assert set(trained) == set(start)
    assert all(not torch.equal(trained[path].up, start[path].up) for path in start)


@pytest.mark.parametrize("name", architectures.WORKING)
def test_the_loss_is_the_mean_over_all_labelled_tokens(name):
    """Logits are asked for where some row has a label, and the labels that go with them are shifted already."""
    backbone = make_backbone(name)
    rows = some_rows(backbone, 3)
    features = [{"input_ids": list(row.ids), "labels": row.labels()} for row in rows]
    batch = TrainingCollator(backbone.tokenizer.pad_token_id)(features)
    states = torch.cat([read_alone(backbone.model, row) for row in rows])
    labels = torch.tensor([label for row in rows for label in [*row.labels()[1:], IGNORED]])
    wanted = nn.functional.cross_entropy(backbone.head(states), labels)
    with torch.inference_mode():
        torch.testing.assert_close(backbone.model(**batch).loss, wanted, rtol=1e-3, atol=1e-4)
        of_a_part = backbone.model(**batch, num_items_in_batch=2 * (labels != IGNORED).sum()).loss
    torch.testing.assert_close(of_a_part, wanted / 2, rtol=1e-3, atol=1e-4)


def test_gates_are_trained_on_what_they_compute_when_answering(place):
    """The loss of the model that is trained equals the one of the attached gates."""
    gates = random_gates(place)
    batch = TrainingCollator(place.backbone.tokenizer.pad_token_id)(
        [{"input_ids": list(row.ids), "labels": row.labels()} for row in place.rows]
    )
    model = GatedModel(place.backbone, place.adapters, gates, GateTraining(dropout=0.0))
    loss = model(**batch)["loss"]
    layers = ExpertLayers(place.backbone.model, place.adapters)
    with layers.running(layers.gated(Gated((0, 1, 2), gates), len(place.rows))):
        states = read_together(place, place.rows)
    labels = torch.tensor([label for row in place.rows for label in [*row.labels()[1:], IGNORED]])
    wanted = torch.nn.functional.cross_entropy(place.backbone.head(torch.cat(states)), labels)
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-4)
    loss.backward()
    assert all(layer.gate.grad.any() for layer in model.mixed)


# --------------------------------------------------------------------------------------------------- features


def some_checkpoint(backbone: Backbone, folder: Path) -> Checkpoint:
    """An adapter with some state of Adam."""
    adapter = load_adapter(folder, backbone.model)
    moments = {}
    for number, (path, pair) in enumerate(sorted(adapter.items())):
        for half, shape in {"A": pair.down.shape, "B": pair.up.T.shape}.items():
            mean, square = normal(*shape, seed=number) * 0.01, normal(*shape, seed=number + 99).square() * 1e-3
            moments[f"{path}.lora_{half}"] = Moments(mean, square)
    return Checkpoint(adapter, AdamState(moments, steps=3, learning_rate=0.1, betas=(0.9, 0.999), eps=1e-8))


def check_features(backbone: Backbone, folder: Path, rows: list[TokenRow], form: str, *, last: bool = True) -> None:
    """Every row's feature is what autograd and Adam give on this row alone, whatever stands beside it.

    Also, if asked for, where the last block alone counts, whose graph starts at its own input.
    """
    checkpoint = some_checkpoint(backbone, folder)
    layout = KeepsEverything({name: moments.mean.numel() for name, moments in checkpoint.adam.moments.items()})
    model, parameters = peft_factors(backbone.model, folder)
    assert set(parameters) == set(layout.offsets)
    gradients = [autograd_gradients(model, parameters, row) for row in rows]
    for blocks, counted in [("all", backbone.blocks), ("last:1", backbone.blocks[-1:])][: 1 + last]:
        settings = FeatureSettings(form=form, feature_batch_size=len(rows), blocks=blocks)
        features = GradientFeatures(backbone, [checkpoint], settings)
        features.projection = layout
        features.settings = settings.model_copy(update={"d_proj": layout.d_proj})
        inside = set(counted.modules())
        for own, found in zip(gradients, features(rows), strict=True):
            for name, gradient in own.items():
                if backbone.model.get_submodule(name.rpartition(".")[0]) in inside:
                    wanted = gradient if form == "sgd" else adam_step(gradient, name, checkpoint.adam)
                else:
                    wanted = torch.zeros_like(gradient)
                got = found[layout.offsets[name] :][: wanted.numel()].view(wanted.shape)
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", architectures.WORKING)
def test_features_are_those_of_autograd_on_each_row_alone(name, tmp_path):
    backbone = make_backbone(name)
    layers = layers_to_change(backbone.model, "all-linear")
    transposed = is_transposed(backbone.model, layers)
    save_adapter(backbone.model, tmp_path, {"r": 2, "target_modules": layers, "fan_in_fan_out": transposed})
    check_features(backbone, tmp_path, some_rows(backbone, 3), "sgd")


@pytest.fixture
def shared(tmp_path) -> Backbone:
    """A model whose two blocks are fed forward by one module, and an adapter of it in `tmp_path`."""
    backbone = make_backbone("llama")
    backbone.model.model.layers[1].mlp = backbone.model.model.layers[0].mlp
    save_adapter(backbone.model, tmp_path, {"r": 2, "target_modules": ["down_proj", "up_proj"]})
    return backbone


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # those of the second name
def test_a_module_that_runs_twice_has_the_gradient_of_the_sum(shared, tmp_path):
    """Adam's step of a sum is not the sum of the steps."""
    check_features(shared, tmp_path, some_rows(shared, 3), "adam", last=False)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_module_counts_only_where_it_runs_in_the_blocks_that_count(shared, tmp_path):
    checkpoint = some_checkpoint(shared, tmp_path)
    settings = FeatureSettings(form="sgd", blocks="last:1", d_proj=64)
    features = GradientFeatures(shared, [checkpoint], settings)
    model, parameters = peft_factors(shared.model, tmp_path)
    start = lambda _, inputs: (inputs[0].detach().requires_grad_(), *inputs[1:])  # noqa: E731
    model.base_model.model.model.layers[1].register_forward_pre_hook(start)
    for row in some_rows(shared, 2):
        own = autograd_gradients(model, parameters, row)
        wanted = sum(features.projection(name, gradient.flatten()[None]) for name, gradient in own.items())
        torch.testing.assert_close(features([row]), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


# ------------------------------------------------------------------------------------------- what adapters change


@pytest.mark.parametrize("name", architectures.WORKING)
def test_a_fresh_adapter_is_written_and_read_back_before_training(name):
    backbone = make_backbone(name)
    check_fresh_adapter(backbone, LoraSettings(rank=2))
    assert not any("lora" in path for path, _ in backbone.model.named_modules())


LEFT_OUT = table(
    ("nothing", "llama", ()),
    ("transposed layers stay in", "gpt2", ()),
    (
        "fused experts",
        "mixtral",
        ("model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj (is no linear layer)",),
    ),
    (
        "a router that returns more than its product",
        "phimoe",
        ("model.layers.*.mlp.router (returns something else than one product)", "(is no linear layer)"),
    ),
    ("a weight that is used alone", "jamba", ("model.layers.*.mamba.dt_proj (never runs)",)),
    (
        "names that PEFT takes for experts",
        "deepseek_v3",
        ("model.layers.*.mlp.shared_experts.gate_proj", "(is taken by PEFT for a part"),
    ),
    ("what PEFT refuses", "falcon_h1", ("model.layers.*.mamba.out_proj (is refused by PEFT)",)),
)


@pytest.mark.parametrize(("name", "said"), LEFT_OUT)
def test_what_adapters_leave_as_it_is_is_said_in_one_line(name, said, caplog):
    check_fresh_adapter(make_backbone(name), LoraSettings(rank=2))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("coterie")]
    assert len(lines) == (1 if said else 0)
    assert all(part in lines[0] for part in said)


def test_what_sees_pictures_is_left_as_it_is(tmp_path, caplog):
    """PEFT's own all-linear changes the vision tower, which no text trains."""
    text = {**architectures.SIZES, "num_hidden_layers": 2}
    vision = {key: architectures.SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    vision |= {"num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    backbone = Backbone(AutoModelForCausalLM.from_config(config).eval(), tiny.make_tokenizer(), IDENTITY)
    check_fresh_adapter(backbone, LoraSettings(rank=2))
    assert "model.vision_tower.encoder.layers.*.mlp.fc1" in caplog.text
    train_adapter(backbone, some_rows(backbone, 2), PLAN, tmp_path, LoraSettings(rank=2))
    adapter = load_checkpoint(tmp_path / "epoch-1", backbone.model).adapter
    assert {path.split(".")[1] for path in adapter} == {"language_model"}


REFUSED = table(
    ("unknown name", "q_poj", "no linear layer is called 'q_poj'. Did you mean 'q_proj'?"),
    ("the output layer", "lm_head", "adapters cannot change lm_head of this model (is the output layer)"),
    ("a router", "router", "adapters cannot change router of this model (returns something else than one product)"),
    ("an empty name", "q_proj,", "no linear layer is called ''"),
)


@pytest.mark.parametrize(("target_modules", "message"), REFUSED)
def test_layers_that_cannot_be_changed_are_refused_by_name(target_modules, message):
    with pytest.raises(CoterieError) as refusal:
        check_fresh_adapter(make_backbone("phimoe"), LoraSettings(target_modules=target_modules))
    assert message in str(refusal.value)


def test_named_layers_are_those_whose_path_ends_so():
    model = architectures.make_model("llama")
    assert layers_to_change(model, "1.self_attn.q_proj, down_proj") == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_an_adapter_that_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    data, output = tmp_path / "rows.jsonl", tmp_path / "run"
    write_rows(data, tiny.make_rows(6))
    monkeypatch.setattr(fresh_adapter, "load_adapter", lambda *_: {})
    with pytest.raises(CoterieError, match="could not be trained and read back: other layers were read back"):
        methods.elrea(str(tiny.save_model(tmp_path / "model")), str(data), output=output, device="cpu", clusters=2)
    assert not output.exists()


class SentTokensOnly(nn.Module):
    """Experts in a list, each of which sees the tokens that are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        flat, result = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        for number, expert in enumerate(self.experts):
            sent = flat[:, 0] > 0 if number else flat[:, 0] <= 0
            result[sent] = expert(flat[sent])
        return result.view_as(x)


def test_layers_whose_vectors_cannot_be_told_apart_are_left_out_and_refused(tmp_path):
    backbone = make_backbone("llama")
    backbone.model.model.layers[0].mlp = SentTokensOnly()
    paths = [f"model.layers.0.mlp.experts.{n}" for n in range(2)]
    found = unchangeable(backbone.model)
    assert found == {**dict.fromkeys(paths, "does not read every token"), "lm_head": "is the output layer"}
    adapter = {paths[0]: LoraPair(torch.ones(1, 32), torch.ones(1, 32))}
    layers = ExpertLayers(backbone.model, [adapter])
    with (
        pytest.raises(CoterieError, match=r"cannot change the layer model\.layers\.0\.mlp\.experts\.0, which reads"),
        layers.running(layers.weighted(torch.ones(2, 1))),
    ):
        backbone.hidden(torch.arange(14).view(2, 7))
    write_adapter(tmp_path, {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": paths[:1]}, adapter)
    with pytest.raises(CoterieError, match=r"experts\.0 does not read every token, so experts cannot change it"):
        load_adapter(tmp_path, backbone.model)


def test_an_adapter_of_a_layer_that_never_runs_is_taken_since_it_changes_nothing(tmp_path):
    """PEFT's own all-linear changes Jamba's dt_proj, of which the model reads the weight alone."""
    backbone = make_backbone("jamba")
    path = "model.layers.0.mamba.dt_proj"
    shape = backbone.model.get_submodule(path).weight.shape
    adapter = {path: LoraPair(normal(2, shape[1]), normal(2, shape[0]))}
    write_adapter(tmp_path, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [path]}, adapter)
    row = some_rows(backbone, 1)[0]
    layers = ExpertLayers(backbone.model, [load_adapter(tmp_path, backbone.model)])
    with layers.running(layers.weighted(torch.ones(1, 1))):
        found = read_alone(backbone.model, row)
    torch.testing.assert_close(found, read_alone(backbone.model, row))
    model = PeftModel.from_pretrained(copy.deepcopy(backbone.model), tmp_path).eval().base_model.model
    torch.testing.assert_close(found, read_alone(model, row))


class PositionsFirst(nn.Module):
    """Hands its layer every token, but those of all rows at one position together."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        return self.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


def test_a_layer_that_reads_rows_in_another_order_is_left_out():
    model = architectures.make_model("llama")
    model.model.layers[0].mlp = PositionsFirst()
    assert unchangeable(model)["model.layers.0.mlp.layer"] == "does not read tokens in the order of rows"
    assert "model.layers.1.mlp.up_proj" not in unchangeable(model)


def test_layers_that_peft_reads_under_another_name_are_left_as_they_are(caplog):
    """Its renaming of Laguna's `shared_expert` also finds the `shared_experts` of today."""
    sizes = {**architectures.SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = AutoConfig.for_model("laguna", **sizes, shared_expert_intermediate_size=16)
    backbone = Backbone(AutoModelForCausalLM.from_config(config).eval(), tiny.make_tokenizer(), IDENTITY)
    check_fresh_adapter(backbone, LoraSettings(rank=2))
    assert "model.layers.*.mlp.shared_experts.down_proj (is taken by PEFT for a part" in caplog.text
    assert "model.layers.1.self_attn.q_proj" in layers_to_change(backbone.model, "all-linear")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # what PEFT says of it
def test_an_adapter_that_peft_attaches_elsewhere_is_no_start_of_a_training(tmp_path):
    """PEFT takes these names for parts of fused experts and only warns: the training would start from nothing."""
    backbone = make_backbone("deepseek_v3")
    paths = [f"model.layers.1.mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj")]
    adapter = {path: LoraPair(normal(2, 32), normal(2, 16)) for path in paths}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": paths}
    write_adapter(tmp_path / "start", config, adapter)
    layers = ExpertLayers(backbone.model, [load_adapter(tmp_path / "start", backbone.model)])
    with layers.running(layers.weighted(torch.ones(2, 1))):
        backbone.hidden(torch.arange(14).view(2, 7))  # here it runs
    with pytest.raises(CoterieError, match="PEFT does not attach"):
        train_adapter(backbone, some_rows(backbone, 2), PLAN, tmp_path / "out", tmp_path / "start")


def test_the_null_adapter_of_transposed_layers_is_read_by_peft(tmp_path):
    backbone = make_backbone("gpt2")
    write_null_adapter(backbone, tmp_path)
    assert read_json(tmp_path / CONFIG_FILE)["fan_in_fan_out"]
    ids = torch.arange(14).view(2, 7)
    model = PeftModel.from_pretrained(copy.deepcopy(backbone.model), tmp_path).eval()
    torch.testing.assert_close(model(ids).logits, backbone.model(ids).logits)
    assert not any(pair.up.any() for pair in load_adapter(tmp_path, backbone.model).values())
