"""Everything that is to be seen on a GPU, in pieces: tests, benchmarks, and the evidence runs.

    python benchmarks/gpu.py [--data FOLDER] [--minutes 9]

Each piece is a process of its own that leaves a JSON file in `results/<the card's name>/`. Pieces that are done are not
done again, and the same command goes on where time ran out: it takes up no piece that may need longer than is left.
With `--data`, the data sets of `examples/evidence.py`, the evidence runs come last; they go on by themselves.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BENCHMARKS = ("decode", "engine", "features", "token_level", "fit", "recruit", "select_experts", "serve")
"""Those that compute on the best device there is; the others are about the CPU."""
TEST_GROUPS = 6
LONGEST = 540  # seconds of a piece
EVIDENCE = "evidence"
PACED, GRACE = (EVIDENCE, "serve"), 30
"""Pieces that stop by themselves when they are told their time, and go on later; seconds that they may take to stop."""
TOLD = 2000  # characters of what a piece printed last that its result keeps


class Piece(NamedTuple):
    """A command with the name of its result; `own` where it writes that itself."""

    name: str
    command: tuple[str, ...]
    own: bool = False


def pieces(results: Path, data: Path | None) -> list[Piece]:
    """Return all there is to do, what matters most first."""
    python, tests = sys.executable, sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py"))
    found = [Piece("on_gpu", (python, "-m", "pytest", "-q", str(ROOT / "tests" / "test_on_gpu.py")))]
    for name in BENCHMARKS:
        output = str(results / f"{name}.json")
        found.append(Piece(name, (python, str(HERE / f"{name}.py"), "--output", output), own=True))
    for number in range(TEST_GROUPS):
        found.append(Piece(f"tests_{number}", (python, "-m", "pytest", "-q", *tests[number::TEST_GROUPS])))
    if data is not None:
        runs = ROOT / "runs" / results.name
        script = str(ROOT / "examples" / "evidence.py")
        parts = ("--parts", "maths,general,domains,influence,kshot,recruit", "--seeds", "0,1,2")
        found.append(Piece(EVIDENCE, (python, script, str(data), str(runs), *parts)))
    return found


def do(piece: Piece, results: Path, card: str, seconds: float) -> bool:
    """Run a piece, and write its result; tell whether it came to an end. One that was interrupted leaves none."""
    started, command = time.monotonic(), piece.command
    if piece.name in PACED:
        command, seconds = (*command, "--minutes", f"{seconds / 60:.1f}"), seconds + GRACE
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(1, seconds))
    except subprocess.TimeoutExpired:
        return False
    told = (done.stdout + done.stderr)[-TOLD:]
    if piece.name in PACED and "type the same command again" in told:
        return False
    if not (piece.own and done.returncode == 0):
        took = round(time.monotonic() - started)
        result = {"name": piece.name, "card": card, "exit": done.returncode, "seconds": took, "told": told}
        (results / f"{piece.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return True


def go_on(
    todo: Sequence[Piece], results: Path, seconds: float, run: Callable[[Piece, float], bool]
) -> tuple[list[str], list[str]]:
    """Do what is left of the pieces within the time; return what is done now, and what is left.

    A piece that was interrupted had all of the time; it is left, and others come before it at the next call.
    """
    interrupted = results / "interrupted.json"
    before: list[str] = json.loads(interrupted.read_text(encoding="utf-8")) if interrupted.exists() else []
    end, done = time.monotonic() + seconds, []
    left = [piece for piece in todo if not (results / f"{piece.name}.json").exists()]
    for piece in sorted(left, key=lambda own: own.name in before):
        room = min(LONGEST, end - time.monotonic())
        if room <= 0:
            break
        if run(piece, room):
            done.append(piece.name)
        elif piece.name not in PACED:
            before = [*before, piece.name]
            interrupted.write_text(json.dumps(before), encoding="utf-8")
    return done, [piece.name for piece in left if piece.name not in done]


def main() -> None:
    """Find the card, and go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data sets of the evidence runs; without them there are none")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop then; the same command goes on")
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU; run this where `coterie doctor` names one")
    card = torch.cuda.get_device_name()
    results = HERE / "results" / re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    results.mkdir(parents=True, exist_ok=True)
    todo = pieces(results, flags.data)
    done, left = go_on(todo, results, 60 * flags.minutes, lambda piece, room: do(piece, results, card, room))
    told: dict[str, Any] = {"card": card, "results": str(results), "done": done, "left": left}
    print(json.dumps(told, indent=1))
    if left:
        sys.exit("type the same command again to go on")


if __name__ == "__main__":
    main()
