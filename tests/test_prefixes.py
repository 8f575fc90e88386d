"""Beginnings of texts that are kept: shared where everything that made them is equal, and nowhere else."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import architectures
import tiny
from coterie.backbone import probe
from coterie.backbone.gates import Gates
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.model import Backbone, BaseModelIdentity
from coterie.backbone.row_cache import SPARE
from coterie.backbone.row_mix import Gated, RequestRows
from coterie.backbone.slots import Slots
from coterie.combiners.table import make_combiner
from coterie.data.batching import TokenRow
from coterie.engine.engine import Engine
from coterie.engine.request import Request
from coterie.engine.row_keys import row_keys
from coterie.lora import Adapter, LoraPair
from coterie.routers.base import Routing
from coterie.settings.sampling import SamplingSettings

A, B = [[1.0, 0.0]], [[0.0, 1.0]]
MIXED, OTHERWISE, TOGETHER = [[0.5, 0.5]], [[0.25, 0.75]], [[1.0, 0.0], [0.0, 1.0]]
ROOM = 2**26


def make_backbone(name: str) -> Backbone:
    model = architectures.make_model(name)
    return probe.checked(Backbone(model, tiny.make_tokenizer(), BaseModelIdentity("some/model", None, "0")))


def expert(backbone: Backbone, seed: int) -> Adapter:
    torch.manual_seed(seed)
    shapes = {name: module for name, module in backbone.model.named_modules() if name.endswith(("q_proj", "v_proj"))}
    return {n: LoraPair(torch.randn(2, m.in_features), 0.3 * torch.randn(2, m.out_features)) for n, m in shapes.items()}


class Reader:
    """Requests that are read through slots which keep what they have read, and are asked for it before."""

    def __init__(self, name: str, budget: int | None = None, prefixes: int = ROOM) -> None:
        self.backbone = make_backbone(name)
        self.slots = Slots(self.backbone, budget, prefixes)
        self.count = 0

    def read(self, layers: ExpertLayers, plan: RequestRows, tokens: list[int]) -> Tensor:
        """The last states of a text in every row, of which only what was not recalled is read."""
        rows, keys = self.slots.claim(len(plan.votes)), row_keys(layers, plan)
        known = self.slots.recall(rows, keys, tokens)
        self.count = len(tokens) - known
        piece = torch.tensor([tokens[known:]] * len(rows))
        hidden = self.slots.read(rows, piece, running=lambda _: layers.running(layers.mix([plan])))
        self.slots.keep(rows, keys, tokens)
        self.slots.release(rows)
        return hidden[:, -1]

    @torch.inference_mode()
    def cold(self, layers: ExpertLayers, plan: RequestRows, tokens: list[int]) -> Tensor:
        """The same without anything that was read before."""
        with layers.running(layers.mix([plan])):
            return self.backbone.hidden(torch.tensor([tokens] * len(plan.votes)))[:, -1]

    def check(self, layers: ExpertLayers, weights: list[list[float]], tokens: list[int], read: int, **plan) -> None:
        request = RequestRows(torch.tensor(weights), torch.ones(len(weights)), **plan)
        wanted = self.cold(layers, request, tokens)
        torch.testing.assert_close(self.read(layers, request, tokens), wanted, rtol=1e-3, atol=1e-4)
        assert self.count == read


def drawn(size: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(size)]


def test_a_long_prompt_is_shared_where_all_that_made_it_is_equal_and_nowhere_else():
    reader, prompt = Reader("llama"), drawn(600)
    bank = ExpertLayers(reader.backbone.model, [expert(reader.backbone, seed) for seed in (1, 2)])
    replaced = ExpertLayers(reader.backbone.model, [expert(reader.backbone, seed) for seed in (3, 2)])
    whole = len(prompt)
    for weights in (A, B, MIXED, OTHERWISE):
        reader.check(bank, weights, prompt, whole)
    reader.check(replaced, A, prompt, whole)
    reader.check(replaced, MIXED, prompt, whole)
    reader.check(bank, MIXED, prompt, whole, merge="svd")
    for weights in (A, B, MIXED, OTHERWISE):
        reader.check(bank, weights, prompt, 1)
    reader.check(replaced, B, prompt, 1)  # the same expert in another bank
    reader.check(bank, TOGETHER, prompt, 1)  # each row of its own
    reader.check(bank, A, [*prompt[:300], *drawn(50, seed=1)], 50)
    reader.check(bank, A, drawn(50, seed=2), 50)


@pytest.fixture
def layers() -> ExpertLayers:
    pairs = LoraPair(torch.ones(2, 4), torch.ones(2, 4)), LoraPair(torch.zeros(2, 4), torch.ones(2, 4))
    return ExpertLayers(architectures.make_model("llama"), [{"lm_head": pair} for pair in pairs])


def test_keys_differ_in_all_that_a_row_runs_and_in_nothing_else(layers):
    gates = Gates(("a", "b"), {"a": torch.eye(2, 4)})
    plain = RequestRows(torch.tensor([[0.5, 0.5]]), torch.ones(1))

    def key(plan: RequestRows, adapters: ExpertLayers = layers) -> str:
        return row_keys(adapters, plan)[0]

    def with_expert(pair: LoraPair, path: str = "lm_head") -> ExpertLayers:
        return ExpertLayers(layers.model, [{path: pair}, layers.adapters[1]])

    own = layers.adapters[0]["lm_head"]
    gated = [
        replace(plain, gates=Gated((0, 1), own_gates))
        for own_gates in (
            gates,
            Gates(("a", "b"), {"a": torch.eye(2, 4) * 2}),
            Gates(("a", "b"), {"b": torch.eye(2, 4)}),
            Gates(("a", "b"), {"a": torch.eye(2, 4)}, score="arrow"),
            Gates(("a", "b"), {"a": torch.eye(2, 4)}, top_k=1),
            Gates(("a", "b"), {"a": torch.eye(2, 4)}, temperature=2.0),
            Gates(("a", "b"), {"a": torch.eye(2, 4)}, floors={"a": torch.ones(2)}),
        )
    ]
    keys = [
        key(plain),
        key(replace(plain, weights=torch.tensor([[0.5, torch.tensor(0.5).nextafter(torch.tensor(1.0))]]))),
        key(replace(plain, weights=torch.tensor([[0.5, 0.0]]))),
        key(replace(plain, merge="svd")),
        *map(key, gated),
        key(replace(plain, gates=Gated((1, 0), gates))),
        key(plain, with_expert(LoraPair(own.down, own.up.double().float() * (1 + 2**-20)))),
        key(plain, with_expert(LoraPair(own.down, own.up, 2.0))),
        key(plain, with_expert(LoraPair(own.down.bfloat16(), own.up))),
        key(plain, with_expert(LoraPair(own.up, own.down[:, :3]))),
        key(plain, with_expert(own, "model.layers.0.mlp.up_proj")),
    ]
    assert len(set(keys)) == len(keys)
    alike = ExpertLayers(layers.model, [{"lm_head": LoraPair(own.down.clone(), own.up.clone())}, layers.adapters[1]])
    assert key(plain, alike) == keys[0]
    assert key(replace(plain, votes=torch.tensor([0.3]))) == keys[0]  # votes come behind the model
    assert key(replace(plain, gates=Gated((0, 1), Gates(("a", "b"), {"a": torch.eye(2, 4)})))) == key(gated[0])
    assert row_keys(layers, replace(plain, weights=torch.eye(2), votes=torch.ones(2))) == [
        key(replace(plain, weights=torch.eye(2)[[row]])) for row in range(2)
    ]


@pytest.mark.parametrize(
    ("name", "again", "longer", "other"),
    [
        ("llama", 1, 9, 60),
        ("gemma3_text", 1, 9, 100),
        ("lfm2", 100, 9, 100),
        ("falcon_h1", 100, 9, 100),
        ("bloom", 1, 9, 60),
    ],
)
def test_what_can_be_shared_hangs_on_what_the_layers_hold(name, again, longer, other):
    """A prompt once more; with 9 tokens behind it; and another one of as many tokens that begins with 40 of its own."""
    reader, prompt = Reader(name), drawn(100)
    layers = ExpertLayers(reader.backbone.model, [expert(reader.backbone, seed) for seed in (1, 2)])
    reader.check(layers, TOGETHER, prompt, 100)
    reader.check(layers, TOGETHER, prompt, again)
    reader.check(layers, TOGETHER, [*prompt, *drawn(9, seed=1)], longer)
    reader.check(layers, TOGETHER, [*prompt[:40], *drawn(60, seed=2)], other)


def test_windows_share_what_their_rings_still_hold():
    reader, prompt = Reader("mistral"), drawn(100)
    layers = ExpertLayers(reader.backbone.model, [expert(reader.backbone, seed) for seed in (1, 2)])
    reader.check(layers, A, prompt, 100)
    reader.check(layers, A, [*prompt[: 100 - SPARE], *drawn(5, seed=1)], 5)
    reader.check(layers, A, [*prompt[: 99 - SPARE], *drawn(5, seed=2)], 104 - SPARE)
    reader.check(layers, B, prompt[:20], 20)  # nothing of it is overwritten
    reader.check(layers, B, [*prompt[:10], *drawn(5, seed=3)], 5)


def test_prefixes_give_way_to_rows_and_the_oldest_go_first():
    reader = Reader("llama")
    layers = ExpertLayers(reader.backbone.model, [expert(reader.backbone, seed) for seed in (1, 2)])
    unit = reader.slots.bytes_for(1, 64)
    reader = Reader("llama", budget=4 * unit, prefixes=2 * unit)
    layers = ExpertLayers(reader.backbone.model, layers.adapters)
    texts = [drawn(64, seed=seed) for seed in range(3)]
    for text in (texts[0], texts[1]):
        reader.check(layers, A, text, 64)
    assert reader.slots.bytes == 3 * unit  # a slot and two prefixes
    reader.check(layers, A, texts[0], 1)
    reader.check(layers, A, texts[2], 64)  # in the room of the second text
    reader.check(layers, A, texts[0], 1)
    reader.check(layers, A, texts[1], 64)
    assert reader.slots.fits(4, 64)
    rows = reader.slots.claim(4)
    reader.slots.read(rows, torch.zeros(4, 64, dtype=torch.long))
    assert reader.slots.bytes == 4 * unit
    reader.slots.release(rows)
    reader.check(layers, A, texts[1], 64)


def test_nothing_is_kept_where_no_room_is_given_or_a_text_was_not_read():
    reader = Reader("llama", prefixes=0)
    layers = ExpertLayers(reader.backbone.model, [expert(reader.backbone, seed) for seed in (1, 2)])
    reader.check(layers, A, drawn(20), 20)
    reader.check(layers, A, drawn(20), 20)
    slots = Slots(reader.backbone, prefixes=ROOM)
    (row,) = slots.claim(1)
    with pytest.raises(ValueError, match="has read 0 tokens, not the 5"):
        slots.keep([row], ["key"], [1, 2, 3, 4, 5])


def test_an_engine_reads_once_what_prompts_have_in_common(monkeypatch):
    """The same long prompt under experts, mixtures and again: each answer is that of an engine that knows nothing."""
    backbone, head, read = make_backbone("llama"), drawn(300), []
    layers = ExpertLayers(backbone.model, [expert(backbone, seed) for seed in (1, 2)])
    warm, real, counts = Engine(backbone, layers, Slots(backbone, prefixes=ROOM)), Slots.read, []

    def counted(slots: Slots, names: list[int], tokens: Tensor, *rest: object) -> Tensor:
        read.append(tokens.shape[1])
        return real(slots, names, tokens, *rest)

    monkeypatch.setattr(Slots, "read", counted)
    for place, weights in enumerate((A, B, MIXED, OTHERWISE, A, MIXED)):
        ids = (*head, 65, 66 + place)
        row = TokenRow(ids, len(ids), (False,) * len(ids), (True,) * len(ids))
        routing = Routing(("one", "other"), torch.tensor(weights))
        request = Request(row, routing, make_combiner("layers"), 3, (SamplingSettings(temperature=0.0),))
        wanted = [(token.id, token.logprob) for token in Engine(backbone, layers).run([request])]
        read.clear()
        tokens = list(warm.run([request]))
        found = [(token.id, token.logprob) for token in tokens]
        counts.append(sum(read))
        assert [token.begun and token.begun.cached for token in tokens] == [302 + 2 - sum(read), None, None]
        assert [token for token, _ in found] == [token for token, _ in wanted]
        assert [share for _, share in found] == pytest.approx([share for _, share in wanted], abs=1e-3)
        assert len(found) == 3  # of which the last one is not read
    assert counts == [304, 304, 304, 304, 3, 3]
