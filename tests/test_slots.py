"""The cache by row: whatever comes, leaves, forks and rolls back beside it, a row gives what its text gives alone."""

import random

import pytest
import torch
from torch import Tensor

import architectures
import tiny
from architectures import WORKING
from coterie.backbone import probe
from coterie.backbone.model import Backbone, BaseModelIdentity
from coterie.backbone.row_cache import SPARE
from coterie.backbone.slots import Slots

WINDOW = architectures.WINDOW


def make_backbone(name: str) -> Backbone:
    """A random model of an architecture, as it would be loaded."""
    return probe.checked(
        Backbone(architectures.make_model(name), tiny.make_tokenizer(), BaseModelIdentity("some/model", None, "0"))
    )


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
        for row, piece, found in zip(rows, pieces, self.slots.read(rows, tokens, lengths), strict=True):
            self.texts[row] = self.texts[row] + piece
            wanted = self.alone(self.texts[row])[-len(piece) :]
            torch.testing.assert_close(found[: len(piece)], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
            assert self.slots.length(row) == len(self.texts[row])


def drawn(generator: random.Random, size: int) -> list[int]:
    return [generator.randrange(256) for _ in range(size)]


@pytest.mark.parametrize("name", WORKING)
def test_rows_of_every_architecture_give_what_their_texts_give_alone(name):
    texts, generator = Texts(make_backbone(name)), random.Random(name)

    def read(rows: list[int], *sizes: int) -> None:
        texts.read(rows, [drawn(generator, size) for size in sizes])

    one, two, three = texts.claim(3)
    read([one, two, three], 12, 5, 12)
    read([three, one, two], 1, 1, 1)
    read([one, two], 4, 2)
    texts.release([one])
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
