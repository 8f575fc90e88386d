"""The law of the cache through HTTP: what one request has left is another's only if all that made it is equal."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safetensors.torch import load_file, save_file

from coterie.mixture import Mixture
from coterie.routers.fixed import FixedRouter
from served import chat, started

LONG = "add up 3 4 5 and so on, " * 17  # 408 tokens of the tiny model, which reads 512
NO_END = {257: -100}  # the tiny model's, so that every answer has its tokens
SETTINGS = (
    {"base": 1.0},
    {"cluster-0": 1.0},
    {"base": 0.5, "cluster-0": 0.5},
    {"base": 0.6, "cluster-0": 0.4},
)


def cold(folder: Path, weights: dict[str, float], combiner: str) -> list[float]:
    """The log-probabilities of a mixture that has read nothing before."""
    mixture = Mixture.from_pretrained(folder, device="cpu").replace(router=FixedRouter(weights), combiner=combiner)
    return list(mixture.generate(LONG, max_new_tokens=4, logit_bias=NO_END)[0].logprobs)


def warm(client: httpx2.Client, combiner: str, **fields: Any) -> tuple[list[float], int]:
    """The same through HTTP, and how many tokens of the prompt were taken from earlier ones."""
    messages = [{"role": "user", "content": LONG}]
    asked = {"messages": messages, "max_tokens": 4, "temperature": 0, "logprobs": True, "logit_bias": NO_END}
    answer = chat(client, **asked, **{"coterie": {"combiner": combiner}, **fields})
    logprobs = [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]
    return logprobs, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def folder(run_folder: Path, tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("reloaded") / "run"
    shutil.copytree(run_folder, copy)
    return copy


@pytest.fixture(scope="module")
def server(folder: Path):
    with started(f"elrea={folder}") as running:
        yield running


def test_no_request_goes_on_from_what_other_experts_or_weights_have_read(server, client, folder):
    """llama.cpp#26207: the cache was reused across the `lora` lists of requests."""
    for combiner in ("layers", "logits"):
        wanted = [cold(folder, weights, combiner) for weights in SETTINGS]
        for turn in range(2):
            for weights, logprobs in zip(SETTINGS, wanted, strict=True):
                found, cached = warm(client, combiner, coterie={"weights": weights, "combiner": combiner})
                assert found == pytest.approx(logprobs, abs=1e-4), (combiner, weights)
                assert bool(cached) == (
                    turn > 0 or combiner == "logits"
                )  # whose rows are single experts, known by then
    names = list(Mixture.from_pretrained(folder, device="cpu").bank.names)
    lora = [{"id": names.index(name), "scale": scale} for name, scale in SETTINGS[3].items()]
    found, cached = warm(client, "layers", lora=lora)
    assert found == pytest.approx(cold(folder, SETTINGS[3], "layers"), abs=1e-4) and cached


def test_an_expert_of_the_same_name_that_was_loaded_anew_goes_on_from_nothing(server, client, folder):
    """vllm#30931, #42125: an adapter that was reloaded in place met what the old one had cached."""
    asked = {"coterie": {"weights": SETTINGS[2], "combiner": "layers"}}
    before, _ = warm(client, "layers", **asked)
    file = folder / "experts" / "base" / "adapter_model.safetensors"
    save_file({name: 3 * tensor for name, tensor in load_file(file).items()}, file)
    asyncio.run(server.worker.call(lambda: server.catalogue.load("elrea", str(folder))))
    after, cached = warm(client, "layers", **asked)
    assert after == pytest.approx(cold(folder, SETTINGS[2], "layers"), abs=1e-4) and not cached
    assert after != pytest.approx(before, abs=1e-2)
