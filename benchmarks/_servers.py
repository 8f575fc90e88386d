"""Servers that `serve.py` compares with, each a process of its own that prints its address: `_servers.py KIND ...`.

`peft` is the loop that people write first: PEFT's mixed batch, an expert a row, the mean of the rows' logits deciding,
behind FastAPI, one request at a time. `llama.cpp` is its own server, with one adapter and a slot for every client.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn
from _harness import load
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from peft import PeftModel
from transformers import DynamicCache

from coterie.mixture.llama_cpp import LlamaCpp
from coterie.serve.lifetime import SAME


def peft_app(model_name: str, adapters: list[str]) -> FastAPI:
    """Answer text completions, streamed, token by token."""
    backbone = load(model_name)
    names = [f"e{number}" for number in range(len(adapters))]
    model = PeftModel.from_pretrained(backbone.model, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.eval()
    app, turn = FastAPI(), threading.Lock()

    @app.post("/v1/completions")
    def complete(body: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(written(body["prompt"], body["max_tokens"]), media_type="text/event-stream")

    def written(prompt: str, limit: int) -> Iterator[str]:
        inputs = torch.tensor([backbone.tokenizer(prompt)["input_ids"]] * len(names))
        cache = DynamicCache(config=backbone.model.config)
        with turn, torch.inference_mode():
            for _ in range(limit):
                found = model(
                    input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, adapter_names=names
                )
                token = int(found.logits[:, -1].float().mean(dim=0).argmax())
                yield frame(str(backbone.tokenizer.decode([token])), None)
                inputs = torch.full((len(names), 1), token)
        yield frame("", "length") + "data: [DONE]\n\n"

    return app


def frame(text: str, finish_reason: str | None) -> str:
    """Write a chunk as OpenAI does."""
    return f"data: {json.dumps({'choices': [{'text': text, 'finish_reason': finish_reason}]})}\n\n"


def serve_peft(model: str, *adapters: str) -> None:
    """Serve until the process is ended."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = peft_app(model, list(adapters))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", **SAME)).run([listening])


def serve_llama_cpp(gguf: str, adapter: str, slots: str, context: str) -> None:
    """Serve until the process is ended; every slot has so many tokens of context."""
    xllamacpp = LlamaCpp.library()
    parameters = xllamacpp.CommonParams()
    parameters.model.path = gguf
    parameters.n_parallel = int(slots)
    parameters.n_ctx = int(slots) * int(context)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    parameters.fit_params = False
    parameters.verbosity = -1
    own = xllamacpp.CommonAdapterLoraInfo()
    own.path, own.scale = adapter, 1.0
    parameters.lora_adapters = [own]
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()  # until the benchmark closes it
    os._exit(0)


if __name__ == "__main__":
    {"peft": serve_peft, "llama.cpp": serve_llama_cpp}[sys.argv[1]](*sys.argv[2:])
