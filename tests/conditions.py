"""What a process may meet: files that may not grow, a full disk, folders that it may only read, a clock that jumps."""

import ctypes
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BLOCK = 4096  # bytes
OUTPUTS = ("std1", "std2")  # of the process itself, kept outside of its disk
LIFETIME = 3e9  # seconds
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_CAPABILITY_VERSION_3 = 0x20080522


@contextmanager
def files_up_to(largest: int, folder: Path) -> Iterator[None]:
    """Let the process write no file of more bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    yield


@contextmanager
def disk_with(room: int, folder: Path) -> Iterator[None]:
    """Give a folder a disk of its own with room for so many bytes more; what is on it in the end stays in the folder.

    The process gets mounts that no other one sees, for which Linux asks no privilege; temporary files lie there, too.
    """
    below = os.open(folder, os.O_RDONLY)
    beneath = Path(f"/proc/self/fd/{below}")  # what the disk covers
    held = sum(-(-path.lstat().st_size // BLOCK) * BLOCK for path in folder.rglob("*") if path.is_file())
    own_disk(folder, held + room)
    shutil.copytree(beneath, folder, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*OUTPUTS))
    os.chdir(folder)
    temporary = folder / "temporary"
    temporary.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    try:
        yield
    finally:
        with suppress(OSError):  # what was left in it is told as what no undisturbed command leaves
            temporary.rmdir()
        for path in beneath.iterdir():
            if path.name not in OUTPUTS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(folder, beneath, symlinks=True, dirs_exist_ok=True)


def own_disk(folder: Path, size: int) -> None:
    """Lay an empty disk in memory over a folder, for this process and its children alone.

    Raises:
        OSError: where a system forbids it to users.
    """
    library, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if library.unshare(_CLONE_NEWNS | _CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "no mounts of one's own")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    if library.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size // BLOCK * BLOCK}".encode()):
        raise OSError(ctypes.get_errno(), "no disk of one's own")


@contextmanager
def only_reading(names: Iterable[str], folder: Path) -> Iterator[None]:
    """Take the leave to write in a folder's parts of these names away ("." for all), from root too."""
    for name in names:
        for path in (folder / name, *(folder / name).rglob("*")):
            if path.name not in OUTPUTS and not path.is_symlink():
                path.chmod(path.stat().st_mode & ~0o222)
    if sys.platform == "linux":  # drop what lets root write in spite of it
        ctypes.CDLL(None).capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24))
    yield


def writable(folder: Path) -> None:
    """Give the leave to write in a folder back."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200)


@contextmanager
def jumping_clock(seed: int, folder: Path) -> Iterator[None]:
    """Let files be of any time, and the time of day jump by up to a lifetime between any two looks at it."""
    chance, now = random.Random(seed), time.time
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            os.utime(path, (chance.uniform(0, 2 * LIFETIME),) * 2)
    time.time = lambda: abs(now() + chance.uniform(-LIFETIME, LIFETIME))
    yield
