"""Locks: one process at a time writes into a folder, and another one is told at once who does.

The lock itself is the operating system's, so it ends with its process, however that ends, and none is ever stale. What
stands in the lock's file is only there to be told.
"""

import getpass
import json
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from coterie.artifacts.files import disk_errors
from coterie.errors import CoterieError

MAX_NOTE = 4096  # characters


@contextmanager
def locked(lock: Path, what: Path) -> Iterator[None]:
    """Hold the lock file of what is being written, and delete it in the end.

    Raises:
        CoterieError: naming the process and its host, when another one holds it.
    """
    held = FileLock(lock)  # follows no link; one that its holder has deleted meanwhile counts as held
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        _check_ours(lock)
        try:
            held.acquire(timeout=0)
        except Timeout as error:
            raise CoterieError(f"{what} is being written by {_owner(lock)}; wait until that is done") from error
    try:
        with disk_errors(lock):
            note = {"pid": os.getpid(), "host": platform.node(), "since": datetime.now(UTC).isoformat("T", "seconds")}
            with suppress(KeyError, OSError):  # a user without a name
                note["user"] = getpass.getuser()
            lock.write_text(json.dumps(note), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        held.release()


def _check_ours(lock: Path) -> None:
    """Refuse what is no lock of ours: locking would write over it, under each of the names that it has."""
    with suppress(FileNotFoundError):
        found = os.lstat(lock)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            content = lock.read_bytes() if found.st_size <= MAX_NOTE else b"?"
            if not content or content.startswith(b'{"pid": '):
                return
        raise CoterieError(f"{lock} is no lock file of coterie's, and would be written over; move it away")


def _owner(lock: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError), lock.open(encoding="utf-8") as file:
        note = json.loads(file.read(MAX_NOTE))
        user = f" of {str(note['user'])[:40]!r}" if "user" in note else ""
        return f"process {int(note['pid'])}{user} on {str(note['host'])[:80]!r} since {str(note['since'])[:40]}"
    return "another process"
