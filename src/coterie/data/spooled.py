"""Sequences that may be longer than memory: items lie as bytes in a file without a name and are read one by one.

Short ones stay in memory. Longer ones lie in the folder for temporary files (the variable TMPDIR names another one) and
are gone when nobody needs them any more, however the process ends.
"""

import tempfile
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int

from coterie.artifacts import disk_errors

IN_MEMORY = 2**26
"""Bytes of a sequence beyond which it lies on disk."""

T = TypeVar("T")
S = TypeVar("S")


class Spooled(Sequence[T], Generic[T]):
    """A sequence that only grows, of which a place an item is in memory."""

    def __init__(self, encode: Callable[[T], bytes], decode: Callable[[bytes], T], items: Iterable[T] = ()) -> None:
        """Take in how an item is written and read, and the first items.

        Raises:
            CoterieError: when the disk is full.
        """
        self._encode, self._decode = encode, decode
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])
        self._lock = threading.Lock()
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        """Add an item.

        Raises:
            CoterieError: when the disk is full.
        """
        written = self._encode(item)
        with self._lock, disk_errors(Path(tempfile.gettempdir())):
            self._file.seek(self._ends[-1])
            self._file.write(written)
            self._ends.append(self._ends[-1] + len(written))

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._ends) - 1

    def __getitem__(self, place: Any) -> Any:  # an item for a number, a list of them for a slice
        """Read an item, or the items of a slice."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        with self._lock:
            self._file.seek(self._ends[number])
            return self._decode(self._file.read(self._ends[number + 1] - self._ends[number]))


class Chosen(Sequence[T], Generic[S, T]):
    """Some items of another sequence, in an order of one's own and in another form, made when they are asked for."""

    def __init__(
        self,
        items: Sequence[S],
        numbers: Sequence[int] | Int[np.ndarray, " chosen"],
        form: Callable[[S], T] = lambda item: item,
    ) -> None:
        """Take in the items, the numbers of those that are chosen, and what is made of each."""
        self._items, self._numbers, self._form = items, numbers, form

    def __len__(self) -> int:
        """Return how many are chosen."""
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:  # an item for a number, a list of them for a slice
        """Return an item, or the items of a slice."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return self._form(self._items[int(self._numbers[place])])
