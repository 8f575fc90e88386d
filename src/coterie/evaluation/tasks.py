"""Commands for a task of which a few examples are known: what grades answers is put in here."""

from pathlib import Path
from typing import Any

from coterie.artifacts import read_json
from coterie.evaluation.recruited import is_right
from coterie.methods.kshot import choose_adapters as selecting
from coterie.methods.kshot import fit as kshot
from coterie.methods.kshot.choose_adapters import SELECTION_FILE, Selected
from coterie.methods.kshot.fit import GATHERED, SELECTION
from coterie.methods.kshot.gather_rows import SUMMARY_FILE
from coterie.methods.kshot.train import GATES_FILE
from coterie.mixture import Mixture
from coterie.settings.commands import KshotSettings, SelectSettings
from coterie.settings.reading import from_flat


def select(folder: str | Path, shots: str | list[str], *, output: str | Path, **settings: Any) -> Selected:  # noqa: ANN401
    """Choose adapters of a bank for a task of which a few examples are known (arXiv 2408.15915, algorithm 1).

    Args:
        folder: the bank.
        shots: the task's examples: a JSONL file or `datasets` source, or several.
        output: folder to write `selection.json` and `scores.jsonl` to.
        **settings: fields of `SelectSettings` and its groups by their plain names, such as keep=4 or halving=5.

    Raises:
        CoterieError: for bad data or settings, a bank without enough adapters, or an output folder that exists.
    """
    sources = [shots] if isinstance(shots, str) else list(shots)
    flat = {"folder": str(folder), "shots": sources, "output": str(output), **settings}
    return run_selection(from_flat(SelectSettings, flat))


def run_selection(settings: SelectSettings) -> Selected:
    """Choose adapters of a bank; see `coterie.methods.selecting.run_selection`."""
    return selecting.run_selection(settings, is_right)


def fit_kshot(settings: KshotSettings) -> Mixture:
    """Fit kshot-moe; see `coterie.methods.kshot.fit_kshot`."""
    return kshot.fit_kshot(settings, is_right)


def task_records(folder: Path | None) -> dict[str, Any]:
    """Read how a task's mixture came about, where its folder tells: the choice, the gathered rows, the gates."""
    files = {
        "selection": f"{SELECTION}/{SELECTION_FILE}",
        "gathering": f"{GATHERED}/{SUMMARY_FILE}",
        "gates": GATES_FILE,
    }
    return {key: read_json(folder / file) for key, file in files.items() if folder and (folder / file).exists()}
