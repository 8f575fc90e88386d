"""Files: written whole or not at all, hashed.

Where several processes do one command together, the first one writes, whatever the others do (see `coterie.ranks`).
"""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie import ranks
from coterie.artifacts.reading import open_regular
from coterie.errors import CoterieError

if TYPE_CHECKING:
    import torch

FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_IN_WORDS = (
    *("No space left on device", "File too large", "PytorchStreamWriter failed", "inline_container.cc"),
    "basic_ios::clear: iostream error",  # its very last bytes
)
"""How libraries tell a full disk that do not raise the system's own error: safetensors and torch."""
FORBIDDEN = (
    *(errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENXIO),
)
TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
"""Names of files that are not whole yet; a process that was killed leaves them."""


def is_full(error: Exception) -> bool:
    """Tell whether an error means that there is no room to write."""
    return getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL_IN_WORDS)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Tell a full disk, a forbidden folder or an impossible name in one line, also where a library hid the cause.

    Raises:
        CoterieError: for those; every other error passes through.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if is_full(error):
            is_large = number == errno.EFBIG or "File too large" in str(error)
            why = "no leave for files so large" if is_large else "no space left on the disk"
            raise CoterieError(f"{why} while writing {path}; free some and start again") from error
        if number in FORBIDDEN:
            raise CoterieError(f"{path} cannot be written: {error}; choose another folder") from error
        if number == errno.ENAMETOOLONG:
            raise CoterieError(f"{os.fspath(path)[:80]}... is too long a name for this disk; choose another") from error
        if isinstance(error, UnicodeEncodeError) or "null byte" in str(error):
            raise CoterieError(f"{str(path)!r} or what is written there is no text; choose another name") from error
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, renamed to `path` on success and deleted otherwise.

    The temporary file is new and its name random, so nothing that lies there is written through. A link at `path` is
    itself replaced, not what it leads to. What another process than the first writes is dropped.

    Raises:
        CoterieError: when the disk is full or the folder cannot be written.
    """
    if ranks.rank():
        with tempfile.TemporaryDirectory() as nowhere:
            yield Path(nowhere) / path.name
        return
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # O_EXCL follows no link either
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Add text to the end of a file, new or not; nothing is written through a link or to a pipe.

    Raises:
        CoterieError: when the disk is full or the file cannot be written.
    """
    if ranks.rank():
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PermissionError(errno.EPERM, "it is no regular file")
            file.write(text)


def as_path(text: str | Path, advice: str = "write the whole path") -> Path:
    """Return a path in which ~ stands for a home folder.

    Raises:
        CoterieError: when that is nobody's home, or no file can have such a name.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
        return path
    except OSError as error:
        raise CoterieError(f"{str(text)!r} cannot be a file or folder here ({error.strerror}); {advice}") from error
    except RuntimeError as error:
        raise CoterieError(f"nobody knows the home folder in {str(text)!r}; {advice}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write one JSON value; NaN is refused, since readers would stumble over it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all; one is held at a time."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def write_tensors(path: Path, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all; metadata values are strings."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})


def sha256_of(*paths: Path) -> str:
    """Hash the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def hash_text(*lines: str) -> str:
    """Hash one text of several lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_json(value: object, *, ensure_ascii: bool = False) -> str:
    """Hash what JSON holds, whatever the order of its keys."""
    return hash_text(json.dumps(value, ensure_ascii=ensure_ascii, sort_keys=True))


def hash_json_list(values: Iterable[object]) -> str:
    """Return `hash_json` of a list, of which one value is held at a time."""
    digest = hashlib.sha256(b"[")
    for number, value in enumerate(values):
        digest.update(f"{', ' if number else ''}{json.dumps(value, ensure_ascii=False, sort_keys=True)}".encode())
    digest.update(b"]")
    return digest.hexdigest()
