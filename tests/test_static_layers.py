"""Layers with experts are one graph without a break, and so is a step of decoding, whoever joins or leaves."""

import subprocess
import sys
from pathlib import Path

KINDS = ["in order", "few experts a row", "gates"]
SCRIPT = """
import random, sys, torch
sys.path.insert(0, {tests!r})
import tiny
from coterie.backbone.gates import Gates
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_shapes
from coterie.backbone.model import Backbone, BaseModelIdentity
from coterie.backbone.row_mix import Gated
from coterie.combiners.table import make_combiner
from coterie.data.batching import TokenRow
from coterie.engine import speculation
from coterie.engine.engine import Engine
from coterie.engine.request import Request
from coterie.lora import LoraPair
from coterie.routers.base import Routing
from coterie.settings.sampling import SamplingSettings

tiny.LAYERS = 1
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
torch._dynamo.reset()
torch._dynamo.config.recompile_limit = 1000
graphs, shapes, taken = [], [], []

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

def record(run):
    shapes.append(run)
    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=False)
    def again():
        taken.append(len(graphs))
        return compiled()
    return again

def answered(record):
    engine, draw, found = Engine(backbone, layers, places=2, record=record), random.Random(0), {{}}
    gated = Routing(tuple("abc"), torch.ones(1, 3), gates=gates)
    while len(found) < 40 or not engine.is_idle:
        if len(found) < 40 and draw.random() < 0.4:
            size, kind = draw.randint(2, 40), draw.choice(["logits", "layers", "gates"])
            weights = Routing(tuple("abc"), torch.tensor([[draw.random() + 0.1 for _ in range(3)]]))
            prompt = TokenRow(tuple(draw.choices(range(256), k=size)), size, (False,) * size, (True,) * size)
            routing, combiner = (gated, "layers") if kind == "gates" else (weights, kind)
            settings = SamplingSettings(speculate=draw.choice(["off", "lookup"]), temperature=draw.choice([0.0, 1.0]))
            request = Request(prompt, routing, make_combiner(combiner), draw.randint(2, 24), (settings,))
            found[engine.submit(request)] = []
        for token in engine.step():
            found[token.request].append(token.id)
    return list(found.values())

speculation.PassCosts.of = lambda self, rows, positions: 1.0 + (positions > 2)  # no more than one is proposed
speculation.PassCosts.knows = lambda self, rows: True
wanted = answered(None)
assert answered(record) == wanted
print(f"{{len(shapes)}} shapes, {{len(graphs)}} graphs, taken {{len(taken)}} times")
"""


def test_layers_with_experts_compile_to_one_graph_and_decoding_to_one_for_each_shape():
    """In a process of its own, without the checks of types in tests, which would stand in every graph."""
    code = SCRIPT.format(tests=str(Path(__file__).parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    *kinds, decoding = result.stdout.splitlines()
    assert kinds == KINDS
    shapes, graphs, times = (int(word) for word in decoding.split() if word.isdigit())
    assert graphs == shapes < 16 < 100 < times, decoding
