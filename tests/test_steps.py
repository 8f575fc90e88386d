"""Steps of a fixed shape: texts and answers are what they are without, also when steps are recorded and run again."""

import random

import pytest
import torch

from architectures import WORKING
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.row_cache import SPARE
from coterie.backbone.slots import Slots
from coterie.backbone.steps import SIZES, Record, Steps, checked
from coterie.engine.reading import Reader
from coterie.engine.speculation import LENGTHS
from recorded import replayed
from test_engine import answered, kinds, same  # noqa: F401 - a fixture
from test_slots import WINDOW, Texts, backbones, drawn

UNEQUAL = {"bloom", "falcon-alibi", "gpt_neo"}
"""Models that cannot read rows of unequal length side by side."""
STATES = {"bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "nemotron_h", "qwen3_5_text", "qwen3_next"}
"""Models with a state that padding would change."""


class Stepping(Texts):
    """Texts whose next tokens are read in steps."""

    def __init__(self, name: str, record: Record) -> None:
        super().__init__(backbones(name))
        self.layers = ExpertLayers(self.backbone.model, [{}])
        self.steps = Steps(self.backbone, self.layers, self.slots, record)

    def step(self, rows: list[int], pieces: list[list[int]]) -> None:
        """Read tokens in a step, and compare each state with that of the text alone."""
        sizes = [len(piece) for piece in pieces]
        tokens = torch.tensor([[*piece, *[0] * (max(sizes) - len(piece))] for piece in pieces])
        mix = self.layers.weighted(torch.ones(len(rows), 1))
        self.compare(rows, pieces, self.steps.read(rows, tokens, sizes, mix))


@pytest.mark.parametrize("name", WORKING)
def test_steps_of_every_architecture_give_what_texts_give_alone(name):
    """Rows change places, one of another text stands where a step has padding, a ring turns over, proposals fall."""
    records: list[str] = []

    def record(run):
        records.append(name)
        return checked(replayed)(run)

    texts, generator = Stepping(name, record), random.Random(name)
    assert Steps.allows(texts.backbone, texts.slots) == (name not in UNEQUAL | STATES)
    if name in UNEQUAL | STATES:
        return

    def pieces(*sizes: int) -> list[list[int]]:
        return [drawn(generator, size) for size in sizes]

    rows = texts.claim(6)
    texts.read(rows, pieces(12, 5, WINDOW + SPARE + 10, 1, 7, 3))
    for own in (rows[:5], rows[4::-1], rows[1:]):
        texts.step(own, pieces(3, 1, 2, 3, 1))
        texts.rollback(own[0], len(texts.texts[own[0]]) - 2)
    texts.read(rows, pieces(2, 2, 2, 2, 2, 2))
    assert len(records) == 1 and texts.steps.pay


def test_requests_that_come_and_go_get_in_recorded_steps_what_they_get_alone(kinds):  # noqa: F811
    """Of every kind, the next one two steps after the last; one is cancelled."""
    again: list[int] = []

    def record(run):
        recorded = checked(replayed)(run)
        return lambda: again.append(1) or recorded()

    engine, found = kinds.engine(places=3, chunk=24, record=record), {}
    for number in (*range(9), 1, 3):
        found[engine.submit(kinds.requests[number])] = [number]
        for token in (*engine.step(), *engine.step()):
            found[token.request].append(token)
    engine.cancel(4)
    for token in engine.run():
        found[token.request].append(token)
    for handle, (kind, *tokens) in found.items():
        same(tokens, kinds.alone(kind), is_cut=handle == 4)
    assert len(again) > 9 and engine._reader._steps.pay


def unlike(run):
    states = run() + 1
    return lambda: states


def failing(run):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("record", [unlike, failing, lambda run: None])
def test_records_that_fail_or_give_something_else_are_not_used(kinds, record):  # noqa: F811
    tried: list[int] = []

    def counted(run):
        tried.append(1)
        return record(run)

    found = answered(kinds.engine(places=20, record=checked(counted)).run(kinds.requests))
    assert tried == [1]
    for kind in range(len(kinds.requests)):
        same(found[kind], kinds.alone(kind))


def test_a_text_that_is_read_anew_is_longer_than_a_step(kinds):  # noqa: F811
    """As behind a pass that broke off."""
    backbone, layers, request = kinds.mixture.backbone, kinds.mixture.layers, kinds.requests[5]
    (plan,), ids = request.combiner.plan(request.routing), request.prompt.ids
    readers = [Reader(backbone, layers, Slots(backbone), record) for record in (None, checked(replayed))]
    found = [reader.read([reader.open(ids, plan)], [len(ids)], in_steps=True)[0] for reader in readers]
    assert len(ids) > max(SIZES)
    torch.testing.assert_close(*found)


def test_a_step_is_as_long_as_what_is_proposed_and_leaves_a_ring_what_it_looks_at():
    assert tuple(1 + length for length in LENGTHS) == SIZES and max(SIZES) <= SPARE
