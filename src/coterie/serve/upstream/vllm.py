"""vLLM's server: it runs one adapter a request, an expert that it knows by name, or a static mixture of several.

A static mixture is written and loaded there when it is asked first. So that prompts share them, weights are rounded to
steps of a twentieth, and what is told of a routing is the rounded weights.
"""

import asyncio
import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2

from coterie.engine.request import Request, Token
from coterie.errors import CoterieError, unknown_name
from coterie.experts.names import BACKBONE
from coterie.experts.plain_adapter import rank_of, vllm_rank, write_plain_adapter
from coterie.mixture import Mixture
from coterie.routers.base import Routing
from coterie.serve.asking import Asked
from coterie.serve.errors import ApiError
from coterie.serve.upstream.base import TRIAL, UNTOLD, Upstream, check
from coterie.serve.worker import Worker
from coterie.settings.sampling import SamplingSettings

STEPS = 20  # of a weight from 0 to 1
MOST = 64  # static mixtures that are loaded there at once, unless more of them are being asked


@dataclass
class Loaded:
    """A static mixture that is loaded there, with the number of answers that run it."""

    name: str
    users: int = 0


class VllmUpstream(Upstream):
    """vLLM's server, started with the experts as `--lora-modules`."""

    name = "vLLM"

    def __init__(self, url: str, mixture: Mixture, worker: Worker) -> None:
        """Look whether the server has this base model and these experts.

        Raises:
            CoterieError: when it does not answer, or has others.
        """
        super().__init__(url, mixture)
        self._worker = worker
        self._folder = Path(tempfile.mkdtemp(prefix="coterie-vllm-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._run = secrets.token_hex(4)  # what an earlier run has loaded there has other names
        self._loaded: dict[tuple[tuple[str, float], ...], Loaded] = {}
        self._loading = asyncio.Lock()
        self._count = 0

    def connect(self, http: httpx2.Client) -> None:
        """Learn the base model's name; experts have their own."""
        listed = self._asked(http, "/v1/models")["data"]
        known = [one["id"] for one in listed]
        self._base = next((one["id"] for one in listed if not one.get("parent")), "")
        for name in self.mixture.bank.names:
            if name != BACKBONE and name not in known:
                raise CoterieError(
                    f"--upstream: {unknown_name('adapter', name, known)}; write them by coterie export --for vllm, and "
                    f"start vLLM with --lora-modules {name}=..."
                )
        body = {"model": self._base, "prompt": TRIAL, "add_special_tokens": False}
        self._check_tokens(self._asked(http, "/tokenize", body)["tokens"])

    def accept(self, asked: Asked) -> Asked:
        """Return requests with the weights that are computed: 1 for one expert, or steps of a twentieth."""
        asked = super().accept(asked)
        return replace(asked, requests=[replace(one, routing=rounded(one.routing)) for one in asked.requests])

    def _body(self, request: Request, sampling: SamplingSettings) -> dict[str, Any]:
        same = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop")
        return {name: getattr(sampling, name) for name in same} | {
            "prompt": list(request.prompt.ids),
            "max_tokens": request.limit,
            "top_k": sampling.top_k or -1,
            "seed": sampling.seed,
            "logit_bias": {str(token): bias for token, bias in sampling.biases().items()},
            "stop_token_ids": self.ends,
            "logprobs": sampling.top_logprobs,
            "return_tokens_as_token_ids": True,
            "stream": True,
        }

    @asynccontextmanager
    async def _running(
        self, http: httpx2.AsyncClient, weights: Mapping[str, float]
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        if not weights or list(weights.values()) == [1.0]:
            yield "/v1/completions", {"model": next(iter(weights), self._base)}
            return
        async with self._loading:
            mixture = await self._load(http, tuple(weights.items()))
            mixture.users += 1
        try:
            yield "/v1/completions", {"model": mixture.name}
        finally:
            mixture.users -= 1

    async def _load(self, http: httpx2.AsyncClient, weights: tuple[tuple[str, float], ...]) -> Loaded:
        """Return a static mixture, which is loaded there if it was not.

        Raises:
            ApiError: when vLLM loads none.
        """
        if (known := self._loaded.pop(weights, None)) is None:
            for key in [key for key, own in self._loaded.items() if not own.users][: len(self._loaded) + 1 - MOST]:
                await self._unload(http, self._loaded.pop(key).name)
            self._count += 1
            known = Loaded(f"coterie-{self._run}-{self._count}")
            folder = self._folder / known.name
            await self._worker.call(lambda: self._write(folder, dict(weights)))
            response = await http.post(
                "/v1/load_lora_adapter", json={"lora_name": known.name, "lora_path": str(folder)}
            )
            if response.status_code == httpx2.codes.NOT_FOUND:
                raise ApiError(
                    "vLLM loads no static mixture of these experts: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, "
                    "or ask for one expert by its own id",
                    param="model",
                )
            await check(response, self.name)
        self._loaded[weights] = known  # behind those that were not asked since
        return known

    async def _unload(self, http: httpx2.AsyncClient, name: str) -> None:
        await http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def _write(self, folder: Path, weights: Mapping[str, float]) -> None:
        """Write the exact static mixture as one adapter."""
        mixture = self.mixture
        model = mixture.backbone.model
        merged = mixture.layers.merged(tuple(weights.get(name, 0.0) for name in mixture.bank.names))
        vllm_rank(rank_of(merged), model.config.get_text_config().model_type)
        write_plain_adapter(folder, merged, model, self._base)

    def _tokens(self, event: Mapping[str, Any], request: Request) -> list[Token]:
        if not event["choices"]:
            return []
        choice = event["choices"][0]
        logs, reason = choice.get("logprobs") or {"tokens": []}, choice["finish_reason"]
        tokens = []
        for place, name in enumerate(logs["tokens"]):
            told = (logs.get("top_logprobs") or {}) and logs["top_logprobs"][place] or {}
            top = tuple((token_id(one), value) for one, value in told.items())
            tokens.append(Token(0, token_id(name), logs["token_logprobs"][place], "", None, top=top))
        if reason not in (None, "stop", "length"):
            raise ApiError(f"vLLM has ended an answer: {reason}", 502, code="upstream_failed")
        if not tokens and (choice["text"] or reason):
            tokens = [Token(0, self.ends[0], UNTOLD, "", None)]
        return [*tokens[:-1], *(one._replace(text=choice["text"], finish_reason=reason) for one in tokens[-1:])]


def token_id(name: str) -> int:
    """Read a token as `return_tokens_as_token_ids` has it named.

    Raises:
        ApiError: when it has another name, so that this is a vLLM too old to be told apart.
    """
    if found := re.fullmatch(r"token_id:(\d+)", name):
        return int(found[1])
    raise ApiError("vLLM does not tell tokens by their ids; take a newer one", 502, code="upstream_failed")


def rounded(routing: Any) -> Routing:  # noqa: ANN401 - accepted
    """Return a prompt's weights in steps of a twentieth, of which one at least is above 0."""
    steps = (routing.weights * STEPS).round()
    if not steps.any():
        steps[0, routing.weights[0].argmax()] = 1
    return replace(routing, weights=steps / STEPS)
