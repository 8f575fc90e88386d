"""Layers with experts are one graph without a break."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import tiny
from coterie.backbone.gates import Gates
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_shapes
from coterie.backbone.row_mix import Gated
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
"""


def test_layers_with_experts_compile_to_one_graph():
    """In a process of its own, without the checks of types in tests, which would stand in every graph."""
    code = SCRIPT.format(tests=str(Path(__file__).parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines() == ["in order", "few experts a row", "gates"]
