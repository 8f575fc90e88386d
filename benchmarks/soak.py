"""Memory over ten minutes of everything at once: streams, clients that go, refused requests, adapters replaced.

Eight clients keep `coterie serve` busy while an adapter is replaced again and again. The resident memory of the server
is read every second; of the time after the first fifth, in which buffers and caches fill, `memory_growth` is the median
of the last quarter over that of the first: 1 is flat. Not part of any test run.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from _harness import arguments, load, publish

from serve import EXPERTS, WORDS, saved_mixture

MINUTES, QUICK_MINUTES = 10.0, 1.0
CLIENTS = 8
ADMIN = "soak-admin-000000001"
KINDS = ("whole", "stream", "leave", "weights", "refused", "several")


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """Serve a mixture in a process of its own; give its address and its number."""
    keys = folder.parent / "keys.txt"
    keys.write_text(f"{ADMIN} role=admin\n")
    words = ["serve", f"soak={folder}", "--port", "0", "--api-key-file", str(keys), "--allow-folder", str(folder)]
    command = [sys.executable, "-m", "coterie", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        lines = iter(running.stderr.readline, "")
        event = next((line for line in lines if line.startswith("{") and '"event": "ready"' in line), None)
        if event is None:
            raise SystemExit("the server has ended before it was ready")
        threading.Thread(target=running.stderr.read, daemon=True).start()
        yield json.loads(event)["url"], running.pid
        running.terminate()


def ask(client: httpx2.Client, kind: str, draw: random.Random) -> str:
    """Send one request of a kind; return what became of it."""
    body: dict[str, object] = {"model": "soak", "messages": [{"role": "user", "content": WORDS * draw.randint(1, 6)}]}
    body |= {"max_tokens": draw.randint(1, 24), "temperature": 1.0, "seed": draw.randrange(1000)}
    if kind == "weights":
        body["coterie"] = {"weights": {f"expert-{number}": draw.random() for number in range(EXPERTS)}}
    if kind == "several":
        body["n"] = 3
    if kind == "refused":
        body["model"] = "nobody"
    if kind not in ("stream", "leave"):
        return str(client.post("/v1/chat/completions", json=body).status_code)
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        for _ in response.iter_lines():
            if kind == "leave":
                return "left"
    return str(response.status_code)


def resident(process: int) -> float:
    """Return the MiB of memory that a process holds (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def soak(url: str, process: int, seconds: float) -> tuple[list[float], Counter[str]]:
    """Keep a server busy for so long; return its memory second by second, and what became of requests."""
    over, seen, until = threading.Event(), Counter[str](), time.monotonic() + seconds
    header = {"Authorization": f"Bearer {ADMIN}"}

    def client(number: int) -> None:
        draw = random.Random(number)
        with httpx2.Client(base_url=url, headers=header, timeout=600, trust_env=False) as http:
            while not over.is_set():
                kind = draw.choice(KINDS)
                seen[f"{kind}: {ask(http, kind, draw)}"] += 1

    def admin() -> None:
        with httpx2.Client(base_url=url, headers=header, timeout=600, trust_env=False) as http:
            number = 0
            while not over.wait(2):
                body = {"lora_name": "swapped", "lora_path": f"experts/expert-{number % EXPERTS}", "load_inplace": True}
                seen[f"loads: {http.post('/v1/load_lora_adapter', json=body).status_code}"] += 1
                number += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    threads.append(threading.Thread(target=admin))
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < until:
        memory.append(resident(process))
        time.sleep(1)
    over.set()
    for thread in threads:
        thread.join()
    return memory, seen


def main() -> None:
    """Soak, and publish how memory went."""
    options = arguments(__doc__ or "")
    minutes = QUICK_MINUTES if options.quick else MINUTES
    with tempfile.TemporaryDirectory() as place:
        saved_mixture(load(options.model), folder := Path(place) / "mixture")
        with served(folder) as (url, process):
            memory, seen = soak(url, process, 60 * minutes)
    settled = memory[len(memory) // 5 :]
    quarter = max(1, len(settled) // 4)
    first, last = statistics.median(settled[:quarter]), statistics.median(settled[-quarter:])
    settings = {"model": options.model, "minutes": minutes, "clients": CLIENTS, "requests": dict(sorted(seen.items()))}
    publish("soak", settings, {"first_mib": first, "last_mib": last}, {"memory_growth": last / first})


if __name__ == "__main__":
    main()
