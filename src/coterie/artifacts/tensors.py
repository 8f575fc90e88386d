"""Tensors that may come from a stranger: what a file claims to hold is checked before any of it is read."""

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from coterie.artifacts.files import whole_file
from coterie.artifacts.reading import open_regular
from coterie.errors import CoterieError, first_line

if TYPE_CHECKING:
    import torch

MAX_TENSOR_FILE = 8 * 2**30  # bytes; an adapter of rank 256 on a 70B model is about 3 GiB
MAX_HEADER = 2**24  # bytes; a tensor takes about a hundred
FLOATS = ("F64", "F32", "F16", "BF16")
LARGEST = 1e15  # squares of such numbers can still be summed in float32
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Lets a file be mapped that is larger than the memory; Python knows its name from 3.13 on."""


class Claim(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def tensor_claims(path: Path, max_bytes: int = MAX_TENSOR_FILE) -> dict[str, Claim]:
    """Read the header of a safetensors file, which tells every tensor's type and shape; none of them is read.

    Raises:
        CoterieError: when the file is missing, larger than `max_bytes`, truncated, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    with open_regular(path) as file:
        header, size = int.from_bytes(file.read(8), "little"), file.seek(0, 2)
    if size > max_bytes:
        raise CoterieError(f"{path} has {size:,} bytes, more than the {max_bytes:,} that are accepted; check the file")
    try:
        if header > min(size, MAX_HEADER):
            raise SafetensorError(f"its header would have {header:,} bytes")
        with safe_open(path, framework="np") as opened:  # by torch it would be mapped as if it were to be changed
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            return {name: Claim(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _not_readable(path, error) from error


def read_tensors(path: Path, max_bytes: int = MAX_TENSOR_FILE) -> dict[str, "torch.Tensor"]:
    """Read all tensors of a safetensors file.

    Raises:
        CoterieError: as `tensor_claims`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensor_claims(path, max_bytes)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _not_readable(path, error) from error


def read_floats(
    path: Path,
    wanted: Mapping[str, Sequence[int | None]],
    advice: str,
    optional: Sequence[str] = (),
    max_bytes: int = MAX_TENSOR_FILE,
) -> dict[str, "torch.Tensor"]:
    """Read tensors of known shapes as float32; those that are float32 in the file stay there, mapped into memory.

    Args:
        path: of a safetensors file.
        wanted: their names and shapes; None stands for any length. Other tensors are not read.
        advice: what to do where one is not as it should be.
        optional: those that may be missing.
        max_bytes: the largest file that is accepted.

    Raises:
        CoterieError: when one is missing, of another shape, holds no floating-point numbers, or some that are not
            finite or absurdly large; and as `tensor_claims`.
    """
    claims = tensor_claims(path, max_bytes)
    for name, shape in wanted.items():
        if name not in claims and name not in optional:
            raise CoterieError(f"{path} lacks the tensor {name!r}; {advice}")
        dtype, found = claims.get(name, ("F32", tuple(length or 1 for length in shape)))
        fits = len(found) == len(shape) and all(
            length == want if want is not None else length > 0 for length, want in zip(found, shape, strict=True)
        )
        if dtype not in FLOATS or not fits:
            wish = ", ".join("any" if length is None else str(length) for length in shape)
            raise CoterieError(f"{path}: tensor {name!r} is {dtype} of shape {found}, not floats of ({wish}); {advice}")
    tensors = _floats(path, {name: claims[name] for name in wanted if name in claims})
    for name, tensor in tensors.items():
        extremes = tensor.aminmax() if tensor.numel() else ()  # NaN where one value is; nothing is copied
        largest = max((abs(float(value)) for value in extremes), default=0.0)
        if not largest <= LARGEST:
            what = f"values of up to {largest:.1g}" if math.isfinite(largest) else "NaN or infinite values"
            raise CoterieError(f"{path}: tensor {name!r} holds {what}; {advice}")
    return tensors


def _floats(path: Path, claims: Mapping[str, Claim]) -> dict[str, "torch.Tensor"]:
    """Return tensors as float32, those that are in the file as pages of it, which changes do not reach."""
    import torch
    from safetensors import safe_open

    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        begins = {name: 8 + length + header[name]["data_offsets"][0] for name in claims}
        mapped = {
            n for n, claim in claims.items() if claim.dtype == "F32" and 0 not in claim.shape and not begins[n] % 4
        }
        flags, allowed = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        pages = mmap.mmap(file.fileno(), 0, flags=flags, prot=allowed) if mapped else b""
    found = {}
    for name in mapped:
        shape = claims[name].shape
        values = torch.frombuffer(pages, dtype=torch.float32, count=math.prod(shape), offset=begins[name])
        found[name] = values.view(shape)
    if others := claims.keys() - mapped:
        with safe_open(path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name).float() for name in others}
    return {name: found[name] for name in claims}


def new_matrix(path: Path, name: str, shape: tuple[int, int]) -> None:
    """Make a safetensors file of one float32 matrix of zeros, which takes room on the disk as it is filled."""
    size = 4 * math.prod(shape)
    claim = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, name: claim}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + size)


def fill_matrix(path: Path, parts: Iterable[tuple[Sequence[int], "torch.Tensor"]]) -> None:
    """Write rows into the matrix of `new_matrix`, until they are on the disk.

    Args:
        path: of the file.
        parts: numbers of rows, and what stands there; one part is in memory at a time.
    """
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for rows, values in parts:
            for row, value in zip(rows, values.detach().cpu().float().numpy(), strict=True):
                file.seek(start + row * value.nbytes)
                file.write(value.data)
        file.flush()
        os.fsync(file.fileno())


def _not_readable(path: Path, error: Exception) -> CoterieError:
    return CoterieError(f"{path} is truncated or not a safetensors file ({first_line(error)}); get the file again")
