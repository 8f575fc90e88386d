"""Commands that are killed at random moments end with the files of undisturbed ones: many seeds of each command.

    python benchmarks/crashes.py --command "fit elrea" --seeds 100 --minutes 9

Every seed kills a command with SIGKILL up to three times, each at another moment of what the last try had come to, lets
it finish, and compares all files with an undisturbed run's; `serve` is killed while it answers, leaves its folder as it
was and answers the same again. Results are added up in `results/crashes.json`: the same line, typed again, goes on
with the next seed. What differed is kept beside the result and told; the exit code is then 1. On a tiny random model.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny
from coterie.artifacts import environment_record, write_json
from crashing import COMMANDS, ON_CPU, check_alike, disturb, finished, lay_out, place_for, started

RESULT = Path(__file__).parent / "results" / "crashes.json"
MOST_KILLS = 3
SERVE = "serve"
CLIENTS = 3
PORT = 8765
ASKED = {"model": "run", "messages": [{"role": "user", "content": "add 3 4"}], "max_tokens": 24, "temperature": 0}


def kill_command(command: str, start: Path, work: Path) -> Callable[[int], int]:
    """Run a command undisturbed; return what disturbs it by a seed, and gives the number of kills that met it."""
    undisturbed = place_for(command, start, work / "undisturbed")
    seconds = finished(COMMANDS[command], undisturbed)

    def one(seed: int) -> int:
        chance = random.Random(f"{command} {seed}")
        folder = place_for(command, start, work / f"seed-{seed}")
        kills = [signal.SIGKILL] * chance.randint(1, MOST_KILLS)
        hits = disturb(COMMANDS[command], folder, seconds, kills, chance)
        check_alike(command, folder, undisturbed)
        shutil.rmtree(folder)
        return hits

    return one


def kill_server(start: Path, work: Path) -> Callable[[int], int]:
    """Return what kills a server while it answers, by a seed."""
    folder = place_for(SERVE, start, work / "served")
    words = ["serve", "run", "--port", str(PORT), *ON_CPU]
    before = contents(folder)

    def answer(client: httpx2.Client) -> str:
        return client.post("/v1/chat/completions", json=ASKED).json()["choices"][0]["message"]["content"]

    def run(kill_after: float | None) -> str:
        process = started(words, folder)
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
                wait_ready(client)
                if kill_after is None:
                    return answer(client)
                asking = [threading.Thread(target=ask_on, args=(client, answer)) for _ in range(CLIENTS)]
                for thread in asking:
                    thread.start()
                time.sleep(kill_after)
                os.kill(process.pid or 0, signal.SIGKILL)
                for thread in asking:
                    thread.join()
                return ""
        finally:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGKILL)
            process.join()

    wanted = run(None)

    def one(seed: int) -> int:
        run(random.Random(f"{SERVE} {seed}").uniform(0, 1.0))
        after = contents(folder)
        assert after == before, f"files differ: {sorted(after.keys() ^ before.keys())}"
        if seed % 10 == 0:  # it starts anew after every kill; each tenth answer is compared
            answered = run(None)
            assert answered == wanted, f"{answered!r} is not {wanted!r}"
        return 1

    return one


def ask_on(client: httpx2.Client, answer: Callable[[httpx2.Client], str]) -> None:
    """Ask until the server is gone."""
    with suppress(httpx2.HTTPError):
        while True:
            answer(client)


def wait_ready(client: httpx2.Client) -> None:
    """Wait until the server answers."""
    for _ in range(600):
        with suppress(httpx2.HTTPError):
            if client.get("/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit("the server does not come up")


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder but the output of the commands in it."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("std1", "std2"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def main() -> None:
    """Go on with the seeds of a command, until all are done or time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=[*COMMANDS, SERVE], required=True)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path, default=RESULT)
    flags = parser.parse_args()
    record: dict[str, Any] = json.loads(flags.output.read_text()) if flags.output.exists() else {"commands": {}}
    own = record["commands"].setdefault(flags.command, {"seeds": 0, "kills": 0, "differed": []})
    work = Path(tempfile.mkdtemp(prefix="crashes-"))
    os.environ["COTERIE_CACHE"] = str(work / "cache")
    start = lay_out(work / "start", tiny.save_model(work / "tiny"))
    one = kill_server(start, work) if flags.command == SERVE else kill_command(flags.command, start, work)
    until = time.monotonic() + 60 * flags.minutes
    while own["seeds"] < flags.seeds and time.monotonic() < until:
        try:
            own["kills"] += one(own["seeds"])
        except AssertionError as error:
            own["differed"].append({"seed": own["seeds"], "what": str(error)[:1000]})
            print(f"seed {own['seeds']}: {str(error)[:1000]}")
        own["seeds"] += 1
        write_json(flags.output, {**record, **environment_record()})
    print(f"{flags.command}: {own['seeds']} seeds, {own['kills']} kills, {len(own['differed'])} differed")
    if not own["differed"]:
        shutil.rmtree(work)
    raise SystemExit(1 if own["differed"] else 0)


if __name__ == "__main__":
    main()
