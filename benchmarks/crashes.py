"""Commands that are killed or out of disk space at random moments end with the files of undisturbed ones: many seeds.

    python benchmarks/crashes.py --command "fit elrea" --seeds 100 --minutes 9

Every seed disturbs a command up to three times, by SIGKILL at another moment of what the last try had come to, or by a
disk that is full at a random byte; then lets it finish and compares all files with an undisturbed run's. All the while
the clock jumps and what is only read cannot be written. `serve` is killed while it answers, leaves its folder as it
was and answers the same again. Results are added up in `results/crashes.json`: the same line, typed again, goes on with
the next seed; without `--command` it goes on with all of them, one after the other. What differed is kept beside the
result and told; the exit code is then 1. On a tiny random model.
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
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny
from conditions import jumping_clock, only_reading
from coterie.artifacts import environment_record, locked, write_json
from crashing import (
    COMMANDS,
    FULL,
    ON_CPU,
    check_alike,
    contents,
    disturb,
    has_disks,
    inputs_of,
    lay_out,
    needs,
    place_for,
    started,
)

RESULT = Path(__file__).parent / "results" / "crashes.json"
MOST_TROUBLES = 3
NAMES: dict[int | str, str] = {signal.SIGKILL: "kills", FULL: "full_disks"}
SERVE = "serve"
CLIENTS = 3
Met = Counter[int | str]
PORT = 8765
ASKED = {"model": "run", "messages": [{"role": "user", "content": "add 3 4"}], "max_tokens": 24, "temperature": 0}


def disturb_command(command: str, start: Path, work: Path) -> Callable[[int], Met]:
    """Run a command undisturbed; return what disturbs it by a seed, and tells how often each trouble met it at work."""
    here, undisturbed = work / "here", work / "undisturbed"  # all run in one place, since hashes are of whole paths
    needed = needs(command, place_for(command, start, here))
    here.rename(undisturbed)
    known = (signal.SIGKILL, signal.SIGKILL, FULL) if has_disks() else (signal.SIGKILL,)

    def one(seed: int) -> Met:
        chance = random.Random(f"{command} {seed}")
        folder = place_for(command, start, here)
        troubles = [chance.choice(known) for _ in range(chance.randint(1, MOST_TROUBLES))]
        conditions = [partial(jumping_clock, seed), partial(only_reading, inputs_of(command))]
        try:
            met = disturb(command, folder, needed, troubles, chance, conditions)
            check_alike(command, folder, undisturbed, here)
        except AssertionError as error:
            kept = folder.rename(work / f"seed-{seed}")
            raise AssertionError(str(error).replace(str(folder), str(kept))) from error
        shutil.rmtree(folder)
        return met

    return one


def kill_server(start: Path, work: Path) -> Callable[[int], Met]:
    """Return what kills a server while it answers, by a seed."""
    folder = place_for(SERVE, start, work / "served")
    words = ["serve", "run", "--port", str(PORT), *ON_CPU]
    before = contents(folder)
    conditions = [partial(jumping_clock, 0), partial(only_reading, inputs_of(SERVE))]

    def answer(client: httpx2.Client) -> str:
        return client.post("/v1/chat/completions", json=ASKED).json()["choices"][0]["message"]["content"]

    def run(kill_after: float | None) -> str:
        process = started(words, folder, conditions)
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
                wait_ready(client)
                if kill_after is None:
                    return answer(client)
                asking = [threading.Thread(target=ask_on, args=(client, answer)) for _ in range(CLIENTS)]
                for thread in asking:
                    thread.start()
                time.sleep(kill_after)
                process.kill()
                for thread in asking:
                    thread.join()
                return ""
        finally:
            process.kill()
            process.join()

    wanted = run(None)

    def one(seed: int) -> Met:
        run(random.Random(f"{SERVE} {seed}").uniform(0, 1.0))
        after = contents(folder)
        assert after == before, f"files differ: {sorted(after.keys() ^ before.keys())}"
        if seed % 10 == 0:  # it starts anew after every kill; each tenth answer is compared
            answered = run(None)
            assert answered == wanted, f"{answered!r} is not {wanted!r}"
        return Counter({signal.SIGKILL: 1})

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


def go_on(command: str, start: Path, flags: argparse.Namespace, until: float) -> bool:
    """Go on with the seeds of a command, until all are done or time is up; tell whether all ended as they should."""
    work = start.with_name(command.replace(" ", "-"))
    one = kill_server(start, work) if command == SERVE else disturb_command(command, start, work)
    own = result_of(command, flags.output)
    while own["seeds"] < flags.seeds and time.monotonic() < until:
        try:
            for trouble, count in one(own["seeds"]).items():
                own[NAMES[trouble]] += count
        except AssertionError as error:
            own["differed"].append({"seed": own["seeds"], "what": str(error)[-1000:]})
            print(f"{command}, seed {own['seeds']}: {str(error)[-1000:]}")
        own["seeds"] += 1
        keep_result(command, own, flags.output)
    told = ", ".join(f"{own[name]} {name.replace('_', ' ')}" for name in NAMES.values())
    print(f"{command}: {own['seeds']} seeds, {told}, {len(own['differed'])} differed", flush=True)
    return not own["differed"]


def result_of(command: str, file: Path) -> dict[str, Any]:
    """Return what is known of a command so far."""
    commands = json.loads(file.read_text())["commands"] if file.exists() else {}
    return commands.get(command, {"seeds": 0, **dict.fromkeys(NAMES.values(), 0), "differed": []})


def keep_result(command: str, own: dict[str, Any], file: Path) -> None:
    """Put the result of a command beside those of others, which other processes may be at."""
    with locked(file.with_suffix(".lock"), file):
        commands = json.loads(file.read_text())["commands"] if file.exists() else {}
        write_json(file, {"commands": {**commands, command: own}, **environment_record()})


def main() -> None:
    """Go on with the seeds of one command or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=[*COMMANDS, SERVE], help="default: all, one after the other")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path, default=RESULT)
    flags = parser.parse_args()
    until = time.monotonic() + 60 * flags.minutes
    wanted = [flags.command] if flags.command else [*COMMANDS, SERVE]
    left = [name for name in wanted if result_of(name, flags.output)["seeds"] < flags.seeds]
    work = Path(tempfile.mkdtemp(prefix="crashes-"))
    os.environ["COTERIE_CACHE"] = str(work / "cache")
    start = lay_out(work / "start", tiny.save_model(work / "tiny"))
    alike = all([go_on(name, start, flags, until) for name in left if time.monotonic() < until])
    if alike:
        shutil.rmtree(work)
    raise SystemExit(0 if alike else 1)


if __name__ == "__main__":
    main()
