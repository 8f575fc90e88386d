"""Time and memory of choosing 1,000 of many pool rows by 50 examples, embeddings given, against two other ways.

The pool is synthetic: 384 dimensions, 200 topics, a tenth of all rows near copies of others (cosine about 0.98).
`full` holds the whole matrix of rows and examples and the whole matrix of the candidates that it compares. `semhash`
ranks rows by the same matrix, then removes near-duplicates from the whole ranked pool with the package semhash
(approximate neighbours); `semhash_top` gives it only the most similar 3,000 rows. semhash runs in an environment of
its own, whose Python the variable SEMHASH_PYTHON names; without it these two are left out. `floor` is the time to read
the embeddings once from memory. Memory is the largest that the whole process had, embeddings and libraries included.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _harness import arguments, interleaved, median_ratio, publish
from safetensors.torch import save_file
from torch import Tensor

from coterie.data.row_selection import RowSelection, select_rows
from coterie.settings.groups import GatherRowsSettings

SHOTS, WIDTH, TOPICS, COPIES = 50, 384, 200, 0.1
SETTINGS = GatherRowsSettings(budget=1000, tau=0.9, exclude_tau=0.99)
SEMHASH = """
import json, sys, time
import numpy as np
from safetensors.numpy import load_file
from semhash import SemHash
data = load_file(sys.argv[1])
pool, shots, limit = data["pool"], data["shots"], int(sys.argv[2])
started = time.perf_counter()
similarity = (pool @ shots.T).max(axis=1)
order = np.argsort(-similarity, kind="stable")
order = order[similarity[order] <= 0.99][:limit or None]
found = SemHash.from_embeddings(pool[order], [str(row) for row in order], model=None).self_deduplicate(0.9)
chosen = [int(row) for row in found.selected[:1000]]
print(json.dumps({"seconds": time.perf_counter() - started, "rows": chosen}))
"""


def problem(rows: int) -> tuple[Tensor, Tensor]:
    """Return pool and shots: rows scattered around topics, some of them near copies of others."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(TOPICS, WIDTH, generator=generator)
    pool = torch.empty(rows, WIDTH)
    for part in pool.split(65536):
        part.normal_(generator=generator)
        part += topics[torch.randint(TOPICS, (len(part),), generator=generator)]
        near = int(COPIES * len(part))
        part[:near] = part[-near:] + 0.25 * torch.randn(near, WIDTH, generator=generator)
        part /= part.norm(dim=1, keepdim=True)
    shots = topics[:5].repeat(SHOTS // 5, 1) + torch.randn(SHOTS, WIDTH, generator=generator)
    return pool, shots / shots.norm(dim=1, keepdim=True)


def gather(pool: Tensor, shots: Tensor) -> RowSelection:
    """Choose as `coterie gather` does."""
    return select_rows(pool, shots, np.arange(len(pool)), SETTINGS)


def full(pool: Tensor, shots: Tensor, candidates: int = 3000) -> list[int]:
    """Choose by one matrix of all rows and examples and one of all pairs of candidates."""
    similarity = (pool.double() @ shots.double().T).amax(dim=1).round(decimals=6)
    order = similarity.neg().argsort(stable=True)
    order = order[similarity[order] <= SETTINGS.exclude_tau][:candidates]
    near = pool[order].double() @ pool[order].double().T > SETTINGS.tau
    kept: list[int] = []
    for place in range(len(order)):
        if len(kept) < SETTINGS.budget and not near[place, kept].any():
            kept.append(place)
    return order[kept].tolist()


def semhash(python: str, pool: Tensor, shots: Tensor, limit: int) -> tuple[float, list[int]]:
    """Return the seconds that semhash's environment needed, and the rows it chose."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.safetensors"
        save_file({"pool": pool, "shots": shots}, path)
        command = [python, "-c", SEMHASH, str(path), str(limit)]
        result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return result["seconds"], result["rows"]


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most memory that this process held while something ran (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    run()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def pairs_too_near(pool: Tensor, rows: list[int]) -> int:
    """Count pairs of chosen rows above the threshold."""
    chosen = pool[rows].double()
    return int(((chosen @ chosen.T).round(decimals=6) > SETTINGS.tau).triu(diagonal=1).sum())


def compared(rounds: int, python: str | None) -> tuple[dict[str, float], dict[str, float]]:
    """Compare the ways at 100,000 rows; return medians and ratios."""
    pool, shots = problem(100_000)
    exact = gather(pool, shots).rows.tolist()
    assert full(pool, shots) == exact
    ways = {
        "gather": lambda: gather(pool, shots),
        "full": lambda: full(pool, shots),
        "floor": lambda: float(pool.sum()),
    }
    seconds = interleaved(ways, rounds)
    ratios = {f"{name}_over_gather": median_ratio(seconds[name], seconds["gather"]) for name in ("full", "floor")}
    medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    for name, limit in {"semhash": 0, "semhash_top": 3000}.items():
        if not python:
            break
        taken, rows = semhash(python, pool, shots, limit)
        medians |= {f"{name}_seconds": taken, f"{name}_pairs_too_near": pairs_too_near(pool, rows)}
        ratios |= {
            f"{name}_over_gather": taken / medians["gather_seconds"],
            f"{name}_rows_in_common": len(set(rows) & set(exact)) / len(exact),
        }
    return medians, ratios


def grown(sizes: dict[str, int]) -> dict[str, float]:
    """Return time and memory at several sizes, each after one run that does not count at the smallest."""
    gather(*problem(min(sizes.values())))
    medians = {}
    for name, rows in sizes.items():
        pool, shots = problem(rows)
        started = time.perf_counter()
        medians[f"peak_{name}_mib"] = peak_bytes(lambda pool=pool, shots=shots: gather(pool, shots)) / 2**20
        medians[f"time_{name}_seconds"] = time.perf_counter() - started
    return medians


def main() -> None:
    """Run the ways and print the result."""
    flags = arguments("gather")
    rounds = 3 if flags.quick else 10
    python = os.environ.get("SEMHASH_PYTHON")
    if not python:
        print("SEMHASH_PYTHON names no Python with semhash; going without it", file=sys.stderr)
    medians, ratios = compared(rounds, python)
    medians |= grown({"10k": 10_000, "100k": 100_000, "1m": 1_000_000})
    ratios["time_1m_over_100k"] = medians["time_1m_seconds"] / medians["time_100k_seconds"]
    settings = {"rows": 100_000, "shots": SHOTS, "dimensions": WIDTH, "rounds": rounds, **SETTINGS.model_dump()}
    publish("gather", settings, medians, ratios)


if __name__ == "__main__":
    main()
