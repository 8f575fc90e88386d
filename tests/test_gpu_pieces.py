"""What is run on a GPU goes on in pieces, without one here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import script

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    return script("benchmarks/gpu.py")


def test_all_tests_and_benchmarks_are_pieces_with_scripts_that_exist(gpu, tmp_path):
    found = gpu.pieces(tmp_path, tmp_path / "data")
    names = [piece.name for piece in found]
    assert len(set(names)) == len(names) and names[-1] == "evidence"
    paths = [Path(word) for piece in found for word in piece.command[1:] if word.endswith(".py")]
    assert all(path.exists() for path in paths)
    tests = {path.name for path in paths if path.name.startswith("test_")}
    assert tests == {path.name for path in Path(__file__).parent.rglob("test_*.py")}


def test_pieces_go_on_where_time_ran_out(gpu, tmp_path):
    todo, asked = [gpu.Piece(name, ()) for name in ("a", "slow", "b", "evidence")], []

    def run(piece, room):
        asked.append(piece.name)
        ends = piece.name in ("a", "b") or asked.count(piece.name) > 1
        if ends:
            (tmp_path / f"{piece.name}.json").write_text("{}")
        return ends

    assert gpu.go_on(todo, tmp_path, 60, run) == (["a", "b"], ["slow", "evidence"])
    assert gpu.go_on(todo, tmp_path, 0, run) == ([], ["slow", "evidence"])
    assert gpu.go_on(todo, tmp_path, 60, run) == (["evidence", "slow"], [])  # what was too slow comes last
    assert asked == ["a", "slow", "b", "evidence", "evidence", "slow"]


def test_a_piece_leaves_its_result_when_it_ended_and_none_when_it_was_interrupted(gpu, tmp_path):
    def ended(code, seconds=60, **options):
        piece = gpu.Piece("p", (sys.executable, "-c", code), **options)
        return gpu.do(piece, tmp_path, "a card", seconds)

    assert not ended("import time; time.sleep(60)", 1) and not list(tmp_path.iterdir())
    assert ended("print('fine')", own=True) and not list(tmp_path.iterdir())
    assert ended("print('bad'); raise SystemExit(3)")
    result = json.loads((tmp_path / "p.json").read_text())
    assert (result["card"], result["exit"], result["told"]) == ("a card", 3, "bad\n")


def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    if done.returncode == 0 or "type the same" in done.stderr:
        pytest.skip("there is a GPU here")
    assert done.stderr == "error: torch finds no GPU; run this where `coterie doctor` names one\n"
