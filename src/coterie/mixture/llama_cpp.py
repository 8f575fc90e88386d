"""Answers computed by llama.cpp: each request's own weights are the scales of its experts' adapters in every layer.

That is what the combiner `layers` computes, at llama.cpp's speed and with the base model's weights as its file has
them. Its server runs inside this process, on an address of this machine, and answers nobody without a key made for it.
"""

import json
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import torch

from coterie.artifacts import as_path
from coterie.backbone.aliases import ALIASES, alias_gguf
from coterie.backbone.gguf_files import check_gguf, write_gguf_adapter
from coterie.data.examples import Example
from coterie.engine.text import TextStream
from coterie.errors import CoterieError, missing_extra
from coterie.grading.lengths import longest_answer
from coterie.mixture.completion import Completion
from coterie.mixture.core import Mixture
from coterie.mixture.export import lora_list
from coterie.mixture.prompts import Prompt, as_examples
from coterie.mixture.told_logprobs import aligned_logprobs
from coterie.settings.commands import GenerateSettings
from coterie.settings.reading import changed, flag_of, from_flat
from coterie.settings.sampling import SamplingSettings

SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repeat_penalty",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
}
"""Settings that llama.cpp follows, by its own names for them."""
ORDER = ("penalties", "temperature", "top_k", "top_p", "min_p")  # the order of our own engine
LARGEST_SEED = 2**32 - 2  # the next number stands for a seed by chance
CONTEXT_STEP = 256  # tokens
STARTING = 600  # tenths of a second that llama.cpp may take to load
DEFAULT_BATCH = GenerateSettings.model_fields["batch_size"].default
COMBINERS = ("layers", "weights")  # the same mixture, where weights are a prompt's


class Piece(NamedTuple):
    """Some text of an answer that is being written."""

    text: str


class LlamaCpp:
    """A mixture that llama.cpp answers for; the mixture itself routes prompts and reads tokens.

    Use it in a `with`, at whose end llama.cpp and the adapters that were written for it are gone.
    """

    def __init__(self, mixture: Mixture, gguf: str | Path | None = None) -> None:
        """Check that llama.cpp can compute the mixture, and write its experts as GGUF into a temporary folder.

        Args:
            mixture: with combiner `layers` (or exact `weights`), and a router that weighs once a prompt.
            gguf: the base model as a GGUF file; by default the one that the base model itself was loaded from.

        Raises:
            CoterieError: when llama.cpp is not installed, cannot compute this, or the file is not of the base model.
        """
        self._library = self.library()
        _check_cell(mixture)
        self.mixture = mixture
        self._gguf = _file_of(mixture, gguf)
        self._longest = check_gguf(self._gguf, mixture.backbone)
        self._folder = tempfile.TemporaryDirectory(prefix="coterie-llamacpp-")
        self._adapters = [Path(self._folder.name) / f"{number}.gguf" for number in range(len(mixture.bank))]
        for file, adapter in zip(self._adapters, mixture.bank.adapters, strict=True):
            write_gguf_adapter(file, adapter, mixture.backbone.model)
        self._server: Any = None
        self._context = 0

    @staticmethod
    def library() -> Any:  # noqa: ANN401 - a module
        """Return llama.cpp as a Python module.

        Raises:
            CoterieError: when it is not installed.
        """
        try:
            import xllamacpp
        except ImportError as error:
            raise missing_extra("xllamacpp", "llamacpp") from error
        return xllamacpp

    def __enter__(self) -> "LlamaCpp":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop llama.cpp and delete the adapters that were written for it."""
        self._stop()
        self._folder.cleanup()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        batch_size: int = DEFAULT_BATCH,
        top_k_experts: int | None = None,
        progress: Callable[[int], object] | None = None,
        **sampling: Any,  # noqa: ANN401 - fields of SamplingSettings
    ) -> list[Completion]:
        """Answer prompts, one after the other; see `Mixture.generate`. Seeds draw other answers than there.

        Log-probabilities of tokens that end within a character, or belong to a stop string, are not a number: llama.cpp
        tells none.

        Raises:
            CoterieError: for an empty prompt, a text that the base model's file was not made for, or a setting that
                does not fit or that llama.cpp does not follow.
        """
        if batch_size != DEFAULT_BATCH:
            raise CoterieError("llama.cpp answers one prompt after the other here, so leave --batch-size out")
        settings = from_flat(SamplingSettings, sampling, ("n", "top_k_experts", "progress"))
        draws = self.mixture.combiner.draws(settings, n)
        requests = list(self._requests(as_examples(prompts), settings, top_k_experts))
        answers = []
        for request in requests:
            for own in draws:
                found = self._ask({**request.fields, **sampling_fields(own)})
                answers.append(self._completion(request, own.stop, found))
            if progress:
                progress(1)
        return answers

    def stream(
        self, prompt: Prompt | Sequence[Prompt], *, top_k_experts: int | None = None, **sampling: Any
    ) -> Iterator["Piece"]:  # noqa: ANN401
        """Answer one prompt, giving its text piece by piece, as llama.cpp itself decodes it.

        Raises:
            CoterieError: as `generate`, or for several prompts.
        """
        settings = from_flat(SamplingSettings, sampling, ("top_k_experts",))
        if len(examples := as_examples(prompt)) != 1:
            raise CoterieError(f"a stream answers one prompt, but {len(examples)} are given; use generate for several")
        (request,) = self._requests(examples, settings, top_k_experts)
        fields = {**request.fields, **sampling_fields(settings), "stream": True}
        with self._client.stream("POST", "/completion", json=fields) as response:
            _check_reply(response)
            for line in response.iter_lines():
                if line.startswith("data: "):
                    piece = json.loads(line.removeprefix("data: "))
                    if self._ends & set(piece["tokens"]):
                        return
                    yield Piece(piece["content"])

    def _requests(
        self, examples: Sequence[Example], settings: SamplingSettings, top_k_experts: int | None
    ) -> Iterator["_Request"]:
        """Yield what llama.cpp is asked for every prompt, sampling apart, after making room for the longest text."""
        check_sampling(settings)
        rows = self.mixture.tokens(examples)
        limits = [longest_answer(settings, example) for example in examples]
        self._make_room(max(len(row.ids) + limit for row, limit in zip(rows, limits, strict=True)))
        routing = self.mixture.router.route(rows)
        routing = routing if top_k_experts is None else routing.top(top_k_experts)
        shares, names = routing.normalized(), list(self.mixture.bank.names)
        for number, (example, row, limit) in enumerate(zip(examples, rows, limits, strict=True)):
            fields = {**text_fields(row.ids, limit), "lora": lora_list(routing.row(number), names), "n_probs": 1}
            yield _Request(example.instruction, fields, shares.row(number))

    def _completion(self, request: "_Request", stop: Sequence[str], found: Mapping[str, Any]) -> Completion:
        """Put an answer together from the tokens, with the tokenizer's own decoding of them."""
        tokenizer = self.mixture.tokenizer
        stream, text, ids = TextStream(tokenizer, stop, self._ends), "", []
        for token in found["tokens"]:
            ids.append(token)
            text += stream.push(token)
            if stream.stopped:
                break
        logprobs = aligned_logprobs(tokenizer, found["tokens"], found.get("completion_probabilities", []))
        return Completion(
            prompt=request.prompt,
            text=text + stream.finish(),
            token_ids=tuple(ids),
            logprobs=tuple(logprobs[: len(ids)]),
            finish_reason="length" if found["stop_type"] == "limit" and not stream.stopped else "stop",
            weights=request.weights,
        )

    @property
    def _ends(self) -> frozenset[int]:
        return self.mixture.backbone.stop_ids | self.mixture.prompts.end_ids

    def _ask(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        response = self._client.post("/completion", json=dict(fields))
        _check_reply(response)
        return response.json()

    def _make_room(self, tokens: int) -> None:
        """Start llama.cpp, or start it anew, with room for a text of so many tokens."""
        if tokens > self._longest:
            raise CoterieError(
                f"{self._gguf} was made for texts of up to {self._longest} tokens, and prompt and answer may take "
                f"{tokens}; lower --max-new-tokens"
            )
        if tokens <= self._context:
            return
        self._stop()
        self._context = min(-(-tokens // CONTEXT_STEP) * CONTEXT_STEP, self._longest)
        key = secrets.token_hex(16)
        try:
            self._server = self._library.Server(self._parameters(key))
        except RuntimeError as error:
            raise CoterieError(f"llama.cpp cannot load {self._gguf}; convert the base model to GGUF again") from error
        headers = {"Authorization": f"Bearer {key}"}
        self._client = httpx2.Client(
            base_url=self._server.listening_address, headers=headers, trust_env=False, timeout=None
        )
        for _ in range(STARTING):
            with suppress(httpx2.TransportError):  # an earlier one may still have the address, and hang up
                if self._client.get("/health").status_code == httpx2.codes.OK:
                    return
            time.sleep(0.1)
        raise CoterieError("llama.cpp does not start to answer; take --engine coterie")

    def _parameters(self, key: str) -> Any:  # noqa: ANN401 - llama.cpp's own kind
        """Return llama.cpp's parameters: exact attention, one text at a time, nothing kept from one to the next."""
        library, parameters = self._library, self._library.CommonParams()
        parameters.model.path = str(self._gguf)
        parameters.n_ctx = self._context
        blocks, experts = len(self.mixture.backbone.blocks), len(self._adapters)
        most = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        parameters.cpuparams.n_threads = threads_that_pay(self._gguf.stat().st_size, blocks, experts, most)
        parameters.cache_type_k = parameters.cache_type_v = library.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_ram_mib = 0
        parameters.fit_params = parameters.warmup = False
        parameters.verbosity = -1
        parameters.api_keys = [key]
        adapters = []
        for file in self._adapters:
            adapter = library.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(file), 0.0
            adapters.append(adapter)
        parameters.lora_adapters, parameters.lora_init_without_apply = adapters, True
        return parameters

    def _stop(self) -> None:
        if self._server is not None:
            self._client.close()
            self._server, self._context = None, 0


READ_ALONE = 11e9  # bytes of weights that one thread gets through in a second
OPERATIONS, OPERATIONS_OF_EXPERT = 28, 40  # of a block at every token
WAITING = 8e-6  # seconds that threads sleep behind an operation


def threads_that_pay(weights: int, blocks: int, experts: int, most: int) -> int:
    """Say on how many threads llama.cpp writes fastest: all, or one.

    It waits by OpenMP, as torch does. Where both have threads there are more than cores, and then they sleep behind
    every operation instead of spinning. That is dearer than what a second thread gains on a small model with experts:
    SmolLM2-135M with six takes 63 ms a token on two threads, and 16 on one.

    Args:
        weights: bytes of the base model's file.
        blocks: of the model.
        experts: adapters that may be mixed.
        most: threads that there are.
    """
    gained = weights / READ_ALONE * (1 - 1 / most)
    return most if gained > blocks * (OPERATIONS + OPERATIONS_OF_EXPERT * experts) * WAITING else 1


@dataclass(frozen=True)
class _Request:
    """A prompt as llama.cpp gets it."""

    prompt: str
    fields: dict[str, Any]
    weights: dict[str, float]


def _check_cell(mixture: Mixture) -> None:
    """Refuse a mixture that scaled adapters cannot compute, with what to take instead."""
    if mixture.combiner.kind not in COMBINERS:
        raise CoterieError(
            f"llama.cpp mixes experts in the layers, and the combiner is {mixture.combiner.kind!r}; "
            "add --combiner layers, or take --engine coterie"
        )
    if mixture.router.grain == "layer":
        raise CoterieError(
            f"router {mixture.router.kind!r} weighs experts anew at every layer's input, which llama.cpp does not; "
            "take another --router, or --engine coterie"
        )
    if mixture.reroutes:
        raise CoterieError(
            "the mixture re-routes while it answers, which llama.cpp does not; add --every inf, "
            "or take --engine coterie"
        )


def _file_of(mixture: Mixture, given: str | Path | None) -> Path:
    """Return the base model's GGUF file: the one that was given, or that the base model comes from."""
    if given is not None:
        file = as_path(given)
        if not file.is_file():
            raise CoterieError(f"there is no file {file}; give the base model as a GGUF file as --gguf")
        return file
    name = mixture.backbone.identity.id
    if name in ALIASES:
        return alias_gguf(name)
    if name.endswith(".gguf"):
        return as_path(name)
    raise CoterieError(
        f"the base model {name} is no GGUF file; give one as --gguf, which this writes: "
        "coterie export ... --for llama.cpp --base-type q8_0"
    )


def check_sampling(settings: SamplingSettings) -> None:
    """Refuse settings that llama.cpp would not follow."""
    for name in type(settings).model_fields:
        if name not in (*SAMPLING, "logit_bias", "max_new_tokens") and flag_of(name) in changed(settings):
            raise CoterieError(f"llama.cpp does not follow {flag_of(name)} as it is meant here; leave it out")
    if settings.seed > LARGEST_SEED:
        raise CoterieError(f"llama.cpp takes seeds up to {LARGEST_SEED}, got --seed {settings.seed}")


def text_fields(prompt: Sequence[int], limit: int) -> dict[str, Any]:
    """Return what asks llama.cpp for a text of at most so many tokens behind a prompt."""
    return {
        "prompt": list(prompt),
        "n_predict": limit,
        "cache_prompt": False,  # llama.cpp may take what was read under other adapters for the same
        "repeat_last_n": len(prompt) + limit,  # the whole text
        "return_tokens": True,
    }


def sampling_fields(settings: SamplingSettings) -> dict[str, Any]:
    """Return how llama.cpp chooses tokens: by the same steps in the same order."""
    values = {theirs: getattr(settings, ours) for ours, theirs in SAMPLING.items()}
    biases = [[token, bias] for token, bias in settings.biases().items()]
    return {**values, "samplers": list(ORDER), "logit_bias": biases}


def _check_reply(response: Any) -> None:  # noqa: ANN401 - of httpx2
    if response.status_code != httpx2.codes.OK:
        response.read()
        raise CoterieError(f"llama.cpp refuses the request: {response.text[:300]}; take --engine coterie")
