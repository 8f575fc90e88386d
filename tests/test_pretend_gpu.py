"""A rehearsal for a GPU without one: nothing mixes devices, and a step copies to the host once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import json, sys
import torch
import pretend_gpu, tiny
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.model import Backbone, BaseModelIdentity
from coterie.combiners.table import make_combiner
from coterie.data.batching import TokenRow
from coterie.engine.engine import Engine
from coterie.engine.request import Failure, Request
from coterie.lora import LoraPair
from coterie.routers.base import Routing
from coterie.settings.sampling import SamplingSettings

pretend_gpu.set_up()
tokenizer = tiny.make_tokenizer()
model = tiny.make_model(len(tokenizer)).eval().requires_grad_(False)
linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
adapter = {n: LoraPair(torch.randn(4, m.in_features), torch.randn(4, m.out_features)) for n, m in linear.items()}
sampling = {
    "greedy": SamplingSettings(speculate="lookup"),
    "sampled": SamplingSettings(temperature=1.0, top_p=0.9, top_k=30, min_p=0.1, top_logprobs=2),
    "penalised": SamplingSettings(speculate="lookup", repetition_penalty=1.2, presence_penalty=0.5, logit_bias={3: 1}),
}
ids = tuple(range(5, 12))
prompt = TokenRow(ids, len(ids), (False,) * len(ids), (True,) * len(ids))
gpu, found = pretend_gpu.PretendGpu(), {}
with gpu, torch.no_grad():
    model.to("pretend:0")
    backbone = Backbone(model, tokenizer, BaseModelIdentity("tiny", None, "x"))
    layers = ExpertLayers(model, [adapter] * 3)
    for combiner in ("logits", "layers", "weights"):
        for name, own in sampling.items():
            engine = Engine(backbone, layers)
            routing = Routing(("a", "b", "c"), torch.ones(1, 3))
            engine.submit(Request(prompt, routing, make_combiner(combiner), 14, (own,)))
            steps = []
            while not engine.is_idle:
                gpu.copies.clear()
                tokens = engine.step()
                failed = [repr(token.error) for token in tokens if isinstance(token, Failure)]
                drafts = sum(token.speculated[0] for token in tokens if not isinstance(token, Failure))
                steps.append({"failed": failed, "copies": list(gpu.copies), "drafts": drafts})
            found[f"{combiner} {name}"] = steps
print(json.dumps(found))
"""
CASES = [
    f"{combiner} {name}" for combiner in ("logits", "layers", "weights") for name in ("greedy", "sampled", "penalised")
]


@pytest.fixture(scope="module")
def rehearsal():
    """In a process of its own, since all of torch is told of the device."""
    folder = Path(__file__).parent
    path = f"{folder.parent / 'src'}:{folder}"
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": path, "HOME": "/"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_step_copies_to_the_host_once_and_mixes_no_devices(rehearsal, case):
    steps = rehearsal[case]
    assert len(steps) > 1 and not any(step["failed"] for step in steps)
    assert {tuple(step["copies"]) for step in steps} == {("engine/sampling.py:choose",)}


def test_steps_with_proposals_were_among_them(rehearsal):
    assert any(step["drafts"] for step in rehearsal["logits greedy"])
