"""What a GPU would do, on a pretend one; prints what the host waits for in each case, as JSON.

It runs in a process of its own, since all of torch is told of the device (see test_pretend_gpu.py).
"""

import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from peft import get_peft_model

import pretend_gpu
import tiny
from coterie.backbone.gates import Gates
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_shapes
from coterie.backbone.model import Backbone, BaseModelIdentity
from coterie.backbone.prototypes import PROTOTYPES
from coterie.combiners.table import COMBINERS, make_combiner
from coterie.data.batching import TokenRow
from coterie.engine.engine import Engine
from coterie.engine.request import Failure, Request, Rerouting
from coterie.engine.scoring import score_votes
from coterie.experts.bank import ExpertBank
from coterie.experts.fresh_adapter import lora_config
from coterie.experts.gated_model import GatedModel, GateTraining
from coterie.experts.trainer import make_trainer
from coterie.experts.training_plan import TrainingPlan
from coterie.features.gradient import AdamState, Checkpoint, GradientFeatures, Moments
from coterie.features.growing_text import FeatureExtractor
from coterie.features.prefill import middle_layers
from coterie.features.projection import PROJECTIONS
from coterie.lora import MERGES, LoraPair
from coterie.routers.base import Router, Routing
from coterie.routers.centroid import CentroidRouter
from coterie.routers.derived import DerivedRouter
from coterie.routers.distilled import DistilledRouter, ErrorCurve
from coterie.routers.familiarity import Familiarity
from coterie.routers.feature import growing_text_extractor, middle_extractor, prefill_extractor
from coterie.routers.fixed import SourceRouter, uniform
from coterie.routers.gate import GATE, GateRouter, spectral_router
from coterie.routers.logo import LogoRouter
from coterie.routers.loss import LossRouter, Ridge
from coterie.routers.membership import MembershipRouter, Scale
from coterie.routers.refusal import Calibration, Observed, RefusalRouter
from coterie.routers.score_table import ARIADNE, AVENGERS, LORAUTER, Pieces, ScoreTableRouter
from coterie.routers.token import TokenLevel
from coterie.settings.groups import FeatureSettings, LoraSettings
from coterie.settings.sampling import SamplingSettings

NAMES = ("a", "b", "c")
RANK = 4
COMBINING = (*COMBINERS, *(f"weights:{merge}" for merge in (*MERGES, "svd")))
GREEDY = SamplingSettings()
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SamplingSettings(temperature=0.7, top_p=0.9, top_k=30, min_p=0.1, top_logprobs=2),
    "penalised": SamplingSettings(repetition_penalty=1.2, presence_penalty=0.5, logit_bias={3: 1}),
    "speculating": SamplingSettings(speculate="lookup"),
    "speculating, penalised": SamplingSettings(speculate="lookup", repetition_penalty=1.2, logit_bias={3: 1}),
}
MODELS = {
    "base": SamplingSettings(speculate="base", temperature=0.7),
    "merged": SamplingSettings(speculate="merged", repetition_penalty=1.2),
    "blocks:1": SamplingSettings(speculate="blocks:1"),
}
IDENTITY = BaseModelIdentity("tiny", None, "x")


def row(prompt: int, answer: int = 0, source: str | None = None) -> TokenRow:
    """A prompt of so many tokens, and an answer."""
    size = prompt + answer
    told = (False,) * prompt + (True,) * answer
    return TokenRow(tuple(range(5, 5 + size)), prompt, told, tuple(not own for own in told), source=source)


def engine_steps(gpu: pretend_gpu.PretendGpu, engine: Engine, requests: list[Request]) -> list[list[str]]:
    """What the host waits for in every step until all is answered."""
    for request in requests:
        engine.submit(request)
    steps = []
    while not engine.is_idle:
        with gpu.waits() as waits:
            found = engine.step()
        steps.append(waits)
        for token in found:
            if isinstance(token, Failure):
                raise token.error
        PROPOSED.append(sum(token.speculated[0] for token in found))
    return steps


PROPOSED: list[int] = []


def rehearse() -> dict[str, list[list[str]]]:
    """What the host waits for, by case and step."""
    pretend_gpu.set_up()
    gpu = pretend_gpu.PretendGpu()
    tokenizer = tiny.make_tokenizer()
    two_blocks = tiny.make_model(len(tokenizer)).eval().requires_grad_(False)
    tiny.LAYERS = 1
    model = tiny.make_model(len(tokenizer)).eval().requires_grad_(False)
    shapes = {path: shape for path, shape in linear_shapes(model).items() if path != "lm_head"}
    adapters = [
        {p: LoraPair(torch.randn(RANK, i), torch.randn(RANK, o)) for p, (i, o) in shapes.items()} for _ in NAMES
    ]
    on_cpu = Backbone(tiny.make_model(len(tokenizer)).requires_grad_(False), tokenizer, IDENTITY)
    peft = get_peft_model(on_cpu.model, lora_config(on_cpu, LoraSettings(rank=2)))
    found: dict[str, list[list[str]]] = {}
    with gpu:
        model.to(pretend_gpu.DEVICE)
        backbone = Backbone(model, tokenizer, IDENTITY)
        found |= decoding(gpu, backbone, adapters)
        found |= routing(gpu, backbone, adapters)
        two_blocks.to(pretend_gpu.DEVICE)
        found |= proposing(gpu, Backbone(two_blocks, tokenizer, IDENTITY), adapters)
        peft.to(pretend_gpu.DEVICE)
        trained = Backbone(on_cpu.model, tokenizer, IDENTITY)
        found["a training step"] = training(gpu, trained, peft)
        gates = Gates(NAMES, {path: torch.zeros(3, width) for path, (width, _) in shapes.items()}, top_k=2)
        gated = GatedModel(backbone, adapters, gates, GateTraining(balance=0.1))
        found["a training step of gates"] = training(gpu, backbone, gated)
    return found


def decoding(gpu, backbone, adapters) -> dict[str, list[list[str]]]:
    """Steps of every combiner, way of sampling, and of gates; and scoring."""
    layers, found = ExpertLayers(backbone.model, adapters), {}
    even = Routing(NAMES, torch.ones(1, len(NAMES)))

    def steps(routing, combiner="logits", sampling=GREEDY, lengths=(7,), draws=1, scored=None, tokens=8):
        asked = [(row(n), routing, make_combiner(combiner), tokens, (sampling,) * draws) for n in lengths]
        requests = [Request(*own, prompt_logprobs=scored) for own in asked]
        return engine_steps(gpu, Engine(backbone, layers, places=4), requests)

    for kind in COMBINING:
        found[f"combiner {kind}"] = steps(even, kind, tokens=4)
    for name, sampling in SAMPLINGS.items():
        PROPOSED.clear()
        found[f"sampling {name}"] = steps(even, sampling=sampling, lengths=(7, 9), draws=2)  # rows of unequal length
        assert any(PROPOSED) == name.startswith("speculating"), name
    widths = {path: width for path, (width, _) in linear_shapes(backbone.model).items() if path != "lm_head"}
    for top_k in (1, None):
        gates = Gates(NAMES, {path: torch.randn(3, width) for path, width in widths.items()}, top_k=top_k)
        gated = Routing(NAMES, torch.ones(1, len(NAMES)), gates=gates.to(backbone.device))
        found[f"gates top-{top_k}"] = steps(gated, "layers", lengths=(7, 9))
    requests = [Request(row(n), even, make_combiner("logits"), 8, (SAMPLINGS["speculating"],)) for n in (7, 9)]
    engine = Engine(backbone, layers, record=lambda run: run)
    found["in steps of a fixed shape"] = engine_steps(gpu, engine, requests)
    found["prompts that are scored, too"] = steps(even, lengths=(130, 9), scored=2)
    with gpu.waits() as waits:
        score_votes(backbone, layers, NAMES, [row(6, 3), row(5, 2)], torch.ones(2, 2, 3), "")
    return found | {"scoring two texts under two votes": [waits]}


def proposing(gpu, backbone, adapters) -> dict[str, list[list[str]]]:
    """Steps with tokens that cheaper models propose; the experts change the first block alone."""
    layers, even, found = ExpertLayers(backbone.model, adapters), Routing(NAMES, torch.ones(1, len(NAMES))), {}
    for name, sampling in MODELS.items():
        PROPOSED.clear()
        requests = [Request(row(n), even, make_combiner("logits"), 8, (sampling,)) for n in (7, 9)]
        found[f"proposed by {name}"] = engine_steps(gpu, Engine(backbone, layers), requests)
        assert any(PROPOSED), name
    return found


def routing(gpu, backbone, adapters) -> dict[str, list[list[str]]]:
    """Gradient features, and prompts routed by every kind of router."""
    prompts, found = [row(5, source="x"), row(9, source="x"), row(7, source="x")], {}
    shapes = {f"{path}.lora_A": pair.down.shape for path, pair in adapters[0].items()}
    shapes |= {f"{path}.lora_B": pair.up.T.shape for path, pair in adapters[0].items()}
    moments = {n: Moments(*(torch.rand(*shape, device=backbone.device) for _ in "ms")) for n, shape in shapes.items()}
    point = Checkpoint(adapters[0], AdamState(moments, 3, 1e-3, (0.9, 0.999), 1e-8))
    for projection in PROJECTIONS:
        settings = FeatureSettings(d_proj=16, projection=projection, feature_batch_size=2)
        gradients = GradientFeatures(backbone, [point], settings)
        with gpu.waits() as waits:
            gradients(prompts)
        found[f"gradient features, {projection}"] = [waits]
    bank = ExpertBank(NAMES, tuple(adapters))
    for router in routers(backbone, bank, FeatureExtractor("gradient", gradients, {"features": {"d_proj": 16}})):
        others = [replace(prompt) for prompt in prompts]  # or states of the router before would do
        with gpu.waits() as waits, torch.no_grad():
            router.route(others)
        found[f"router {router.kind}"] = [waits]
        if router.every is not None:
            rerouting = Rerouting(router.growing, router.weigh, NAMES, router.every, router.cache == "recompute")
            requests = [Request(row(n), rerouting, make_combiner("layers"), 6) for n in (5, 7)]
            engine = Engine(backbone, ExpertLayers(backbone.model, adapters))
            found[f"re-routing, {router.cache}"] = engine_steps(gpu, engine, requests)
    return found


def routers(backbone: Backbone, bank: ExpertBank, gradients: FeatureExtractor) -> list[Router]:
    """One of every kind."""
    hidden, encoder = growing_text_extractor("hidden", 32, backbone)
    own = {name: torch.rand(2, encoder.dimensions) for name in NAMES}
    embedding = FeatureExtractor("embedding", encoder.rows, {"encoder": "hidden"}, encoder)
    widths = {path: pair.down.shape[1] for path, pair in bank.adapters[0].items()}
    gates = Gates(NAMES, {path: torch.randn(3, width) for path, width in widths.items()})
    similarity = CentroidRouter.by_similarity(hidden, own)
    states = prefill_extractor(backbone, 1, "mean")
    embedded, by_states = torch.rand(3, encoder.dimensions), Ridge(torch.rand(3, states.dimensions), torch.rand(3))
    middle = middle_extractor(backbone, middle_layers(backbone))
    familiar, known = (Familiarity(torch.eye(d)[:2], torch.ones(2)) for d in (middle.dimensions, states.dimensions))
    seen = Observed(torch.ones(2), torch.ones(2))
    curve = ErrorCurve(torch.zeros(1), torch.zeros(1))
    return [
        uniform(NAMES),
        SourceRouter({"x": "a"}),
        CentroidRouter.by_cluster(gradients, torch.rand(3, 16), NAMES),
        CentroidRouter.by_cluster(embedding, torch.rand(3, encoder.dimensions), NAMES),
        CentroidRouter.by_performance(embedding, own),
        similarity,
        LossRouter(gradients, Ridge(torch.rand(3, 16), torch.rand(3)), NAMES, 2.0),
        GateRouter(backbone, bank.adapters, gates, GATE),
        *(spectral_router(kind, backbone, bank) for kind in PROTOTYPES),
        LogoRouter(backbone, bank),
        DerivedRouter(similarity, top_k=1, normalised=True),
        MembershipRouter(embedding, embedded, Scale(torch.ones(3), torch.zeros(3)), NAMES),
        *(
            ScoreTableRouter(kind, embedding, Pieces(embedded), torch.rand(3, 3), NAMES)
            for kind in (AVENGERS, LORAUTER, ARIADNE)
        ),
        LossRouter(states, by_states, NAMES, 2.0),
        RefusalRouter(LossRouter(states, by_states, NAMES, 2.0), familiar, Calibration(seen, seen), "a", 0.1, middle),
        DistilledRouter(similarity, states, by_states, NAMES, known, curve),
        TokenLevel(similarity, 2, "keep"),
        TokenLevel(similarity, 2, "recompute"),
    ]


def training(gpu, backbone, model) -> list[list[str]]:
    """Two steps of the trainer: a pass over a batch, the gradients' length, and the optimiser."""
    plan = TrainingPlan(1, 1e-3, 2, 2, 0, "none", "x")
    rows = [row(6, 3), row(5, 2)]
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(backbone, model, rows, plan, Path(folder), ExitStack())
        trainer.create_optimizer_and_scheduler(2)
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(len(rows))])
        for _ in range(2):
            with gpu.waits() as waits:
                trainer.training_step(model, dict(batch), torch.tensor(5))
                trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
            steps.append(waits)
    return steps


if __name__ == "__main__":
    json.dump(rehearse(), sys.stdout)
