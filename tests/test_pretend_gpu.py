"""A rehearsal for a GPU without one: nothing mixes devices, and this is all that the host waits for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.features.projection import PROJECTIONS
from coterie.routers.table import ROUTERS
from rehearsal import COMBINING, MODELS, SAMPLINGS

CHOICE = "to host engine/sampling.py:choose"
"""The tokens of a step with all that is told of them."""
GATES = "to host backbone/gates.py:mean"
"""What gates have weighed on average: once a piece of prompts, behind which routing tells it."""
SCORED = "to host engine/prompt_logprobs.py:score_prompts"
"""How likely all tokens of the prompts are that were read in a step."""
PROPOSED = "to host engine/proposing.py:_draft"
"""All tokens that a cheaper model proposes for the answers of a step."""
EMBEDDING, GRADIENT = "to host features/embedding.py:means", "to host features/growing_text.py:__call__"
"""Features of a batch of prompts."""
STATES = "to host features/prefill.py:prefill_states"
"""The same behind a block; whether a teacher is asked is decided on the host."""
BATCH = "to device experts/trainer.py:training_step"
"""transformers' copy of a batch to the device, one for each of its tensors."""

DECODING = [f"combiner {kind}" for kind in COMBINING] + [f"sampling {name}" for name in SAMPLINGS]
WAITS = {
    "gates top-1": {(GATES, CHOICE), (CHOICE,)},
    "gates top-None": {(GATES, CHOICE), (CHOICE,)},
    "re-routing, keep": {(EMBEDDING, CHOICE), (CHOICE,)},
    "re-routing, recompute": {(EMBEDDING, CHOICE), (CHOICE,)},
    **{f"proposed by {name}": {(CHOICE,), (PROPOSED, CHOICE)} for name in MODELS},
    "in steps of a fixed shape": {(CHOICE,)},
    "prompts that are scored, too": {(SCORED, CHOICE), (CHOICE,)},
    "scoring two texts under two votes": {("to host engine/scoring.py:on_host",)},
    **{f"gradient features, {projection}": {()} for projection in PROJECTIONS},
    "a training step": {(BATCH,) * 7},
    "a training step of gates": {(BATCH,) * 6},
}
ROUTING = {
    "fixed": (),
    "source": (),
    "gradient-centroids": (GRADIENT,),
    "embedding-centroids": (EMBEDDING,),
    "performance-centroids": (EMBEDDING,),
    "similarity": (EMBEDDING,),
    "loss": (GRADIENT,),
    "gate": (GATES,),
    "arrow": (GATES,),
    "spectr": (GATES,),
    "derived": (EMBEDDING,),
    "membership": (EMBEDDING,),
    "avengers": (EMBEDDING,),
    "lorauter": (EMBEDDING,),
    "ariadne": (EMBEDDING,),
    "logo": ("to host routers/logo.py:read",),
    "refusal": (STATES,),
    "prefill": (STATES,),
    "distilled": (STATES,),
    "token-level": (EMBEDDING,),
}
"""By kind of router, whatever the number of prompts in a batch."""


def in_a_process(*code: str) -> str:
    """What a script prints; all of torch is told of the device, so it has a process of its own."""
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, *code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{folder.parent / 'src'}:{folder}", "HOME": "/", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def rehearsal():
    return json.loads(in_a_process(str(Path(__file__).with_name("rehearsal.py"))))


@pytest.mark.parametrize("case", DECODING)
def test_a_step_waits_for_the_device_once(rehearsal, case):
    """However experts meet, tokens are chosen and proposed, also with rows of unequal length that come and go."""
    assert len(rehearsal[case]) > 3
    assert {tuple(step) for step in rehearsal[case]} == {(CHOICE,)}


@pytest.mark.parametrize("case", WAITS)
def test_what_else_is_waited_for_is_this(rehearsal, case):
    assert {tuple(step) for step in rehearsal[case]} == WAITS[case]


@pytest.mark.parametrize("kind", ROUTERS)
def test_routing_waits_for_the_device_once_a_batch(rehearsal, kind):
    """Every kind of router has its line in ROUTING and is made by `routers` in rehearsal.py."""
    assert rehearsal[f"router {kind}"] == [list(ROUTING[kind])]


PRETENDING = """
import json, torch, pretend_gpu
pretend_gpu.set_up()
gpu, found = pretend_gpu.PretendGpu(), {}
with gpu:
    there, host = torch.zeros(3, device=pretend_gpu.DEVICE), torch.zeros(3)
    places = torch.tensor([0, 1])
    ways = {
        "numbers": lambda: there + 1,
        "in advance": lambda: host.to(there.device, non_blocking=True),
        "to it": lambda: host.to(there.device),
        "from it": lambda: there.cpu(),
        "a list": lambda: torch.tensor([1], device=there.device),
        "places": lambda: there[places],
        "a part": lambda: there[:2].copy_(host[:2]),
        "both": lambda: there + host,
        "a number": lambda: there.sum().item(),
        "a decision": lambda: bool(there.any()),
        "a search": lambda: there.nonzero(),
        "a mask": lambda: there[there > 0],
    }
    for name, way in ways.items():
        with gpu.waits() as waits:
            try:
                way()
                error = ""
            except Exception as caught:
                error = type(caught).__name__
        found[name] = [*waits, error]
print(json.dumps(found))
"""


def test_the_pretend_gpu_tells_what_a_gpu_would_wait_for_or_refuse():
    found = json.loads(in_a_process("-c", PRETENDING))
    up, down = ["to device elsewhere", ""], ["to host elsewhere", ""]
    assert found.pop("numbers") == found.pop("in advance") == [""]
    assert [found.pop(name) for name in ("to it", "a list", "places", "a part")] == [up] * 4
    assert found.pop("from it") == down
    assert found.pop("both") == ["FakeTensorDeviceMismatchError"]
    assert all(own[0] in ("DataDependentOutputException", "DynamicOutputShapeException") for own in found.values())
