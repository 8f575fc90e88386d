"""What one forward pass reads: rows in slots side by side, each from its own end on."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from coterie.data.devices import on_device


def bucket(size: int, step: int = 1) -> int:
    """Round up to a multiple of the step, or of an eighth of the next power of two: a quarter more at most."""
    if size <= 0:
        return 0
    step = max(step, 2 ** (size - 1).bit_length() // 8)
    return -(-size // step) * step


class Span:
    """What one forward pass reads: rows in slots side by side, each from its own end on."""

    def __init__(
        self, start: int, lengths: Sequence[int], counts: Sequence[int], size: int, device: torch.device
    ) -> None:
        """Take in the rows.

        Args:
            start: slot of the first row.
            lengths: tokens that each row has read before.
            counts: tokens that each row reads now; the rest of `size` is padding.
            size: positions of the pass.
            device: of the model.
        """
        self.slots = slice(start, start + len(lengths))
        self.lengths, self.counts, self.size = tuple(lengths), tuple(counts), size
        self.total = max(lengths) + size
        """Columns that keys take."""
        self.level: int | None = lengths[0] if len(set(lengths)) == 1 else None
        """The rows' length before, if they have one in common."""
        self.is_token: Bool[Tensor, "row position"] | None = None
        """Which positions are written; None for all."""
        self._device = device
        self._places: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def starts(self) -> Int[Tensor, "row 1"]:
        """The rows' lengths before."""
        return on_device(self.lengths, self._device)[:, None]

    @cached_property
    def ends(self) -> Int[Tensor, "row 1"]:
        """The rows' lengths behind, without padding."""
        return self.starts + on_device(self.counts, self._device)[:, None]

    @cached_property
    def positions(self) -> Int[Tensor, "row position"]:
        """Where the tokens stand in their texts."""
        steps = torch.arange(self.size, device=self._device)
        if self.level is not None:
            return (steps + self.level).expand(len(self.lengths), -1)
        return self.starts + steps

    def places(self, columns: int) -> tuple[Int[Tensor, "row 1"], Int[Tensor, "row position"]]:
        """Return the rows and columns where the tokens go in a ring of so many columns."""
        if columns not in self._places:
            rows = torch.arange(self.slots.stop - self.slots.start, device=self._device)[:, None]
            self._places[columns] = rows, self.positions % columns
        return self._places[columns]


class StepSpan(Span):
    """What a step of a fixed shape reads, all of it tensors: rows in the first slots, where padding leaves no trace."""

    def __init__(self, state: Int[Tensor, "row numbers"], total: int) -> None:
        """Take in the rows.

        Args:
            state: tokens that each row has read before, and those that it reads now; -1 where there is none.
            total: columns that keys take.
        """
        self.slots, self.size, self.total = slice(0, len(state)), state.shape[1] - 1, total
        self.level: int | None = None
        self._device, self._places = state.device, {}
        self.is_token = state[:, 1:] >= 0
        self.tokens = state[:, 1:].clamp(min=0)
        self.starts = state[:, :1].clamp(min=0)
        self.positions = self.starts + torch.arange(self.size, device=state.device)
