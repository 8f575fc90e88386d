"""Seeded random projections that give the same matrix on every device, for any batch size.

Random bits come from a counter-based integer hash (splitmix64) of (seed, name, position), computed in torch's int64,
so that CPU and GPU draw the same signs and nothing has to be stored. Each tensor of a gradient is projected on its
own, keyed by its name, and the projections are added up: the full gradient never has to exist.

Both projections keep inner products: E[<Px, Py>] = <x, y>, with a standard deviation of at most about
|x| |y| sqrt(2 / d) (Johnson and Lindenstrauss).
"""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.errors import unknown_name

PROJECTION_FORMAT = 1
"""Stored beside features; raised whenever a projection gives other numbers than before."""

SIGNS_PER_HASH = 32
BLOCK_ELEMENTS = 1 << 24  # elements of the +-1 matrix that exist at once (64 MiB in float32)


@dataclass
class Projection(ABC):
    """A linear map of named tensors to `d_proj` dimensions."""

    d_proj: int
    seed: int = 0

    @abstractmethod
    def __call__(self, name: str, values: Float[Tensor, "row size"]) -> Float[Tensor, "row d_proj"]:
        """Project rows of the tensor called `name`, flattened."""


def signed(value: int) -> int:
    """Read the lowest 64 bits of a number as an int64."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right as if it were unsigned (torch shifts copies of the sign in)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(counter: Tensor, key: int | Tensor) -> Tensor:
    """Hash int64 counters to 64 random bits each (Steele, Lea and Flood 2014), the same on every device."""
    x = counter * signed(0x9E3779B97F4A7C15) + (signed(key) if isinstance(key, int) else key)
    x = (x ^ _shift_right(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def projection_key(seed: int, name: str) -> int:
    """Derive the 64-bit key of a named tensor."""
    digest = hashlib.sha256(f"{PROJECTION_FORMAT}:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


class RademacherProjection(Projection):
    """The dense +-1 projection of the ELREA paper (eq. 6), scaled by 1/sqrt(d_proj), generated in blocks.

    Costs size x d_proj multiplications a row and never holds more than a block of the matrix.
    """

    def __call__(self, name: str, values: Float[Tensor, "row size"]) -> Float[Tensor, "row d_proj"]:
        """Project rows of the tensor called `name`, flattened."""
        key, device = projection_key(self.seed, name), values.device
        words = -(-self.d_proj // SIGNS_PER_HASH)
        word, place = torch.arange(words, device=device), torch.arange(SIGNS_PER_HASH, device=device)
        width = max(1, BLOCK_ELEMENTS // self.d_proj)
        result = values.new_zeros(len(values), self.d_proj)
        for start in range(0, values.shape[1], width):
            block = values[:, start : start + width]
            elements = torch.arange(start, start + block.shape[1], device=device)[:, None]
            bits = splitmix64(elements * words + word, key)  # [element, word]
            signs = ((bits.unsqueeze(-1) >> place) & 1).float().mul_(2).sub_(1).flatten(1)[:, : self.d_proj]
            result += block @ signs.to(values.dtype)
        return result / math.sqrt(self.d_proj)


@dataclass
class SketchProjection(Projection):
    """A balanced count sketch: random signs, then every run of `d_proj` elements is shuffled and added up.

    It has the same mean and, to first order, the same variance of inner products as the dense projection, for a
    cost of one addition an element (Charikar, Chen and Farach-Colton 2002; Weinberger et al. 2009).
    """

    _plans: dict[tuple[str, int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """For every slot of every run: the element that goes there, past the end a zero, and its sign."""

    def __call__(self, name: str, values: Float[Tensor, "row size"]) -> Float[Tensor, "row d_proj"]:
        """Project rows of the tensor called `name`, flattened; its shuffles are made when it is first seen."""
        size, device = values.shape[1], values.device
        runs = -(-size // self.d_proj)
        if (name, size, device) not in self._plans:
            elements = torch.arange(runs * self.d_proj, device=device)
            bits = splitmix64(elements, projection_key(self.seed, name))
            order = _shift_right(bits, 1).unflatten(0, (runs, self.d_proj)).argsort(dim=1, stable=True)
            source = (order + torch.arange(runs, device=device)[:, None] * self.d_proj).flatten()
            self._plans[name, size, device] = source, (bits[source] & 1).float().mul_(2).sub_(1)
        source, signs = self._plans[name, size, device]
        padded = torch.nn.functional.pad(values, (0, runs * self.d_proj - size))
        return (padded[:, source] * signs).unflatten(1, (runs, self.d_proj)).sum(dim=1)


PROJECTIONS: dict[str, type[Projection]] = {"sketch": SketchProjection, "rademacher": RademacherProjection}


def make_projection(name: str, d_proj: int, seed: int = 0) -> Projection:
    """Build a projection by name.

    Raises:
        CoterieError: when no projection has this name.
    """
    if name not in PROJECTIONS:
        raise unknown_name("projection", name, PROJECTIONS)
    return PROJECTIONS[name](d_proj, seed)
