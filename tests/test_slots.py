"""The cache by row: whatever comes, leaves, forks and rolls back beside it, a row gives what its text gives alone."""

import random
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import architectures
import tiny
from architectures import WORKING
from coterie.backbone import probe
from coterie.backbone.model import Backbone, BaseModelIdentity, Reads
from coterie.backbone.row_cache import SPARE
from coterie.backbone.slots import Slots
from coterie.backbone.span import bucket
from coterie.errors import CoterieError

WINDOW = architectures.WINDOW


SLOWER = dict.fromkeys(["bloom", "falcon-alibi", "gpt_neo"], Reads(ragged=False)) | {"jamba": Reads(in_pieces=False)}


@cache
def backbones(name: str) -> Backbone:
    """A random model of an architecture, as it is loaded, and read in the fastest way that it can be read in."""
    found = probe.checked(
        Backbone(architectures.make_model(name), tiny.make_tokenizer(), BaseModelIdentity("some/model", None, "0"))
    )
    assert found.reads == SLOWER.get(name, Reads())
    return found


class Texts:
    """Slots beside what they should hold: every row's text, read anew without a cache."""

    def __init__(self, backbone: Backbone, budget: int | None = None) -> None:
        self.backbone, self.slots = backbone, Slots(backbone, budget)
        self.texts: dict[int, list[int]] = {}

    def claim(self, count: int) -> list[int]:
        rows = self.slots.claim(count)
        self.texts |= {row: [] for row in rows}
        return rows

    def release(self, rows: list[int]) -> None:
        self.slots.release(rows)
        for row in rows:
            del self.texts[row]

    def fork(self, rows: list[int]) -> list[int]:
        new = self.slots.fork(rows)
        self.texts |= {copy: self.texts[row] for copy, row in zip(new, rows, strict=True)}
        return new

    def rollback(self, row: int, length: int) -> None:
        self.slots.rollback([row], [length])
        self.texts[row] = self.texts[row][:length]

    @torch.inference_mode()
    def alone(self, text: list[int]) -> Tensor:
        return self.backbone.hidden(torch.tensor([text]))[0]

    def read(self, rows: list[int], pieces: list[list[int]]) -> None:
        """Read pieces, and compare each state with that of the text alone."""
        size = max(map(len, pieces))
        tokens = torch.tensor([[*piece, *[0] * (size - len(piece))] for piece in pieces])
        lengths = None if {len(piece) for piece in pieces} == {size} else [len(piece) for piece in pieces]
        self.compare(rows, pieces, self.slots.read(rows, tokens, lengths))

    def compare(self, rows: list[int], pieces: list[list[int]], states: Tensor) -> None:
        """Write pieces down, and compare what was read of them with what the texts alone give."""
        for row, piece, found in zip(rows, pieces, states, strict=True):
            self.texts[row] = self.texts[row] + piece
            wanted = self.alone(self.texts[row])[-len(piece) :]
            torch.testing.assert_close(found[: len(piece)], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
            assert self.slots.length(row) == len(self.texts[row])


def drawn(generator: random.Random, size: int) -> list[int]:
    return [generator.randrange(256) for _ in range(size)]


@pytest.mark.parametrize("name", WORKING)
def test_rows_of_every_architecture_give_what_their_texts_give_alone(name):
    texts, generator = Texts(backbones(name)), random.Random(name)

    def read(rows: list[int], *sizes: int) -> None:
        texts.read(rows, [drawn(generator, size) for size in sizes])

    one, two, three = texts.claim(3)
    read([one, two, three], 12, 5, 12)
    read([three, one, two], 1, 1, 1)
    read([one, two], 4, 2)
    texts.release([one])
    read([two], 60)  # buffers grow beside the slot that is free
    (four,) = texts.claim(1)
    read([four], WINDOW + SPARE + 10)  # longer than a ring
    (five,) = texts.fork([three])
    read([five, two, four, three], 1, 1, 1, 1)
    read([two, five], SPARE + 3, 2)
    if texts.slots.can_rollback:
        for row in (two, five):
            texts.rollback(row, len(texts.texts[row]) - 2)
    texts.rollback(three, 0)
    read([three, five, two, four], 3, 3, 3, 3)
    read([three, five, two, four], 1, 1, 1, 1)


class AnyOrder(RuleBasedStateMachine):
    """Rows come and go in any order, where layers look at all tokens, at the last ones, or some at these."""

    @initialize(name=st.sampled_from(["llama", "mistral", "gemma3_text", "llama4_text", "bloom"]))
    def load(self, name: str) -> None:
        self.held, self.generator = Texts(backbones(name)), random.Random(name)

    def pick(self, number: int) -> int:
        rows = list(self.held.texts)
        return rows[number % len(rows)]

    @rule(count=st.integers(1, 3), size=st.sampled_from([1, 3, 30, 70]))
    def join(self, count: int, size: int) -> None:
        self.held.read(self.held.claim(count), [drawn(self.generator, size) for _ in range(count)])

    @precondition(lambda self: self.held.texts)
    @rule(number=st.integers(0, 99))
    def leave(self, number: int) -> None:
        self.held.release([self.pick(number)])

    @precondition(lambda self: self.held.texts)
    @rule(number=st.integers(0, 99), times=st.integers(1, 2))
    def fork(self, number: int, times: int) -> None:
        self.held.fork([self.pick(number)] * times)

    @precondition(lambda self: self.held.texts)
    @rule(number=st.integers(0, 99), back=st.integers(0, WINDOW))
    def roll_back(self, number: int, back: int) -> None:
        row = self.pick(number)
        try:
            self.held.rollback(row, max(len(self.held.texts[row]) - back, 0))
        except ValueError:  # several times in turn, a row comes to where its ring has forgotten
            assert self.held.slots.cache.layers[0].is_sliding

    @precondition(lambda self: self.held.texts)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        rows = data.draw(st.permutations(list(self.held.texts)))
        rows = rows[: data.draw(st.integers(1, len(rows)))]
        sizes = data.draw(st.lists(st.integers(1, 6), min_size=len(rows), max_size=len(rows)))
        if data.draw(st.booleans()):
            sizes = [data.draw(st.sampled_from([1, 4, SPARE + 9]))] * len(rows)
        self.held.read(rows, [drawn(self.generator, size) for size in sizes])

    @invariant()
    def bytes_are_those_of_the_buffers(self) -> None:
        if hasattr(self, "held"):
            assert self.held.slots.bytes == held_bytes(self.held.slots)


def held_bytes(slots: Slots) -> int:
    """The storage behind every tensor of the cache's layers."""
    storages = {}
    for layer in slots.cache.layers:
        for tensor in [*getattr(layer, "held", []), *getattr(layer, "states", [])]:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=20, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_moves_are_few_and_reads_of_rows_side_by_side_move_nothing(monkeypatch):
    texts, copied = Texts(backbones("llama")), []
    copy = texts.slots.cache.copy
    monkeypatch.setattr(texts.slots.cache, "copy", lambda *args, **kw: (copied.append(len(args[0])), copy(*args, **kw)))
    rows = texts.claim(6)
    texts.read(rows, [[1, 2, 3]] * 6)
    texts.read(rows, [[4]] * 6)
    assert copied == []
    texts.release([rows[1]])
    assert copied == []  # leaving copies nothing
    texts.read([rows[0], rows[5], *rows[2:5]], [[5]] * 5)
    assert copied == [1]  # the last row has moved into the hole
    new = texts.claim(2)
    texts.read(new, [[9, 8]] * 2)
    texts.read([rows[0], rows[5], *rows[2:5], *new], [[5]] * 7)
    assert copied == [1]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "jamba", "lfm2", "falcon_h1", "deepseek_v3"])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 64), (5, 65), (9, 200)])
def test_bytes_are_known_before_they_are_taken(name, rows, length):
    slots = Slots(backbones(name))
    expected = slots.bytes_for(rows, length)
    tokens = torch.zeros(rows, length, dtype=torch.long)
    slots.read(slots.claim(rows), tokens)
    assert slots.bytes == held_bytes(slots) == expected > 0


def test_numbers_of_buffers_grow_by_a_quarter_at_most():
    for size in range(1, 5000):
        assert size <= bucket(size) <= max(size, size * 5 // 4 + 1)
        assert size <= bucket(size, 64) <= max(64 * -(-size // 64), size * 5 // 4 + 1)
    assert [bucket(size) for size in (0, 1, 7, 8, 9, 15, 17)] == [0, 1, 7, 8, 10, 16, 20]


def test_a_budget_is_kept_and_what_can_never_fit_is_told_in_one_line():
    backbone = backbones("llama")
    budget = Slots(backbone).bytes_for(4, 128)
    texts = Texts(backbone, budget)
    assert texts.slots.fits(4, 128)
    with pytest.raises(CoterieError, match=r"^the cache of 5 rows of up to 128 tokens takes [\d,]+ bytes, more than"):
        texts.slots.fits(5, 128)
    long = texts.slots.claim(2, length=128)
    assert texts.slots.fits(2, 100)
    assert not texts.slots.fits(3, 10)  # each would have as many columns
    texts.slots.release(long)
    assert texts.slots.fits(8, 64)
    one, *others = texts.claim(8)
    texts.read([one, *others], [[1] * 64] * 8)
    assert texts.slots.bytes == texts.slots.bytes_for(8, 64) == budget
    with pytest.raises(CoterieError, match="8 rows of up to 65 tokens"):
        texts.read([one], [[2]])
    texts.release(others)
    texts.read([one], [[2] * 300])  # what others had is free
    assert texts.slots.bytes <= budget


def test_what_slots_cannot_do_is_refused_and_changes_nothing():
    texts = Texts(backbones("mistral"))
    (row,) = texts.claim(1)
    texts.read([row], [[5] * 3])
    with pytest.raises(ValueError, match="has read 3 tokens and cannot go back to 4"):
        texts.rollback(row, 4)
    with pytest.raises(ValueError, match="only once"):
        texts.slots.read([row, row], torch.zeros(2, 1, dtype=torch.long))
    texts.read([row], [[7] * 90])
    with pytest.raises(ValueError, match="too many to go back to 60"):
        texts.rollback(row, 60)
    texts.rollback(row, 93 - SPARE)
    texts.read([row], [[1, 2]])
    texts.rollback(row, 0)
    texts.read([row], [[3] * 12])
    texts.rollback(row, 2)  # nothing of it has been forgotten
    texts.read([row], [[4] * 3])
    states = Texts(backbones("lfm2"))
    (row,) = states.claim(1)
    states.read([row], [[5] * 3])
    assert not states.slots.can_rollback
    with pytest.raises(ValueError, match="too many to go back to 2"):
        states.rollback(row, 2)
    states.rollback(row, 0)
    states.read([row], [[6] * 3])


@pytest.mark.parametrize(
    ("name", "size", "intact"),
    [("llama", 1, True), ("llama", 90, True), ("mistral", SPARE, True), ("mistral", 90, False), ("lfm2", 1, False)],
)
def test_a_read_that_breaks_off_is_forgotten_where_nothing_is_lost(name, size, intact, monkeypatch):
    texts = Texts(backbones(name))
    (row,) = texts.claim(1)
    texts.read([row], [drawn(random.Random(name), 40)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(texts.backbone.blocks[-1], "forward", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        texts.slots.read([row], torch.ones(1, size, dtype=torch.long))
    assert texts.slots.length(row) == 40
    if intact:
        texts.rollback(row, 40)
    else:
        with pytest.raises(ValueError, match="too many to go back to 40"):
            texts.rollback(row, 40)
        texts.rollback(row, 0)
    texts.read([row], [[1, 2]])
