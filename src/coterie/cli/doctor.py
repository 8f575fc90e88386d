"""`coterie doctor`: what this machine has, and what to install for what is lacking."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import typer

import coterie
from coterie.artifacts import free_memory
from coterie.backbone.aliases import cache_folder
from coterie.cli.process import TROUBLE
from coterie.cli.table import AsJson, command, echo
from coterie.errors import CoterieError, first_line

OLDEST = (3, 11)
HUB_SECONDS = 3.0  # that the model hub has to answer
GIB = 2**30
SHOWN = ("torch", "transformers", "peft")  # required packages whose versions people are asked for
EXTRAS = {
    "data": ("datasets", "Parquet and data sets of the hub"),
    "eval": ("lm-eval", "HarnessModel, for lm-evaluation-harness"),
    "llamacpp": ("xllamacpp", "--engine llama.cpp"),
    "serve": ("fastapi", "coterie serve"),
    "quant": ("bitsandbytes", "--load-in-4bit"),
    "ray": ("ray", "--ray: replicas of the server, and work shared between machines"),
}
"""What can be installed besides: the package that it brings, and what that is for."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: was looked at.
        found: there.
        advice: what to do about it; empty where nothing needs to be done.
        broken: whether Coterie does not work without it.
    """

    what: str
    found: str
    advice: str = ""
    broken: bool = False


@command("doctor", "coterie doctor")
def doctor(as_json: AsJson = False) -> None:
    """Tell what this machine has: Python, torch, devices, memory, cache, model hub, and what to install for what."""
    findings = [finding for look in LOOKS for finding in look()]
    if as_json:
        echo("\n".join(json.dumps(asdict(finding)) for finding in findings))
    else:
        for one in findings:
            echo(f"{'!' if one.broken else ' '} {one.what:13} {one.found}")
            if one.advice:
                echo(f"{'':16}-> {one.advice}")
    if broken := [finding.what for finding in findings if finding.broken]:
        echo(f"Coterie does not work here: see {', '.join(broken)} above", err=True)
        raise typer.Exit(TROUBLE)


def _python() -> Iterator[Finding]:
    is_old = sys.version_info < OLDEST
    advice = f"install Python {'.'.join(map(str, OLDEST))} or newer" if is_old else ""
    yield Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}", advice, is_old)
    yield Finding("Coterie", coterie.__version__)


def _packages() -> Iterator[Finding]:
    """Look at every package that Coterie requires: those that are asked for by version, and those that do not fit."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, importlib.metadata.requires("coterie") or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        if not fits or requirement.name in SHOWN:
            advice = "" if fits else f"pip install '{requirement}'"
            yield Finding(requirement.name, version or "not installed", advice, not fits)


def _devices() -> Iterator[Finding]:
    """Multiply on every device, which is what all else needs."""
    try:
        import torch

        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        names += ["mps"] if torch.backends.mps.is_available() else []
        for name in ["cpu", *names]:
            ones = torch.ones(2, 2, device=name)
            works = float((ones @ ones).sum()) == 8
            yield Finding(f"device {name}", _device(torch, name), "" if works else "torch computes wrongly", not works)
        spin = os.environ.get("GOMP_SPINCOUNT")
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores, GOMP_SPINCOUNT {spin or 'not set'}"
        is_slow = spin is None and platform.system() == "Linux" and not names
        yield Finding("threads", threads, "export GOMP_SPINCOUNT=10000 where others compute beside" if is_slow else "")
    except Exception as error:  # whatever a broken installation raises
        yield Finding("device", first_line(error), "reinstall torch: pip install --force-reinstall torch", broken=True)


def _device(torch: Any, name: str) -> str:  # noqa: ANN401 - a module
    if name.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(name)
        return f"{torch.cuda.get_device_name(name)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return platform.processor() or platform.machine()


def _memory() -> Iterator[Finding]:
    free = free_memory()
    yield Finding("memory", "unknown" if free is None else f"{free / GIB:.1f} GiB free")


def _cache() -> Iterator[Finding]:
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (CoterieError, OSError) as error:
        yield Finding("cache", first_line(error), "set COTERIE_CACHE to a folder of yours", broken=True)
        return
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    usable = os.access(folder, os.W_OK)
    advice = "" if usable else "cannot be written to; set COTERIE_CACHE to a folder of yours"
    yield Finding("cache", f"{folder}, {size / GIB:.1f} GiB", advice, not usable)


def _hub() -> Iterator[Finding]:
    """Ask the hub for its front page, unless the user works without it; aliases need none."""
    import httpx2
    from huggingface_hub import constants

    aliases = "the aliases smollm2-135m and gemma3-270m need no hub"
    if constants.HF_HUB_OFFLINE:
        yield Finding("model hub", "not asked, since HF_HUB_OFFLINE is set", aliases)
        return
    try:
        httpx2.head(constants.ENDPOINT, timeout=HUB_SECONDS)
        yield Finding("model hub", f"{constants.ENDPOINT} answers")
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        yield Finding("model hub", f"{constants.ENDPOINT}: {first_line(error)}", f"{aliases}")


def _extras() -> Iterator[Finding]:
    for extra, (package, purpose) in EXTRAS.items():
        version = _version(package)
        advice = "" if version else f"pip install 'coterie[{extra}]' for {purpose}"
        yield Finding(f"extra {extra}", f"{package} {version}" if version else "not installed", advice)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _packages, _devices, _memory, _cache, _hub, _extras)
