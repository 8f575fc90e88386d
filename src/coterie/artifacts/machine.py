"""What the work runs on: versions, processor, free memory."""

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

RECORDED_PACKAGES = ("coterie", "torch", "transformers", "peft", "scikit-learn", "numpy")


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


def free_memory() -> int | None:
    """Return the bytes that this machine could give; None where the system does not tell.

    On Linux the part of its file cache that it would drop for it is free, too.
    """
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
