"""QLoRA: on a base model in 4 bits experts are trained, routed and combined as on its dequantised copy."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

import tiny
from conftest import write_rows
from coterie import methods
from coterie.artifacts import read_tensors
from coterie.backbone.int8 import Int8Linear
from coterie.backbone.loading import load_backbone
from coterie.combiners.table import COMBINERS
from coterie.data.examples import from_prompt
from coterie.methods.registry import train_extras
from coterie.mixture import Mixture
from coterie.settings.commands import TrainExtrasSettings
from coterie.settings.groups import ExtrasSettings, ModelSettings, PlacementSettings
from helpers import close, same_answers, table

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

FIT = {"clusters": 2, "cluster_rounds": 1, "d_proj": 64, "batch_size": 8, "epochs": 1, "expert_epochs": 1}
RATES = {"learning_rate": 1e-2, "expert_learning_rate": 5e-3}
HELD = table(("nf4", {"load_in_4bit": True}), ("int8", {"quantize": "int8"}))


def dequantised_weight(layer: nn.Module) -> torch.Tensor:
    """The weight that a quantised layer computes with, by the library's own reader."""
    if isinstance(layer, Int8Linear):
        return layer.dequantised()
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def dequantised(folder: Path, held: dict, output: Path) -> Path:
    """Save the model that a quantised one computes as, in float32."""
    quantised = load_backbone(ModelSettings(model=str(folder), device="cpu", dtype="float32", **held))
    plain = copy.deepcopy(load_backbone(ModelSettings(model=str(folder), device="cpu", dtype="float32")).model)
    for path, layer in quantised.model.named_modules():
        if isinstance(layer, (Int8Linear, bitsandbytes.nn.Linear4bit)):
            plain.get_submodule(path).weight.data = dequantised_weight(layer)
    plain.save_pretrained(output)
    quantised.tokenizer.save_pretrained(output)
    return output


@pytest.fixture(scope="module", params=[pytest.param(*row.values, id=row.id) for row in HELD])
def fits(request, model_folder, tmp_path_factory) -> tuple[Mixture, Mixture]:
    """The same fit on a quantised base and on its dequantised copy."""
    place = tmp_path_factory.mktemp("quantised")
    rows = str(write_rows(place / "rows.jsonl", tiny.make_rows(24)))
    plain = dequantised(model_folder, request.param, place / "plain")
    own = {"device": "cpu", "dtype": "float32", **FIT, **RATES}
    return (
        methods.elrea(str(model_folder), rows, output=place / "held", **own, **request.param),
        methods.elrea(str(plain), rows, output=place / "dequantised", **own),
    )


def test_a_fit_trains_and_describes_prompts_as_on_the_dequantised_base(fits):
    held, plain = (mixture.folder for mixture in fits)
    for name in ("experts/base", "experts/cluster-0", "experts/cluster-1"):
        found, wanted = (read_tensors(folder / name / "adapter_model.safetensors") for folder in (held, plain))
        assert found.keys() == wanted.keys()
        for key in wanted:
            close(found[key], wanted[key])
            assert "lora_B" not in key or bool(wanted[key].any())  # trained
    found, wanted = (read_tensors(folder / "features" / "features.safetensors") for folder in (held, plain))
    torch.testing.assert_close(found["features"], wanted["features"], rtol=1e-2, atol=1e-3)
    assert (held / "clusters.jsonl").read_text() == (plain / "clusters.jsonl").read_text()


@pytest.mark.parametrize("combiner", sorted(COMBINERS))
def test_every_combiner_answers_as_on_the_dequantised_base(fits, combiner):
    held, plain = (mixture.replace(router="uniform", combiner=combiner) for mixture in fits)
    if "int8" not in repr(held.backbone):
        same_answers(*(mixture.generate(["add 3 4"], max_new_tokens=4) for mixture in (held, plain)))
        return
    found, wanted = (mixture.generate(["add 3 4"], max_new_tokens=1)[0] for mixture in (held, plain))
    assert found.logprobs[0] == pytest.approx(wanted.logprobs[0], abs=0.05)  # what layers read is rounded to bfloat16


def test_gates_are_trained_as_on_the_dequantised_base(fits):
    tensors = []
    for mixture, own in zip(fits, (fits_held(fits[0]), {}), strict=True):
        placement = PlacementSettings(device="cpu", dtype="float32", **own)
        extras = ExtrasSettings(gate_learning_rate=1e-2)
        settings = TrainExtrasSettings(mixture=str(mixture.folder), methods="mole", placement=placement, extras=extras)
        train_extras(settings)
        tensors.append(read_tensors(next(mixture.folder.glob("methods/*/router/gates.safetensors"))))
    found, wanted = tensors
    assert found.keys() == wanted.keys() and any(bool(gate.any()) for gate in wanted.values())
    for key in wanted:
        close(found[key], wanted[key])


def fits_held(mixture: Mixture) -> dict:
    """How the base model of a fit is held, as settings say it."""
    return {"quantize": "int8"} if "int8" in repr(mixture.backbone) else {"load_in_4bit": True}


def test_prompts_are_routed_as_on_the_dequantised_base(fits):
    found, wanted = (mixture.route(["add 3 4", "SPELL ABCD NOW"]).weights for mixture in fits)
    close(found, wanted)


def test_experts_on_a_four_bit_base_equal_peft_on_it(run_folder):
    mixture = Mixture.from_pretrained(run_folder, device="cpu", dtype="float32", load_in_4bit=True)
    assert any(type(m).__name__ == "Linear4bit" for m in mixture.backbone.model.modules())
    answer = mixture.replace(router="cluster-1").generate(["add 3 4"], max_new_tokens=5)[0]
    weights = mixture.route(["add 3 4", "SPELL ABCD NOW"]).weights
    assert weights.shape == (2, 4) and bool((weights > 0).all())
    ids = list(mixture.prompts.row(from_prompt("add 3 4")).ids)
    peft = PeftModel.from_pretrained(mixture.backbone.model, run_folder / "experts" / "cluster-1").eval()
    for token, logprob in zip(answer.token_ids, answer.logprobs, strict=True):
        with torch.no_grad():
            expected = peft(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(0)
        assert token == int(expected.argmax())
        assert logprob == pytest.approx(float(expected[token]), abs=1e-3)
        ids.append(token)
