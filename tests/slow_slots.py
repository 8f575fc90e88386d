"""A cache that is none: the slow and obvious reference of `Slots`, which reads every text anew as a whole."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from coterie.backbone.loading import Backbone
from coterie.backbone.slots import Running, Slots


class SlowSlots(Slots):
    """Rows that remember their tokens, and nothing that was computed from them."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self._texts: dict[int, list[int]] = {}
        self._next = 0
        self.read_tokens = 0

    def claim(self, count: int, length: int = 0) -> list[int]:
        rows = list(range(self._next, self._next + count))
        self._next += count
        self._texts |= {row: [] for row in rows}
        return rows

    def release(self, rows: Sequence[int]) -> None:
        for row in rows:
            del self._texts[row]

    def fork(self, rows: Sequence[int]) -> list[int]:
        copies = self.claim(len(rows))
        for row, copy in zip(rows, copies, strict=True):
            self._texts[copy] = list(self._texts[row])
        return copies

    def rollback(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        for row, length in zip(rows, lengths, strict=True):
            del self._texts[row][length:]

    def length(self, row: int) -> int:
        return len(self._texts[row])

    @property
    def claimed(self) -> int:
        return len(self._texts)

    def fits(self, rows: int, length: int) -> bool:
        return True

    @torch.inference_mode()
    def read(
        self,
        rows: Sequence[int],
        tokens: Tensor,
        lengths: Sequence[int] | None = None,
        running: Running | None = None,
    ) -> Tensor:
        counts = lengths or [tokens.shape[1]] * len(rows)
        starts = [len(self._texts[row]) for row in rows]
        for row, piece, count in zip(rows, tokens.tolist(), counts, strict=True):
            self._texts[row] += piece[:count]
        self.read_tokens += sum(counts)
        longest = max(len(self._texts[row]) for row in rows)
        ids = [self._texts[row] + [self._backbone.pad_id] * (longest - len(self._texts[row])) for row in rows]
        with running(range(len(rows))) if running else nullcontext():
            hidden = self._backbone.hidden(torch.tensor(ids))  # padding stands behind, where nothing sees it
        result = hidden.new_zeros(len(rows), tokens.shape[1], hidden.shape[-1])
        for number, (start, count) in enumerate(zip(starts, counts, strict=True)):
            result[number, :count] = hidden[number, start : start + count]
        return result
