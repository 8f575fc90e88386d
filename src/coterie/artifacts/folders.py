"""Folders to work in, every part of them a real one, and folders that may be deleted.

A folder that came from elsewhere may hold links. Work never goes through one, and what holds anything that no run makes
is never deleted.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coterie.artifacts.files import TEMPORARY, disk_errors
from coterie.errors import CoterieError

REPOSITORIES = (".git", ".hg", ".svn")


def real_folder(base: Path, name: str = ".") -> Path:
    """Make the folder `name` below `base`, and refuse it where any part, from `base` itself on, is a link or a file.

    Raises:
        CoterieError: naming that part, or when the folder cannot be made.
    """
    start = Path(os.path.abspath(base))
    parts = (start.name, *Path(name).parts)
    with disk_errors(base / name):
        start.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(start.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for depth, part in enumerate(parts, start=1):
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=handle)
                try:
                    below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
                except OSError as error:
                    if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                        raise
                    place = start.parent.joinpath(*parts[:depth])
                    raise CoterieError(f"{place} is a link or a file where a folder is needed; delete it") from error
                os.close(handle)
                handle = below
        finally:
            os.close(handle)
    return base / name


def check_tree(folder: Path) -> None:
    """Refuse to work in a folder that holds what no run makes, and drop files that a killed process left unfinished.

    Raises:
        CoterieError: naming the first such thing.
    """
    if trouble := strange_entry(folder):
        raise CoterieError(f"{folder} holds {trouble}, which no run makes, so no work is done there; delete it")
    for place, _, files in os.walk(folder):
        for name in filter(TEMPORARY.fullmatch, files):
            os.unlink(os.path.join(place, name))


def strange_entry(folder: Path) -> str | None:
    """Name the first thing below a folder that no run makes: a link, a device, a mount point, a repository."""
    device = os.lstat(folder).st_dev
    for place, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = os.path.join(place, name)
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                return f"a link, {path}"
            if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
                return f"a pipe or a device, {path}"
            if name in REPOSITORIES:
                return f"a repository, {path}"
            if found.st_dev != device:
                return f"a mount point, {path}"
    return None


def held_places(folder: Path, inputs: Iterable[Path]) -> Iterator[str]:
    """Name what a folder is or holds that nobody wants deleted: inputs of the call, the working folder, a home."""
    whole = folder.resolve()
    places = [(path, f"{path}, which this call reads") for path in inputs]
    with suppress(OSError):  # it was deleted
        places.append((Path.cwd(), "the folder you are in"))
    with suppress(RuntimeError):  # nobody's
        places.append((Path.home(), "your home folder"))
    for path, name in places:
        if path.resolve().is_relative_to(whole):
            yield name


def replace_folder(new: Path, folder: Path, aside: Path) -> None:
    """Give a complete folder its name. What stood there is set aside first, and deleted when the new one is there.

    Raises:
        OSError: when a folder cannot be renamed; the old one then has its name again.
    """
    if not os.path.lexists(folder):
        new.rename(folder)
        return
    try:
        folder.rename(aside)
        new.rename(folder)
    except BaseException:
        if not os.path.lexists(folder):
            aside.rename(folder)
        raise
    shutil.rmtree(aside)


def check_copy(target: Path, names: Collection[str], mark: str, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse a folder for a saved copy that holds anything but, where it may be overwritten, an earlier one.

    Args:
        target: the folder.
        names: all that a copy may hold.
        mark: the file that every copy has.
        inputs: what is read to make it.
        overwrite: whether an earlier copy may be replaced.

    Raises:
        CoterieError: saying why.
    """
    with disk_errors(target):
        if target.name in ("", "..") or os.path.islink(target):
            raise CoterieError(f"{target} is a link or has no name of its own; choose another folder")
        if not os.path.lexists(target):
            return
        if not target.is_dir() or os.path.ismount(target):
            raise CoterieError(f"{target} is no folder that can be replaced; choose another one")
        if held := next(held_places(target, inputs), None):
            raise CoterieError(f"{target} is or holds {held}; choose another folder")
        held_names = set(os.listdir(target))
        if held_names and not overwrite:
            raise CoterieError(f"{target} is not empty; choose another folder, or give overwrite=True to replace it")
        foreign = sorted(held_names - set(names)) or ([] if mark in held_names or not held_names else [f"no {mark}"])
        if trouble := strange_entry(target) or (foreign[0] if foreign else None):
            raise CoterieError(f"{target} holds {trouble}, so it is not replaced; choose another folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the name `target` when the body is through, in the place of what is there.

    Raises:
        CoterieError: when it cannot be written.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
        made, aside = place / target.name, place / "old"
        try:
            made.mkdir()
            yield made
            replace_folder(made, target, aside)
        finally:
            shutil.rmtree(place, ignore_errors=True)
