"""The server under load: tokens a second, and how long clients wait, at 1, 4 and 16 clients.

    python benchmarks/serve.py --output benchmarks/results/serve.json --minutes 9    (again, while it says so)

An ensemble of five experts, which meet in the logits, answers in four ways: by `coterie serve`, by the same with one
place (requests one after another), by PEFT's mixed batch in a loop behind FastAPI, and, for what one expert costs
elsewhere, by llama.cpp's server with one adapter on a Q4_1 base (left out for a model that is no GGUF file). All are up
at once, each in a process of its own; every round asks them in turn, each client one request after another.

`http_overhead` is what one client's answer takes over HTTP beyond the same engine in this process.
`longest_gap_over_chunk` is the longest time between tokens of somebody who is answered while a long prompt arrives,
without the usual time, over the time of one chunk of that prompt: 1 is one chunk.

Every round is kept beside the output as soon as it is measured, and the result is written when all are there.
"""

import asyncio
import json
import math
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from _harness import arguments, busy, load, median_ratio, publish, random_adapter

from coterie.backbone.aliases import ALIASES, alias_gguf
from coterie.backbone.gguf_files import write_gguf_adapter
from coterie.backbone.loading import Backbone
from coterie.combiners.table import make_combiner
from coterie.data.batching import PromptFormat, TokenRow
from coterie.engine.engine import CHUNK
from coterie.experts.bank import load_bank
from coterie.mixture import Mixture
from coterie.routers.fixed import uniform
from coterie.settings.sampling import SamplingSettings

EXPERTS = 5
CLIENTS = (1, 4, 16)
WORDS = "Explain in simple words why the sky is blue during the day and red in the evening. "
LONG = 2048  # tokens, or half of what the model can read
STARTING = 300  # seconds
PIECES = ("16", "long", "4", "http", "1")
"""Numbers of clients, one client over HTTP and without, and one beside whom a long prompt arrives."""
PAIRS = 3  # of answers over HTTP and without, in a round
LONGEST_ROUND = 270  # seconds that a round may take which was never measured

Round = dict[str, Any]
"""What one round of one piece has measured: seconds, by what they are of."""


@dataclass(frozen=True)
class Way:
    """A server, and what its requests bring beside prompt and limit."""

    url: str
    fields: Mapping[str, object]


def saved_mixture(backbone: Backbone, folder: Path) -> Mixture:
    """Write a mixture of random adapters, weighed alike, as a folder that `coterie serve` loads."""
    names = tuple(f"expert-{number}" for number in range(EXPERTS))
    for number, name in enumerate(names):
        shutil.copytree(random_adapter(backbone, seed=number), folder / "experts" / name)
    bank = load_bank({name: folder / "experts" / name for name in names}, backbone.model)
    prompts = PromptFormat(backbone.tokenizer)
    mixture = Mixture(backbone, bank, uniform(names), make_combiner("logits"), prompts, "elrea", folder)
    mixture.write_description(folder)
    return mixture


@contextmanager
def process(*words: str, url: str | None = None) -> Iterator[str]:
    """Run a server for the length of a `with`; its address is the one given, or what it prints first."""
    pipe = subprocess.PIPE
    running = subprocess.Popen([sys.executable, *words], stdin=pipe, stdout=sys.stderr if url else pipe, text=True)
    try:
        address = url or str(running.stdout and running.stdout.readline().strip())
        answers_within(f"{address}/v1/models", running)
        yield address
    finally:
        running.terminate()
        running.wait()


def answers_within(url: str, running: subprocess.Popen[str]) -> None:
    """Wait until anything at all is answered, but that it is loading."""
    for _ in range(STARTING):
        if running.poll() is not None:
            raise SystemExit(f"a server has ended before it answered: {running.args}")
        try:
            if httpx2.get(url, timeout=60, trust_env=False).status_code != httpx2.codes.SERVICE_UNAVAILABLE:
                return
        except httpx2.TransportError:
            pass
        time.sleep(1)
    raise SystemExit(f"{url} does not answer")


def free_port() -> int:
    """Find a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextmanager
def ways(model: str, mixture: Mixture, folder: Path, longest: int) -> Iterator[dict[str, Way]]:
    """Run all servers for the length of a `with`."""
    ends = sorted(mixture.backbone.stop_ids | mixture.prompts.end_ids)
    ours = {"model": "ensemble", "temperature": 0, "logit_bias": {str(token): -100 for token in ends}}
    helper = str(Path(__file__).with_name("_servers.py"))
    with ExitStack() as stack:
        found = {}
        for name, places in (("batched", max(CLIENTS)), ("unbatched", 1)):
            port = free_port()
            words = ("-m", "coterie", "serve", f"ensemble={folder}", "--port", str(port), "--places", str(places))
            url = stack.enter_context(process(*words, url=f"http://127.0.0.1:{port}"))
            found[name] = Way(url, ours)
        experts = [str(folder / "experts" / name) for name in mixture.bank.names]
        found["peft"] = Way(stack.enter_context(process(helper, "peft", model, *experts)), {})
        if model in ALIASES:
            adapter = folder / "adapter.gguf"
            write_gguf_adapter(adapter, mixture.bank.adapters[0], mixture.backbone.model)
            words = (helper, "llama.cpp", str(alias_gguf(model)), str(adapter), str(max(CLIENTS)), str(longest))
            fields = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}
            found["llama.cpp"] = Way(stack.enter_context(process(*words)), fields)
        yield found


# ---------------------------------------------------------------------------------------------------- clients


async def times_of(http: httpx2.AsyncClient, way: Way, prompt: str | list[int], limit: int) -> list[float]:
    """Ask for one answer; return when it was asked for, and when each piece of its text came."""
    body = {"prompt": prompt, "max_tokens": limit, "stream": True, **way.fields}
    times, reason = [time.perf_counter()], None
    async with http.stream("POST", f"{way.url}/v1/completions", json=body) as response:
        if response.status_code != httpx2.codes.OK:
            raise SystemExit(
                f"{way.url} refuses with status {response.status_code}: {(await response.aread()).decode()}"
            )
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            for choice in json.loads(data)["choices"]:
                reason = choice["finish_reason"] or reason
                if choice["text"]:
                    times.append(time.perf_counter())
    if reason != "length":
        raise SystemExit(f"{way.url}: an answer ended by {reason!r}, and all are to be of {limit} tokens")
    return times


def prompts(count: int, start: int) -> list[str]:
    """Make prompts that begin differently, so that none is taken from a cache."""
    return [f"{start + number}. {WORDS}" for number in range(count)]


async def loaded(way: Way, clients: int, texts: list[str], steps: int) -> Round:
    """Let clients ask one request after another until all texts are answered; return what they waited for."""
    left, first, between = iter(texts), [], []

    async def client() -> None:
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as http:
            for text in left:
                times = await times_of(http, way, text, steps)
                first.append(times[1] - times[0])
                between.extend(later - sooner for sooner, later in zip(times[1:], times[2:], strict=False))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    speed = len(texts) * steps / (time.perf_counter() - started)
    return {"tokens_per_second": speed, "first_token": first, "between_tokens": between}


async def beside_a_long_prompt(way: Way, number: int, tokens: int, backbone: Backbone) -> tuple[float, float, float]:
    """Return the longest time between tokens while a long prompt is read, the usual one, and that of one chunk."""
    long = backbone.tokenizer(f"{number}. " + WORDS * (tokens // 8))["input_ids"][:tokens]
    async with httpx2.AsyncClient(timeout=None, trust_env=False) as http:
        chunks = math.ceil(EXPERTS * tokens / CHUNK)
        writing = asyncio.create_task(times_of(http, way, f"{number} {WORDS}", chunks + 40))
        await asyncio.sleep(0)
        alone = await times_of(http, way, f"{number}! {WORDS}", 16)  # by then the other one is being written
        arrival = time.perf_counter()
        asked, answered = (await times_of(http, way, long, 1))[:2]
        times = [when for when in await writing if when > alone[1]]
    gaps = [(later - sooner, sooner) for sooner, later in zip(times, times[1:], strict=False)]
    during = [gap for gap, since in gaps if arrival <= since <= answered]
    after = [gap for gap, since in gaps if since > answered] or during
    usual = statistics.median(after)
    return max(during, default=usual), usual, (answered - asked) / chunks - usual


# ---------------------------------------------------------------------------------------------------- measured


class Bench:
    """The servers, and what is measured of them: pieces that take a few minutes each."""

    def __init__(self, flags: Namespace, place: Path, stack: ExitStack) -> None:
        """Start all servers, and let each answer a request that does not count."""
        self.steps, self.requests = (8, {1: 1, 4: 4, 16: 16}) if flags.quick else (48, {1: 4, 4: 8, 16: 16})
        self.backbone = load(flags.model)
        self.long = min(LONG, (self.backbone.context or 2 * LONG) // 2)
        self.mixture = saved_mixture(self.backbone, place)
        self.ways = stack.enter_context(ways(flags.model, self.mixture, place, self.long + 256))
        for way in self.ways.values():
            asyncio.run(loaded(way, 1, [WORDS], self.steps))

    def measure(self, piece: str, number: int) -> Round:
        """Measure a round of a piece."""
        if piece == "http":
            return self.http_pairs(number)
        if piece == "long":
            gap = beside_a_long_prompt(self.ways["batched"], 10**6 + number, self.long, self.backbone)
            return dict(zip(("gap", "usual", "chunk"), asyncio.run(gap), strict=True))
        clients = int(piece)
        count = self.requests[clients]
        texts = [prompts(count, (number * len(self.ways) + place) * count) for place in range(len(self.ways))]
        asked = zip(self.ways.items(), texts, strict=True)
        return {name: asyncio.run(loaded(way, clients, own, self.steps)) for (name, way), own in asked}

    def http_pairs(self, number: int) -> Round:
        """Time one answer over HTTP and by an engine in this process, in turn, after a pair that does not count."""
        ends = self.mixture.backbone.stop_ids | self.mixture.prompts.end_ids
        draws = [SamplingSettings(logit_bias=[f"{token}=-100" for token in ends])]
        found: Round = {"over_http": [], "here": []}
        for text in prompts(1 + PAIRS, 10**5 + number * (1 + PAIRS)):
            found["over_http"].append(asyncio.run(self.over_http(text)))
            ids = tuple(self.mixture.tokenizer(text)["input_ids"])
            row = TokenRow(ids, len(ids), (False,) * len(ids), (True,) * len(ids))
            started = time.perf_counter()
            list(self.mixture.engine(places=max(CLIENTS)).run(self.mixture.requests([row], [self.steps], draws)))
            found["here"].append(time.perf_counter() - started)
        return {name: seconds[1:] for name, seconds in found.items()}

    async def over_http(self, text: str) -> float:
        """Return the seconds of one answer."""
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as http:
            times = await times_of(http, self.ways["batched"], text, self.steps)
            return times[-1] - times[0]


def quantile(values: list[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def under_load(clients: int, rounds: Sequence[Round]) -> tuple[dict[str, float], dict[str, float]]:
    """Return medians over rounds, quantiles over all requests and tokens, and ratios to other servers."""
    medians, ratios = {}, {}
    speed = {name: [found[name]["tokens_per_second"] for found in rounds] for name in rounds[0]}
    for name, values in speed.items():
        key = f"{name}_{clients}"
        medians[f"{key}_tokens_per_second"] = statistics.median(values)
        for what in ("first_token", "between_tokens"):
            own = [seconds for found in rounds for seconds in found[name][what]]
            medians |= {f"{key}_{what}_p{round(100 * share)}_seconds": quantile(own, share) for share in (0.5, 0.95)}
        if name != "batched":
            ratios[f"batched_over_{key}"] = median_ratio(speed["batched"], values)
    return medians, ratios


def summary(measured: Mapping[str, Sequence[Round]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return medians and ratios of all pieces."""
    medians: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for clients in CLIENTS:
        for all_of_them, own in zip((medians, ratios), under_load(clients, measured[str(clients)]), strict=True):
            all_of_them |= own
    over_http, here = ([t for found in measured["http"] for t in found[name]] for name in ("over_http", "here"))
    medians["one_client_over_http_seconds"] = statistics.median(over_http)
    medians["one_client_engine_seconds"] = statistics.median(here)
    ratios["http_overhead"] = median_ratio(over_http, here) - 1
    gaps = measured["long"]
    for name, what in (("gap", "longest_gap"), ("usual", "usual_gap"), ("chunk", "chunk")):
        medians[f"long_prompt_{what}_seconds"] = statistics.median(found[name] for found in gaps)
    ratios["longest_gap_over_chunk"] = statistics.median(
        (found["gap"] - found["usual"]) / found["chunk"] for found in gaps
    )
    return medians, ratios


class Kept:
    """Rounds that were measured, also by earlier runs of the same command: a file of one line each."""

    def __init__(self, output: Path | None, setting: Mapping[str, object]) -> None:
        """Read what is there of the same setting."""
        self.path = output and output.with_suffix(".rounds.jsonl")
        self.setting = dict(setting)
        self.lines: list[dict[str, Any]] = []
        if self.path and self.path.exists():
            lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            self.lines = [line for line in lines if line["setting"] == self.setting]

    def of(self, piece: str) -> list[Round]:
        """Return the rounds of a piece."""
        return [line["found"] for line in self.lines if line["piece"] == piece]

    def seconds(self, piece: str) -> float:
        """Return the most that a round of a piece has taken, or may."""
        return max((line["seconds"] for line in self.lines if line["piece"] == piece), default=LONGEST_ROUND)

    def add(self, piece: str, found: Round, seconds: float) -> None:
        """Keep a round."""
        self.lines.append({"setting": self.setting, "piece": piece, "seconds": seconds, "found": found})
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")


def main() -> None:
    """Measure rounds that are not measured yet, as far as time goes, and print the result when all are there."""
    started, flags = time.monotonic(), arguments("serve")
    rounds = flags.rounds or (1 if flags.quick else 3)
    setting = {"model": flags.model, "experts": EXPERTS, "rank": 8, "quick": flags.quick}
    kept = Kept(flags.output, setting | {"beside": flags.beside})
    todo = [(piece, number) for number in range(rounds) for piece in PIECES if number >= len(kept.of(piece))]
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        stack.enter_context(busy(flags.beside))
        bench = Bench(flags, Path(place), stack)
        for piece, number in todo:
            began = time.monotonic()
            if began - started + kept.seconds(piece) > 60 * (flags.minutes or math.inf):
                raise SystemExit(f"{len(kept.lines)} rounds are measured; type the same command again to go on")
            found = bench.measure(piece, number)
            kept.add(piece, found, time.monotonic() - began)
            print(f"{piece}, round {number + 1} of {rounds}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    settings = {name: value for name, value in setting.items() if name != "quick"}
    publish(
        "serve",
        settings | {"rounds": rounds, "steps": bench.steps, "long_prompt": bench.long},
        *summary({piece: kept.of(piece) for piece in PIECES}),
    )
    if kept.path:
        kept.path.unlink()


if __name__ == "__main__":
    main()
