"""The server under load: tokens a second, and how long clients wait, at 1, 4 and 16 clients.

An ensemble of five experts, which meet in the logits, answers in four ways: by `coterie serve`, by the same with one
place (requests one after another), by PEFT's mixed batch in a loop behind FastAPI, and, for what one expert costs
elsewhere, by llama.cpp's server with one adapter on a Q4_1 base (left out for a model that is no GGUF file). All are up
at once, each in a process of its own; every round asks them in turn, each client one request after another.

`http_overhead` is what one client's answer takes over HTTP beyond the same engine in this process.
`longest_gap_over_chunk` is the longest time between tokens of somebody who is answered while a long prompt arrives,
without the usual time, over the time of one chunk of that prompt: 1 is one chunk.
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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass
class Waiting:
    """What clients waited for, in seconds, in all rounds of one server and number of clients."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)


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


async def loaded(way: Way, clients: int, texts: list[str], steps: int, waiting: Waiting) -> None:
    """Let clients ask one request after another until all texts are answered."""
    left = iter(texts)

    async def client() -> None:
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as http:
            for text in left:
                times = await times_of(http, way, text, steps)
                waiting.first.append(times[1] - times[0])
                waiting.between.extend(later - sooner for sooner, later in zip(times[1:], times[2:], strict=False))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    waiting.tokens_per_second.append(len(texts) * steps / (time.perf_counter() - started))


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


def under_load(
    found: Mapping[str, Way], rounds: int, steps: int, requests: Mapping[int, int]
) -> dict[tuple[str, int], Waiting]:
    """Let every number of clients ask every server, in turn, after one request that does not count."""
    measured = {(name, clients): Waiting() for clients in requests for name in found}
    for way in found.values():
        asyncio.run(loaded(way, 1, [WORDS], steps, Waiting()))
    start = 0
    for _ in range(rounds):
        for (name, clients), waiting in measured.items():
            asyncio.run(loaded(found[name], clients, prompts(requests[clients], start), steps, waiting))
            start += requests[clients]
    return measured


def http_pairs(way: Way, mixture: Mixture, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    """Time one answer over HTTP and by an engine in this process, in turn."""
    ends = mixture.backbone.stop_ids | mixture.prompts.end_ids
    draws = [SamplingSettings(logit_bias=[f"{token}=-100" for token in ends])]
    over_http, here = [], []

    async def ask(text: str) -> float:
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as http:
            times = await times_of(http, way, text, steps)
            return times[-1] - times[0]

    for text in prompts(rounds + 1, 10**5):
        over_http.append(asyncio.run(ask(text)))
        ids = tuple(mixture.tokenizer(text)["input_ids"])
        row = TokenRow(ids, len(ids), (False,) * len(ids), (True,) * len(ids))
        started = time.perf_counter()
        list(mixture.engine(places=max(CLIENTS)).run(mixture.requests([row], [steps], draws)))
        here.append(time.perf_counter() - started)
    return over_http[1:], here[1:]  # without the round that warms up


def quantile(values: list[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(measured: Mapping[tuple[str, int], Waiting]) -> dict[str, float]:
    """Return medians over rounds, and quantiles over all requests and tokens."""
    found = {}
    for (name, clients), waiting in measured.items():
        key = f"{name}_{clients}"
        found[f"{key}_tokens_per_second"] = statistics.median(waiting.tokens_per_second)
        for what, values in (("first_token", waiting.first), ("between_tokens", waiting.between)):
            found |= {f"{key}_{what}_p{round(100 * share)}_seconds": quantile(values, share) for share in (0.5, 0.95)}
    return found


def main() -> None:
    """Run all servers in turn and print the result."""
    flags = arguments("serve")
    rounds, steps, requests = (1, 8, {1: 1, 4: 4, 16: 16}) if flags.quick else (3, 48, {1: 4, 4: 8, 16: 16})
    backbone = load(flags.model)
    long = min(LONG, (backbone.context or 2 * LONG) // 2)
    with tempfile.TemporaryDirectory() as place, busy(flags.beside):
        mixture = saved_mixture(backbone, Path(place))
        with ways(flags.model, mixture, Path(place), long + 256) as found:
            measured = under_load(found, rounds, steps, requests)
            over_http, here = http_pairs(found["batched"], mixture, steps, 2 * rounds)
            gaps = [
                asyncio.run(beside_a_long_prompt(found["batched"], 10**6 + number, long, backbone))
                for number in range(rounds)
            ]
    longest, usual, chunk = (statistics.median(values) for values in zip(*gaps, strict=True))
    medians = summary(measured) | {
        "one_client_over_http_seconds": statistics.median(over_http),
        "one_client_engine_seconds": statistics.median(here),
        "long_prompt_longest_gap_seconds": longest,
        "long_prompt_usual_gap_seconds": usual,
        "long_prompt_chunk_seconds": chunk,
    }
    ratios = {
        f"batched_over_{name}_{clients}": median_ratio(
            measured["batched", clients].tokens_per_second, waiting.tokens_per_second
        )
        for (name, clients), waiting in measured.items()
        if name != "batched"
    }
    ratios["http_overhead"] = median_ratio(over_http, here) - 1
    ratios["longest_gap_over_chunk"] = statistics.median((gap - own) / one for gap, own, one in gaps)
    publish(
        "serve",
        {"model": flags.model, "experts": EXPERTS, "rank": 8, "steps": steps, "rounds": rounds, "long_prompt": long},
        medians,
        ratios,
    )


if __name__ == "__main__":
    main()
