"""Files and run folders: written whole or not at all, safe to read, resumable.

A run works in `<output>.partial` and is renamed to `<output>` when it is complete, so a folder under its own name is
always a finished one. Inside, a stage is done when its folder or file exists under its own name.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from coterie.errors import CoterieError, first_line
from coterie.settings.old_spellings import current_command, current_names, is_old
from coterie.settings.reading import flat_values

if TYPE_CHECKING:
    import torch

FORMAT = 1
MAX_TENSOR_FILE = 8 * 2**30  # bytes; an adapter of rank 256 on a 70B model is about 3 GiB
RECORDED_PACKAGES = ("coterie", "torch", "transformers", "peft", "scikit-learn", "numpy")


JsonCache = Callable[[str, Callable[[], Any]], Any]
"""Gives a JSON value by name, computing it where it is not known yet; see `RunFolder.cached`."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Tell a full disk and a forbidden folder in one line, also where a library hid the cause in its own error."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise CoterieError(f"no space left on the disk while writing {path}; free some and start again") from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise CoterieError(f"{path} cannot be written: {error}; choose another folder") from error
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, renamed to `path` on success and deleted otherwise.

    Raises:
        CoterieError: when the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write one JSON value; NaN is refused, since readers would stumble over it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterator[Mapping[str, Any]] | list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CoterieError: when the file is missing, broken, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CoterieError(f"{path} does not exist; check the folder's name") from error
    except (ValueError, OSError) as error:
        raise CoterieError(f"{path} is not readable JSON ({error}); get or make the file again") from error
    if not isinstance(value, dict):
        raise CoterieError(f"{path} must hold a JSON object, but holds a {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line, from a file that we wrote.

    Raises:
        CoterieError: when it is missing or broken.
    """
    try:
        with path.open(encoding="utf-8") as file:  # its lines end at newlines only, unlike those of str.splitlines
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise CoterieError(f"{path} is not readable ({error}); get or make the file again") from error


def hub_folder(source: str, patterns: list[str], advice: str) -> Path:
    """Download a repository of the hub and return its folder: files that match the patterns, and no others.

    Raises:
        CoterieError: with the advice when the source is no hub id, OWNER/NAME; or when it cannot be had.
    """
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or Path(source).parent.is_dir():
        raise CoterieError(advice)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; all of them mean that it cannot be had
        raise CoterieError(
            f"{source} is no folder and cannot be had from the hub ({first_line(error)}); check the name"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all; metadata values are strings."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})


def read_tensors(path: Path, max_bytes: int = MAX_TENSOR_FILE) -> dict[str, "torch.Tensor"]:
    """Read a safetensors file that may come from a stranger: size and header are checked before anything is loaded.

    Raises:
        CoterieError: when the file is missing, larger than `max_bytes`, truncated, or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CoterieError(
            f"{path} does not exist; an adapter folder holds adapter_config.json and adapter_model.safetensors"
        )
    size = path.stat().st_size
    if size > max_bytes:
        raise CoterieError(f"{path} has {size:,} bytes, more than the {max_bytes:,} that are accepted; check the file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CoterieError(f"{path} is truncated or not a safetensors file ({error}); get the file again") from error


def sha256_of(*paths: Path) -> str:
    """Hash the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def hash_text(*lines: str) -> str:
    """Hash one text of several lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_json(value: object, *, ensure_ascii: bool = False) -> str:
    """Hash what JSON holds, whatever the order of its keys."""
    return hash_text(json.dumps(value, ensure_ascii=ensure_ascii, sort_keys=True))


def environment_record() -> dict[str, Any]:
    """Describe what a run ran on: package versions, Python, machine and the working folder's git commit."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):  # no git, no repository, or no commit yet
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        commit = git.stdout.strip()
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    machine = f"{processor}, {os.cpu_count()} cores"
    return {"versions": versions, "python": platform.python_version(), "machine": machine, "git": commit}


@dataclass(frozen=True)
class RunFolder:
    """A run folder under construction."""

    path: Path

    def stage(self, name: str, make: Callable[[Path], object]) -> Path:
        """Make the folder `name` once: `make` fills a working folder, which gets its name when it is complete.

        A stage that was interrupted starts again with what it left in its working folder.
        """
        done = self.path / name
        if not done.exists():
            working = self.path / "working" / name
            with disk_errors(working):
                working.mkdir(parents=True, exist_ok=True)
                make(working)
                done.parent.mkdir(parents=True, exist_ok=True)
                working.rename(done)
        return done

    def cached(self, name: str, make: Callable[[], Any]) -> Any:  # whatever JSON holds
        """Compute a JSON value once: a run that was interrupted later reads it. It is gone when the run is finished."""
        file = self.path / "working" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.json"
        if not file.exists():
            write_json(file, {"value": make()})
        return read_json(file)["value"]


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that exists, before any work is done.

    Raises:
        CoterieError: when it exists and `overwrite` is not set, or is something that no run has made.
    """
    if not output.exists():
        return
    if not overwrite:
        raise CoterieError(f"{output} exists; choose another --output, or add --overwrite to replace it")
    if not output.is_dir() or not ((output / "run.yaml").exists() or not any(output.iterdir())):
        raise CoterieError(f"{output} is not a run folder, so it is not replaced; choose another --output")


@contextmanager
def run_folder(
    output: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> Iterator[RunFolder]:
    """Open the partial folder of a run, new or interrupted, and finish it when the body is through.

    The command has its name of the command line, such as "fit elrea"; inputs are content hashes by name.

    Raises:
        CoterieError: when an unfinished run with other settings or inputs is in the way, or when at the end something
            that no run has made stands under the run's name; the partial folder stays.
    """
    partial = output.with_name(output.name + ".partial")
    record = {"format": FORMAT, "command": command, "settings": dict(settings), "inputs": dict(inputs)}
    _check_same_run(partial, record)
    with disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
    if not (partial / "run.yaml").exists():
        started = datetime.now(UTC).isoformat(timespec="seconds")
        text = yaml.safe_dump({**record, "started": started, **environment_record()}, sort_keys=False)
        write_text(partial / "run.yaml", text)
    try:
        yield RunFolder(partial)
        shutil.rmtree(partial / "working", ignore_errors=True)
        with disk_errors(output):
            check_output(output, overwrite=True)  # something else may have come there meanwhile
            if output.exists():  # the caller asked for overwriting, and the new run is complete
                shutil.rmtree(output)
            partial.rename(output)
    except (CoterieError, KeyboardInterrupt):
        if not any(path.is_file() and path.name != "run.yaml" for path in partial.rglob("*")):  # nothing to resume
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_same_run(partial: Path, record: Mapping[str, Any]) -> None:
    if not (partial / "run.yaml").exists():
        return
    tries = []
    for one in (record, read_run_record(partial / "run.yaml")):
        values = current_names(one["command"], flat_values(one["settings"]))  # as settings are called today
        values.pop("overwrite", None)  # the tries at one run may differ in it
        tries.append({**one, "settings": values})
    ours, theirs = tries
    for name in theirs["settings"].keys() - ours["settings"].keys():
        if is_old(record["command"], name):  # the run began when this flag was this command's
            del theirs["settings"][name]
    different = [key for key in ("command", "settings", "inputs") if ours[key] != theirs.get(key)]
    if different:
        raise CoterieError(
            f"{partial} holds an unfinished run with other {' and '.join(different)}; "
            f"finish that one with its own settings, or delete the folder"
        )


def read_run_record(path: Path) -> dict[str, Any]:
    """Read a `run.yaml`; its command has the name of today.

    Raises:
        CoterieError: when it is missing or not the record of a run.
    """
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CoterieError(f"{path} is not a readable run.yaml; give the file of a run folder") from error
    if not isinstance(record, dict) or "command" not in record or not isinstance(record.get("settings"), dict):
        raise CoterieError(f"{path} holds no command and settings; give the run.yaml of a run folder")
    return {**record, "command": current_command(str(record["command"]))}
