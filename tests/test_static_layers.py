"""Layers with experts are one graph without a break, and so is a step of decoding."""

import subprocess
import sys
from pathlib import Path

KINDS = ["in order", "few experts a row", "gates"]
SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import tiny
from coterie.backbone.gates import Gates
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_shapes
from coterie.backbone.model import Backbone, BaseModelIdentity
from coterie.backbone.row_mix import Gated
from coterie.backbone.slots import Slots
from coterie.backbone.span import Span
from coterie.lora import LoraPair

model = tiny.make_model(259).requires_grad_(False).eval()
shapes = {{path: shape for path, shape in linear_shapes(model).items() if path != "lm_head"}}
adapters = [{{p: LoraPair(torch.randn(2, i), torch.randn(2, o)) for p, (i, o) in shapes.items()}} for _ in range(3)]
gates = Gates(tuple("abc"), {{path: torch.randn(3, width) for path, (width, _) in shapes.items()}}, top_k=1)
layers, ids = ExpertLayers(model, adapters), torch.arange(21).view(3, 7)
few = torch.tensor([[0.0, 0.5, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.2]])
mixes = {{
    "in order": layers.weighted(torch.eye(3)),
    "few experts a row": layers.weighted(few),
    "gates": layers.gated(Gated((0, 1, 2), gates), 3),
}}
for name, mix in mixes.items():
    with torch.inference_mode(), layers.running(mix):
        wanted = model.model(input_ids=ids, use_cache=False).last_hidden_state
        torch._dynamo.reset()
        read = lambda x: model.model(input_ids=x, use_cache=False).last_hidden_state
        found = torch.compile(read, fullgraph=True, backend="eager")(ids)
    torch.testing.assert_close(found, wanted)
    print(name)

backbone = Backbone(model, tiny.make_tokenizer(), BaseModelIdentity("tiny", None, "x"))
slots, tokens = Slots(backbone), torch.tensor([[5], [6], [7]])
running = lambda places: layers.running(mixes["in order"])
rows = slots.claim(3)
slots.read(rows, ids, [7, 5, 6], running)
wanted = slots.read(rows, tokens, None, running)
slots.rollback(rows, [7, 5, 6])
span = Span(0, [7, 5, 6], [1, 1, 1], 1, tokens.device)
slots.cache.begin(span)
masks = slots.cache.masks()
span.places(slots.cache.columns)
with torch.inference_mode(), running(rows):
    torch._dynamo.reset()
    read = lambda x: backbone.hidden(x, masks, span.positions, slots.cache)
    found = torch.compile(read, fullgraph=True, backend="eager")(tokens)
torch.testing.assert_close(found, wanted)
print("a decoding step of rows of unequal length")
"""


def test_layers_with_experts_compile_to_one_graph():
    """In a process of its own, without the checks of types in tests, which would stand in every graph."""
    code = SCRIPT.format(tests=str(Path(__file__).parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines() == [*KINDS, "a decoding step of rows of unequal length"]
