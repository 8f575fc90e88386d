"""Answers that another server computes: llama.cpp's own, and a stub of vLLM that notes what it is asked."""

import json
import string
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

import tiny
from coterie.errors import CoterieError
from coterie.experts.bank import load_adapter
from coterie.experts.names import BACKBONE
from coterie.mixture import Mixture
from coterie.mixture.export import export_mixture
from coterie.settings.commands import ExportSettings
from coterie.settings.reading import from_flat
from pretend_answers import running
from served import chat, chat_body, chat_stream, started

PLAIN = {str(token): 100 for token in tiny.make_tokenizer()(string.ascii_letters)["input_ids"]}
"""Biases under which the tiny model writes letters alone: llama.cpp tells no token that ends within a character."""


@pytest.fixture(scope="module")
def layers(mixture: Mixture) -> Mixture:
    return mixture.replace(combiner="layers")


# ------------------------------------------------------------------------------------------------ llama.cpp


@pytest.fixture(scope="module")
def llama_cpp(run_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """llama.cpp's own server, with the experts of the tiny mixture in another order."""
    library = pytest.importorskip("xllamacpp", reason="the extra llamacpp is not installed")
    folder = tmp_path_factory.mktemp("llama") / "exported"
    wanted = {"mixture": str(run_folder), "target": "llama.cpp", "output": str(folder), "base_type": "f32"}
    export_mixture(from_flat(ExportSettings, wanted))
    parameters = library.CommonParams()
    parameters.model.path = str(folder / "base.gguf")
    parameters.n_ctx, parameters.n_parallel = 1024, 2
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = library.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.fit_params = parameters.warmup = False
    parameters.verbosity = -1
    adapters = []
    for file in sorted((folder / "experts").iterdir(), reverse=True):
        adapter = library.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(file), 0.0
        adapters.append(adapter)
    parameters.lora_adapters, parameters.lora_init_without_apply = adapters, True
    server = library.Server(parameters)
    yield server.listening_address
    del server


@pytest.fixture(scope="module")
def in_front(run_folder: Path, llama_cpp: str):
    with (
        started(f"elrea={run_folder}", upstream=f"llama.cpp={llama_cpp}") as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("asked", "router"),
    [
        ({}, None),
        ({"model": "cluster-1"}, "cluster-1"),
        ({"model": "elrea:backbone"}, BACKBONE),
        ({"coterie": {"weights": {"cluster-0": 1.4, "base": 0.3}}}, {"cluster-0": 1.4, "base": 0.3}),
    ],
    ids=["routed", "one expert", "base model", "own weights"],
)
def test_llama_cpp_computes_what_is_routed_here(in_front, layers, server, asked, router):
    answer = chat(in_front, temperature=0, logit_bias=PLAIN, logprobs=True, top_logprobs=2, **asked)
    own = chat_body(temperature=0, logit_bias=PLAIN, logprobs=True, top_logprobs=2, **asked)
    if "model" not in asked:
        own["coterie"] = {"combiner": "layers", **asked.get("coterie", {})}
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        wanted = client.post("/v1/chat/completions", json=own).json()
    assert wanted["choices"][0]["message"]["content"].isalpha()
    assert answer["choices"][0]["message"] == wanted["choices"][0]["message"]
    assert answer["usage"] == wanted["usage"]
    assert answer["choices"][0]["finish_reason"] == wanted["choices"][0]["finish_reason"]
    logs, ours = (one["choices"][0]["logprobs"]["content"] for one in (answer, wanted))
    assert [log["token"] for log in logs] == [log["token"] for log in ours]
    assert [log["logprob"] for log in logs] == pytest.approx([log["logprob"] for log in ours], abs=2e-4)
    assert [len(log["top_logprobs"]) for log in logs] == [2] * len(logs)


def test_a_stream_of_llama_cpp_is_the_whole_answer_with_the_routing_that_was_used(in_front):
    asked = {"temperature": 0, "logit_bias": PLAIN, "coterie": {"detail": True}}
    whole, frames = chat(in_front, **asked), chat_stream(in_front, **asked)
    told = "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames)
    assert told == whole["choices"][0]["message"]["content"] and len(frames) > 8
    assert frames[0]["choices"][0]["coterie"] == {"weights": whole["choices"][0]["coterie"]["weights"]}


def test_stop_strings_and_seeds_act_and_each_of_several_answers_has_its_own(in_front):
    text = chat(in_front, temperature=0, logit_bias=PLAIN)["choices"][0]["message"]["content"]
    stopped = chat(in_front, temperature=0, logit_bias=PLAIN, stop=[text[3:5]])["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (text[: text.index(text[3:5])], "stop")
    drawn = [chat(in_front, temperature=1.5, seed=2**40, n=3, logit_bias=PLAIN)["choices"] for _ in range(2)]
    texts = [[choice["message"]["content"] for choice in one] for one in drawn]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


@pytest.mark.parametrize(
    ("asked", "param", "told"),
    [
        ({"coterie": {"combiner": "logits"}}, "coterie.combiner", "mixes experts in the layers, not by 'logits'"),
        ({"coterie": {"every": 2}}, "coterie.router", "weighs experts during an answer, which llama.cpp does not"),
        ({"presence_penalty": 1}, None, "does not follow --presence-penalty"),
        ({"messages": [{"role": "user", "content": "x" * 480}], "max_tokens": 4}, None, "context"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_with_a_status(in_front, asked, param, told):
    for stream in (False, True):
        answer = in_front.post("/v1/chat/completions", json=chat_body(stream=stream, **asked))
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param and told in answer.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------------- vLLM


class Vllm:
    """A stub of vLLM: it notes what it is asked, and writes `abc`."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.loaded: list[dict[str, Any]] = []
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.events = [
            event(["a"], "a"),
            event(["b", "c"], "bc"),
            event([], "", "stop"),
            {"choices": []},
        ]
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/tokenize")(self.tokenize)
        self.app.post("/v1/completions")(self.complete)
        self.app.post("/v1/load_lora_adapter")(self.load)
        self.app.post("/v1/unload_lora_adapter")(lambda: "Success")

    def models(self) -> dict[str, Any]:
        experts = ("base", "cluster-0", "cluster-1", "cluster-2")
        return {"data": [{"id": "tiny"}, *({"id": name, "parent": "tiny"} for name in experts)]}

    async def tokenize(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        return {"tokens": tiny.make_tokenizer()(body["prompt"], add_special_tokens=False)["input_ids"]}

    async def load(self, request: Request) -> Any:
        self.loaded.append(await request.json())
        return JSONResponse({}, 404) if self.refusal == (404, {}) else "Success"

    async def complete(self, request: Request) -> Any:
        self.asked.append(await request.json())
        if self.refusal:
            status, headers = self.refusal
            return JSONResponse({"error": {"message": "no room"}}, status, headers)
        lines = [f"data: {json.dumps(one)}\n\n" for one in self.events]
        return StreamingResponse(iter([*lines, "data: [DONE]\n\n"]), media_type="text/event-stream")


def event(letters: list[str], text: str, reason: str | None = None) -> dict[str, Any]:
    """A chunk as vLLM sends it: some tokens by their ids, with one alternative."""
    names = [f"token_id:{tiny.make_tokenizer()(letter)['input_ids'][0]}" for letter in letters]
    logs = {
        "tokens": names,
        "token_logprobs": [-0.5] * len(names),
        "top_logprobs": [{name: -0.5, "token_id:7": -2.0} for name in names],
    }
    return {"choices": [{"index": 0, "text": text, "logprobs": logs if names else None, "finish_reason": reason}]}


@pytest.fixture
def vllm():
    stub = Vllm()
    with running(stub.app) as stub.url:
        yield stub


@pytest.fixture
def before_vllm(run_folder: Path, vllm: Vllm):
    with (
        started(f"elrea={run_folder}", upstream=f"vllm={vllm.url}/v1") as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def test_vllm_runs_an_expert_by_its_name_and_the_base_model_by_its_own(before_vllm, vllm, mixture):
    answer = chat(
        before_vllm, model="cluster-1", temperature=0.5, seed=3, top_k=9, stop="!", logprobs=True, top_logprobs=1
    )
    chat(before_vllm, model="elrea:backbone")
    first, second = vllm.asked
    assert (first["model"], second["model"]) == ("cluster-1", "tiny")
    assert first["prompt"] == list(mixture.tokens("add 3 4")[0].ids)
    wanted = {"temperature": 0.5, "seed": 3, "top_k": 9, "stop": ["!"], "max_tokens": 8, "logprobs": 1, "stream": True}
    assert wanted.items() <= first.items() and set(first["stop_token_ids"]) >= mixture.backbone.stop_ids
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "abc" and choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 4  # with the one that ends it
    logs = choice["logprobs"]["content"]
    assert [(log["token"], log["logprob"]) for log in logs] == [("a", -0.5), ("b", -0.5), ("c", -0.5)]
    assert vllm.loaded == []


def test_several_experts_become_one_exact_adapter_that_vllm_loads_once(before_vllm, vllm, layers):
    asked = {"weights": {"base": 0.52, "cluster-2": 1.24}, "detail": True}
    answers = [chat(before_vllm, coterie=asked) for _ in range(2)]
    assert len(vllm.loaded) == 1 and [one["model"] for one in vllm.asked] == [vllm.loaded[0]["lora_name"]] * 2
    used = {"base": 0.5, "cluster-2": 1.25}
    shares = {name: weight / 1.75 for name, weight in used.items()}
    assert answers[0]["choices"][0]["coterie"]["weights"] == pytest.approx(shares)
    written = load_adapter(Path(vllm.loaded[0]["lora_path"]), layers.backbone.model)
    merged = layers.layers.merged(tuple(used.get(name, 0.0) for name in layers.bank.names))
    for path, pair in merged.items():
        torch.testing.assert_close(tiny.delta(written[path]), tiny.delta(pair))
    chat(before_vllm, coterie={"weights": {"base": 0.5, "cluster-2": 1.0}})
    assert len(vllm.loaded) == 2
    chat(before_vllm)
    assert vllm.asked[-1]["model"] not in ("tiny", *layers.bank.names)  # the router mixes several


@pytest.mark.parametrize(
    ("refusal", "status", "told"),
    [
        ((400, {}), 400, "vLLM: no room"),
        ((500, {}), 502, "vLLM: no room"),
        ((401, {}), 502, "vLLM: no room"),
        ((429, {"Retry-After": "9"}), 503, "vLLM: no room"),
    ],
)
def test_what_vllm_refuses_is_told_in_its_words(before_vllm, vllm, refusal, status, told):
    vllm.refusal = refusal
    answer = before_vllm.post("/v1/chat/completions", json=chat_body(model="cluster-0", stream=True))
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, told)
    assert answer.headers.get("Retry-After") == refusal[1].get("Retry-After")


def test_a_vllm_that_loads_no_adapters_says_what_to_do(before_vllm, vllm):
    vllm.refusal = (404, {})
    answer = before_vllm.post("/v1/chat/completions", json=chat_body())
    assert answer.status_code == 400 and "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in answer.json()["error"]["message"]


def test_an_answer_that_breaks_off_ends_with_an_error(before_vllm, vllm):
    vllm.events = vllm.events[:1]
    frames = chat_stream(before_vllm, model="cluster-0")
    assert frames[1]["choices"][0]["delta"]["content"] == "a"
    assert frames[-1]["error"]["message"] == "vLLM broke off in the middle of an answer"
    vllm.events = [{"error": {"message": "out of memory"}}]
    answer = before_vllm.post("/v1/chat/completions", json=chat_body(model="cluster-0"))
    assert (answer.status_code, answer.json()["error"]["message"]) == (502, "vLLM: out of memory")


def test_what_is_loaded_later_is_not_taken_for_what_the_other_server_has(run_folder, vllm):
    with (
        started(f"elrea={run_folder}", upstream=f"vllm={vllm.url}") as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
    ):
        server.worker.put(lambda: server.catalogue.load("other", str(run_folder))).result()
        answer = client.post("/v1/chat/completions", json=chat_body(model="other:cluster-0"))
        assert answer.status_code == 400 and "does not have the expert 'cluster-0'" in answer.json()["error"]["message"]
        assert chat(client, model="elrea:cluster-0")["choices"][0]["message"]["content"] == "abc"
        assert chat(client, model="other:backbone")["choices"][0]["message"]["content"] == "abc"


def test_a_server_without_the_experts_or_with_another_model_is_refused_at_the_start(run_folder, vllm, monkeypatch):
    def refusal(upstream: str) -> str:
        with pytest.raises(CoterieError) as told, started(f"elrea={run_folder}", upstream=upstream):
            pass
        return str(told.value)

    assert "is neither llama.cpp=http://... nor vllm=http://..." in refusal("sglang=http://127.0.0.1:1")
    assert "does not answer" in refusal("vllm=http://127.0.0.1:1")
    assert "is no address" in refusal("vllm=127.0.0.1:1")
    assert "/lora-adapters does not answer" in refusal(f"llama.cpp={vllm.url}")
    monkeypatch.setattr(tiny, "make_tokenizer", lambda: lambda *_, **__: {"input_ids": [1, 2]})
    assert "has another model" in refusal(f"vllm={vllm.url}")
    vllm.app.router.routes[:] = [one for one in vllm.app.router.routes if getattr(one, "path", "") != "/v1/models"]
    vllm.app.get("/v1/models")(lambda: {"data": [{"id": "tiny"}, {"id": "cluster-0", "parent": "tiny"}]})
    assert "no adapter is called 'base'" in refusal(f"vllm={vllm.url}")
