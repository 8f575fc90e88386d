"""The KV cache by row: rows of any length side by side, which are claimed, read, forked, rolled back and released.

A row's tokens stand in the columns 0 to its length of a slot; there is no padding before them. The rows of a read are
kept in slots side by side and in the order in which they are read, so that attention sees a view of the buffers.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from coterie.backbone.model import Backbone
from coterie.backbone.prefixes import Prefix, Prefixes
from coterie.backbone.row_cache import SPARE, make_row_cache
from coterie.backbone.span import Span, bucket
from coterie.errors import CoterieError

Running = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""Attaches what the rows at some places of a read run, while these are read."""


COLUMNS = 64
"""Buffers are that many tokens long, or a multiple."""


@dataclass
class _Row:
    """One row.

    Attributes:
        slot: where the cache holds it.
        reach: how many tokens it may have in the end, as far as is known.
        length: tokens read.
        written: tokens up to which it was written once, with padding and what was rolled back.
        touched: columns behind which its slot is clear; padding of long pieces may stand before.
    """

    slot: int
    reach: int
    length: int = 0
    written: int = 0
    touched: int = 0


class Slots:
    """What a model has cached of many texts, one a row."""

    def __init__(
        self, backbone: Backbone, budget: int | None = None, prefixes: int = 0, beside: Callable[[], int] = lambda: 0
    ) -> None:
        """Start empty.

        Args:
            backbone: the base model.
            budget: the most bytes that the cache may take, with what is beside it; None for as many as it needs.
            prefixes: how many of these may be filled with beginnings of texts that rows have read, where there is room.
            beside: counts what others take of the budget, as weights and experts.

        Raises:
            CoterieError: when others leave nothing.
        """
        self._backbone = backbone
        self.cache = make_row_cache(backbone)
        self._budget, self._beside = budget, beside
        self.recount()
        self._prefixes = Prefixes(prefixes, self.cache.holds)
        self._rows: dict[int, _Row] = {}
        self._next = 0

    # what is held

    @property
    def can_rollback(self) -> bool:
        """Whether rows can forget their last tokens; a recurrent state cannot be turned back."""
        return not self.cache.has_states

    @property
    def claimed(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    @property
    def bytes(self) -> int:
        """What the buffers take, and the prefixes that are kept."""
        return self.cache.bytes + self._prefixes.bytes

    @property
    def usage(self) -> float:
        """The share that rows fill of the bytes that the cache may take, or of its buffers where it may take any."""
        held = sum(row.length for row in list(self._rows.values()))
        room = self.cache.slots * self.cache.columns
        return held / room * (1 if self._room is None else self.cache.bytes / self._room) if held else 0.0

    def recount(self) -> None:
        """Count again what others take of the budget.

        Raises:
            CoterieError: when they leave nothing.
        """
        self._others = 0 if self._budget is None else self._beside()
        if self._budget is not None and self._others >= self._budget:
            raise CoterieError(
                f"the base model with its experts and routers takes {self._others:,} bytes, and all may take "
                f"{self._budget:,}; give more, or hold the base model in fewer (--dtype, --quantize)"
            )

    @property
    def _room(self) -> int | None:
        """The bytes that the cache may take."""
        return None if self._budget is None else self._budget - self._others

    def bytes_for(self, rows: int, length: int) -> int:
        """Return what the buffers take for so many rows of up to so many tokens."""
        return self.cache.bytes_for(bucket(rows), bucket(length, COLUMNS))

    def fits(self, rows: int, length: int) -> bool:
        """Tell whether further rows of up to `length` tokens can be claimed beside those that there are.

        Raises:
            CoterieError: when they could not be claimed alone either.
        """
        self._check_budget(rows, length)
        longest = max([length, *(max(row.reach, row.length) for row in self._rows.values())])
        return self._room is None or self.bytes_for(len(self._rows) + rows, longest) <= self._room

    def _check_budget(self, rows: int, length: int) -> None:
        if self._room is not None and (needed := self.bytes_for(rows, length)) > self._room:
            others = f"{self._budget:,} less {self._others:,} of weights" if self._others else f"{self._room:,}"
            raise CoterieError(
                f"the cache of {rows} rows of up to {length} tokens takes {needed:,} bytes, more than the "
                f"{others} that it may have; ask for fewer tokens, rows or experts"
            )

    def length(self, row: int) -> int:
        """Return how many tokens a row has read."""
        return self._rows[row].length

    # rows that come and go

    @torch.inference_mode()
    def claim(self, count: int, length: int = 0) -> list[int]:
        """Return the handles of new, empty rows; `length` is how long each may become, as far as is known.

        Raises:
            CoterieError: when the budget does not allow it; `fits` tells before.
        """
        self._make_room(len(self._rows) + count, 0)
        taken = {row.slot for row in self._rows.values()}
        free = [slot for slot in range(self.cache.slots) if slot not in taken]
        runs = (free[place : place + count] for place in range(len(free) - count + 1))
        slots = next((run for run in runs if run[-1:] == [run[0] + count - 1]), free)
        new = list(range(self._next, self._next + count))
        self._next += count
        self._rows |= {row: _Row(slot, length) for row, slot in zip(new, slots, strict=False)}
        return new

    @torch.inference_mode()
    def release(self, rows: Sequence[int]) -> None:
        """Give rows up; nothing is copied, and nothing of them is left to whoever comes after."""
        for row in rows:
            own = self._rows.pop(row)
            self.cache.clear(own.slot, own.touched)

    @torch.inference_mode()
    def fork(self, rows: Sequence[int]) -> list[int]:
        """Return new rows that have read what these have; for one row several times, name it several times."""
        new = self.claim(len(rows))
        old = [self._rows[row] for row in rows]
        self._rows |= {row: replace(from_, slot=self._rows[row].slot) for row, from_ in zip(new, old, strict=True)}
        slots = [self._rows[row].slot for row in new]
        self.cache.copy([row.slot for row in old], slots, max(row.length for row in old))
        return new

    def rollback(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Let rows forget all but their first tokens, or everything; or a read that broke off.

        Raises:
            ValueError: when a row has not read so many, or a layer does not hold any more what it needs to go on there.
        """
        for row, length in zip(rows, lengths, strict=True):
            own = self._rows[row]
            if not 0 <= length <= own.length:
                raise ValueError(f"row {row} has read {own.length} tokens and cannot go back to {length}")
            if length < own.written and not self.cache.holds(length, own.written):
                raise ValueError(f"row {row} has read {own.written} tokens, too many to go back to {length}")
            own.length, own.written = length, own.written if length else 0

    # beginnings that texts have in common

    @property
    def keeps_prefixes(self) -> bool:
        """Whether there may be room for beginnings of texts."""
        return self._prefixes.budget > 0

    @torch.inference_mode()
    def keep(self, rows: Sequence[int], keys: Sequence[str], tokens: Sequence[int]) -> None:
        """Keep what rows have cached of a text for later rows, as long as there is room.

        Args:
            rows: have read these tokens, and nothing else.
            keys: of all that the rows have run from their first token on; equal for rows that run the same.
            tokens: the text.

        Raises:
            ValueError: when a row has read more tokens, or fewer.
        """
        room = self._prefixes.budget
        if self._room is not None:
            room = min(room, self._room - self.cache.bytes)
        for row, key in zip(rows, keys, strict=True):
            own = self._rows[row]
            if own.length != len(tokens):
                raise ValueError(f"row {row} has read {own.length} tokens, not the {len(tokens)} that are to be kept")
            if room and self._prefixes.find(key, tokens)[0] < own.length:
                states = self.cache.save(own.slot, own.length, own.written)
                self._prefixes.add(key, Prefix(tuple(tokens), states, own.written))
                self._prefixes.shrink(room)

    @torch.inference_mode()
    def recall(self, rows: Sequence[int], keys: Sequence[str], tokens: Sequence[int]) -> int:
        """Fill empty rows with the longest beginning of a text that was kept under all keys, but for its last token.

        Returns:
            How many tokens need not be read any more.
        """
        found = [self._prefixes.find(key, tokens[:-1]) for key in keys]
        length = min(common for common, _ in found)
        prefixes = [prefix for _, prefix in found if prefix is not None and self._prefixes.gives(prefix, length)]
        if len(prefixes) < len(rows) or not length:
            return 0
        for row, prefix in zip(rows, prefixes, strict=True):
            self._make_room(len(self._rows), min(prefix.written, length + SPARE))
            own = self._rows[row]
            self.cache.load(own.slot, prefix.states, length, prefix.written)
            own.length = length
            own.written = own.touched = prefix.written
        return length

    # reading

    @torch.inference_mode()
    def read(
        self,
        rows: Sequence[int],
        tokens: Int[Tensor, "row position"],
        lengths: Sequence[int] | None = None,
        running: Running | None = None,
    ) -> Float[Tensor, "row position width"]:
        """Feed rows their next tokens, each at its own end, and return the last hidden states at these.

        Args:
            rows: handles, each once, in any order.
            tokens: on the model's device; shorter pieces are padded on the right.
            lengths: of the pieces, each at least 1; all as long as `tokens` by default.
            running: attaches what the rows at these places of `rows` run. Most models read all rows at once; where one
                cannot, because they differ in length, it is called for some of them at a time.

        Returns:
            States on the model's device; those at padding mean nothing.

        Raises:
            CoterieError: when the budget does not allow it.
        """
        counts = [tokens.shape[1]] * len(rows) if lengths is None else list(lengths)
        parts = self._parts(rows, counts)
        if len(parts) == 1:
            with running(parts[0]) if running else nullcontext():
                return self._read(rows, tokens, counts)
        states: dict[int, Tensor] = {}
        for places in parts:
            own = [counts[place] for place in places]
            with running(places) if running else nullcontext():
                hidden = self._read([rows[place] for place in places], tokens[places, : max(own)], own)
            states |= zip(places, pad(hidden, (0, 0, 0, tokens.shape[1] - max(own))), strict=True)
        return torch.stack([states[place] for place in range(len(rows))])

    def _parts(self, rows: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        """Return the places of a read that can go through the model together.

        Padding would stay in recurrent states; and models that count columns of keys instead of positions (alibi,
        GPT-Neo) want rows of one length.
        """
        parts: dict[tuple[int, ...], list[int]] = {}
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            length = self._rows[row].length
            kind: tuple[int, ...] = ()
            if not self._backbone.reads.ragged:
                kind = (count, length)
            elif self.cache.has_states:
                kind = (count, min(length, 1))
            parts.setdefault(kind, []).append(place)
        return list(parts.values())

    def _read(self, rows: Sequence[int], tokens: Tensor, counts: list[int]) -> Tensor:
        size = tokens.shape[1]
        own = [self._rows[row] for row in rows]
        if size > 1 and not self._backbone.reads.in_pieces and any(row.length for row in own):
            return torch.cat([self._read(rows, token, [1] * len(rows)) for token in tokens.split(1, dim=1)], dim=1)
        self._make_room(len(self._rows), max(row.length for row in own) + size)
        start = self._side_by_side(rows)
        span = Span(start, [row.length for row in own], counts, size, tokens.device)
        for row, count in zip(own, counts, strict=True):
            row.written = max(row.written, row.length + (size if size <= SPARE else count))
            row.touched = max(row.touched, row.length + size)
        self.cache.begin(span)
        masks = self.cache.masks() if self._backbone.reads.ragged else None
        hidden = self._backbone.hidden(tokens, masks, self._backbone.within(span.positions), self.cache)
        self.advance(rows, counts)
        return hidden

    @torch.inference_mode()
    def take_first(self, rows: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Let rows stand in the first slots, with room for so many tokens, and return how long they are.

        Raises:
            CoterieError: when the budget does not allow it.
        """
        own = [self._rows[row] for row in rows]
        ends = [row.length + count for row, count in zip(own, counts, strict=True)]
        self._make_room(len(self._rows), max(ends))
        self._side_by_side(rows, 0)
        for row, end in zip(own, ends, strict=True):
            row.written, row.touched = max(row.written, end), max(row.touched, end)
        return [row.length for row in own]

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Count tokens as read."""
        for row, count in zip(rows, counts, strict=True):
            self._rows[row].length += count

    def _side_by_side(self, rows: Sequence[int], wanted: int | None = None) -> int:
        """Return the first of the slots that hold these rows one after another; the fewest are moved there before."""
        slots = [self._rows[row].slot for row in rows]
        if wanted in (None, slots[0]) and slots == [*range(slots[0], slots[0] + len(rows))]:
            return slots[0]
        own, holder = set(slots), {row.slot: name for name, row in self._rows.items()}
        if len(own) < len(rows):
            raise ValueError("a row can be read only once at a time")

        def moves(start: int) -> int:
            targets = range(start, start + len(rows))
            strangers = sum(target in holder and target not in own for target in targets)
            return strangers + sum(slot != target for slot, target in zip(slots, targets, strict=True))

        starts = {min(max(slot - place, 0), self.cache.slots - len(rows)) for place, slot in enumerate(slots)}
        start = min(sorted(starts), key=moves) if wanted is None else wanted
        targets = range(start, start + len(rows))
        left = sorted(own - set(targets))
        strangers = [holder[target] for target in targets if target in holder and target not in own]
        places = [*zip(rows, targets, strict=True), *zip(strangers, left, strict=False)]
        moving = {row: target for row, target in places if self._rows[row].slot != target}
        sources = [self._rows[row].slot for row in moving]
        for row, target in moving.items():
            self._rows[row].slot = target
        touched = max(self._rows[row].touched for row in moving)
        self.cache.copy(sources, list(moving.values()), touched, moves=True)
        return start

    def _make_room(self, rows: int, length: int) -> None:
        """Let the buffers grow to the next size, if so many rows or tokens want it, and otherwise shrink."""
        if rows <= self.cache.slots and length <= self.cache.columns:
            return
        length = max([length, *(row.length for row in self._rows.values())])
        self._check_budget(rows, length)
        if self._room is not None:
            self._prefixes.shrink(self._room - self.bytes_for(rows, length))
        held = sorted(self._rows.values(), key=lambda row: row.slot)
        self.cache.resize([row.slot for row in held], bucket(rows), bucket(length, COLUMNS))
        for place, row in enumerate(held):
            row.slot = place
