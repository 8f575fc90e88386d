"""llama.cpp's server: it adds its adapters up by the scales that a request brings, which is the combiner `layers`.

It tells no token that ends within a character, so those are not among the tokens of an answer; its text is whole.
"""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from coterie.engine.request import Request, Token
from coterie.errors import CoterieError
from coterie.experts.names import BACKBONE
from coterie.mixture.llama_cpp import LARGEST_SEED, check_sampling, sampling_fields, text_fields
from coterie.serve.upstream.base import TRIAL, UNTOLD, Upstream
from coterie.settings.sampling import SamplingSettings


class LlamaCppUpstream(Upstream):
    """llama.cpp's server, started with the experts as `--lora`."""

    name = "llama.cpp"

    def connect(self, http: httpx2.Client) -> None:
        """Learn the experts' numbers, by the names of their files."""
        listed = self._asked(http, "/lora-adapters")
        self._numbers = {re.split(r"[/\\]", str(one["path"]))[-1].removesuffix(".gguf"): one["id"] for one in listed}
        for name in self.mixture.bank.names:
            if name != BACKBONE and name not in self._numbers:
                raise CoterieError(
                    f"--upstream: llama.cpp at {self.url} has no adapter {name}.gguf; write them by coterie export "
                    "--for llama.cpp, and start it with --lora-init-without-apply and --lora for each"
                )
        self._check_tokens(self._asked(http, "/tokenize", {"content": TRIAL, "add_special": False})["tokens"])

    def _body(self, request: Request, sampling: SamplingSettings) -> dict[str, Any]:
        own = sampling.model_copy(update={"seed": sampling.seed % (LARGEST_SEED + 1), "top_logprobs": 0})
        check_sampling(own)
        told = {"n_probs": max(1, sampling.top_logprobs), "stream": True}
        return sampling_fields(own) | text_fields(request.prompt.ids, request.limit) | told

    @asynccontextmanager
    async def _running(
        self, http: httpx2.AsyncClient, weights: Mapping[str, float]
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        scales = [{"id": self._numbers[name], "scale": weight} for name, weight in weights.items()]
        yield "/completion", {"lora": scales}

    def _tokens(self, event: Mapping[str, Any], request: Request) -> list[Token]:
        if event["stop"]:
            reason = "length" if event["stop_type"] == "limit" else "stop"
            return [Token(0, self.ends[0], UNTOLD, event["content"], reason)]
        told = (event.get("completion_probabilities") or [{"logprob": UNTOLD}])[-1]
        top = tuple((one["id"], one["logprob"]) for one in told.get("top_logprobs", ()))
        reason = "length" if event["tokens_predicted"] >= request.limit else None  # some tokens are not told
        own = event["tokens"][-1]
        return [Token(0, own, told["logprob"], "" if own in self.ends else event["content"], reason, top=top)]
