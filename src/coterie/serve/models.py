"""What is served, and what prompts are to it: its models, embeddings, tokens, and routing without an answer."""

import base64
import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Request
from jaxtyping import Float
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from coterie.combiners.table import fitting
from coterie.data.batching import TokenRow, check_lengths
from coterie.data.examples import Example
from coterie.errors import CoterieError
from coterie.mixture import as_examples
from coterie.routers.base import Routing
from coterie.routers.fixed import FixedRouter
from coterie.serve.answering import check_size, read_rows, route_rows, texts_of
from coterie.serve.asking import mixed
from coterie.serve.catalogue import Cell
from coterie.serve.completions import as_it_stands
from coterie.serve.errors import ApiError
from coterie.serve.frames import Json
from coterie.serve.recruits import RecruitCell
from coterie.serve.schemas import (
    MOST_PROMPTS,
    Body,
    CoterieField,
    Messages,
    Prompts,
    Text,
    TokenId,
    conversation,
    one_or_more,
    wrong,
)

logger = logging.getLogger(__name__)

routes = APIRouter()


@routes.get("/v1/models")
async def models(request: Request) -> Json:
    """List all that can be asked, base models first."""
    server = request.app.state
    cells = server.catalogue.listed
    data = await server.worker.call(lambda: [entry for cell in cells if (entry := described_or_none(cell))])
    return {"object": "list", "data": data + [described_run(cell) for cell in server.catalogue.recruits]}


def described_or_none(cell: Cell) -> Json | None:
    """Return what is told of a model; of one that cannot be made nothing but a line in the log."""
    try:
        return described(cell)
    except CoterieError as error:
        logger.warning("%s is not listed: %s", cell.id, error)
        return None


@routes.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Json:
    """Describe one of them."""
    server = request.app.state
    cell = server.catalogue.find(name)
    if isinstance(cell, RecruitCell):
        return described_run(cell)
    return await server.worker.call(lambda: described(cell))


def described_run(cell: RecruitCell) -> Json:
    """Return what is told of a run that recruits experts."""
    names = {"id": cell.id, "object": "model", "created": cell.desk.loaded, "owned_by": "coterie"}
    experts = cell.desk.fitted.pool.names
    kind = "mixture" if cell.id == cell.desk.name else "expert" if cell.root in experts else "method"
    how = {"kind": kind, "experts": experts, "router": "skills", "combiner": "texts", "combiners": ["texts"]}
    origin = {"root": cell.root, "parent": None, "max_model_len": None}
    return names | origin | {"coterie": how | {"reroutes": False}}


def described(cell: Cell) -> Json:
    """Return what is told of a model, in OpenAI's form with vLLM's fields, and how it mixes its experts."""
    mixture, desk = cell.mixture, cell.desk
    names = {"id": cell.id, "object": "model", "created": desk.loaded, "owned_by": "coterie"}
    origin = {"root": cell.root, "parent": cell.parent, "max_model_len": mixture.backbone.context}
    kinds = {None: "base", desk.name: "mixture"}
    kind = kinds.get(cell.parent and cell.root, "expert" if desk.path or cell.root in desk.experts else "method")
    router, combiner = mixture.router, mixture.combiner
    how = {
        "kind": kind,
        "experts": mixture.bank.names,
        "router": router.kind,
        "combiner": combiner.kind,
        "combiners": fitting(router),
        "reroutes": mixture.reroutes,
    }
    return names | origin | {"coterie": how | ({"method": cell.root} if kind == "method" else {})}


@routes.get("/lora-adapters")
async def lora_adapters(request: Request, model: str | None = None) -> list[Json]:
    """List the experts that `lora` of a request means by number, as llama.cpp does; of the first mixture by default.

    `scale` is the weight that an expert has where a request says nothing; None where its prompt decides.
    """
    catalogue = request.app.state.catalogue
    names = [desk.name for desk in catalogue.desks if not desk.path]
    if model is None and not names:
        return []
    cell: Cell = catalogue.resolve(names[0] if model is None else model)
    router = (await request.app.state.worker.call(lambda: cell.mixture)).router
    scales = dict.fromkeys(cell.desk.experts) if not isinstance(router, FixedRouter) else router.weights
    return [{"id": n, "path": name, "scale": scales.get(name, 0.0)} for n, name in enumerate(cell.desk.experts)]


class EmbeddingRequest(Body):
    """What `/v1/embeddings` takes."""

    model: Annotated[Text, Field(min_length=1)]
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


@routes.post("/v1/embeddings")
async def embeddings(body: EmbeddingRequest, request: Request) -> Json:
    """Return what the model's router reads off prompts: the embedding or the gradient that it weighs experts by."""
    cell = request.app.state.catalogue.resolve(body.model)

    def read(rows: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        return cell.mixture.router.of_prompts.features(rows).cpu().float()

    rows = await checked_rows(request, cell, body.input, "input")
    vectors = torch.cat(await route_rows(request, rows, read))
    if body.dimensions not in (None, vectors.shape[1]):
        raise ApiError(f"the embeddings have {vectors.shape[1]} dimensions, got {body.dimensions}", param="dimensions")
    as_text = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": encoded(vector) if as_text else vector.tolist()}
        for index, vector in enumerate(vectors)
    ]
    count = sum(len(row.ids) for row in rows)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "model": body.model, "data": data, "usage": usage}


def encoded(vector: Float[Tensor, " dimension"]) -> str:
    """Write a vector as the base64 of its little-endian numbers of four bytes, as OpenAI's clients ask for it."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


class RouteRequest(Body):
    """What `/v1/route` takes: prompts, or a conversation, whose weights are asked for without an answer."""

    model: Annotated[Text, Field(min_length=1)]
    prompt: (
        Annotated[
            list[Annotated[Text, Field(min_length=1)]],
            BeforeValidator(one_or_more, json_schema_input_type=str | list[str]),
            Field(min_length=1, max_length=MOST_PROMPTS),
        ]
        | None
    ) = None
    messages: Messages | None = None
    coterie: CoterieField = CoterieField()

    @model_validator(mode="after")
    def _one_text(self) -> "RouteRequest":
        if (self.prompt is None) == (self.messages is None):
            raise wrong("prompt", "give a prompt, or messages, and not both")
        return self


@routes.post("/v1/route")
async def route(body: RouteRequest, request: Request) -> Json:
    """Weigh the experts for prompts, or a conversation, without an answer."""
    cell = request.app.state.catalogue.resolve(body.model)

    def weigh(rows: Sequence[TokenRow]) -> Routing:
        return mixed(cell, body.coterie).router.route(rows).normalized()

    prompts = body.prompt or [] if body.messages is None else [conversation(body.messages)]
    rows = await checked_rows(request, cell, prompts, "prompt")
    data = []
    for routing in await route_rows(request, rows, weigh):
        for number in range(len(routing.weights)):
            similarities = {name: float(values[number]) for name, values in routing.similarities.items()}
            told = {"weights": routing.row(number), "similarities": similarities}
            data.append({"object": "routing", "index": len(data)} | told)
    return {"object": "list", "model": body.model, "data": data}


async def checked_rows(
    request: Request, cell: Cell, prompts: Sequence[str | list[int] | Example], name: str
) -> list[TokenRow]:
    """Take texts for questions of a user, and tokens as they stand.

    Raises:
        CoterieError: for one that is empty or too long, by its number.
    """

    def read(prompt: str | list[int] | Example) -> list[TokenRow]:
        if isinstance(prompt, list):
            return [as_it_stands(cell, prompt)]
        return [cell.mixture.prompts.row(example).prompt() for example in as_examples(prompt)]

    rows = await read_rows(request, cell, prompts, read)
    check_lengths(rows, cell.mixture.backbone.positions, [f"{name} {number}" for number in range(len(rows))])
    return rows


# ------------------------------------------------------------------------------------------------ tokens


def asked_or_first(request: Request, name: str | None) -> Cell:
    """Return a model, or the first of all where none is named, as lm-evaluation-harness names none.

    Raises:
        ApiError: where only recruited experts answer, of whose tokens nothing is known.
    """
    catalogue = request.app.state.catalogue
    if name is None and not catalogue.listed:
        raise ApiError("no model that is served here has tokens that are known", 404, code="model_not_found")
    return catalogue.listed[0] if name is None else catalogue.resolve(name)


class TokenizeRequest(Body):
    """What `/tokenize` takes: a text, or a conversation as its chat template writes it."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_text(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise wrong("prompt", "give a prompt, or messages, and not both")
        return self


@routes.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Json:
    """Cut a text into tokens as `/v1/completions` does, or a conversation as `/v1/chat/completions` does."""
    cell = asked_or_first(request, body.model)

    def read() -> Json:
        backbone = cell.mixture.backbone
        for text in texts_of(body.prompt if body.messages is None else conversation(body.messages)):
            check_size(cell, text)
        if body.messages is not None:
            ids = list(cell.mixture.prompts.row(conversation(body.messages)).prompt().ids)
        else:
            ids = backbone.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"]
        strings = backbone.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": backbone.context, "tokens": ids, "token_strs": strings}

    return await request.app.state.worker.call(read)


class DetokenizeRequest(Body):
    """What `/detokenize` takes."""

    model: Text | None = None
    tokens: list[TokenId]


@routes.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Json:
    """Return the text of tokens, control tokens by their names."""
    tokenizer = asked_or_first(request, body.model).desk.grid.own.tokenizer
    return {"prompt": await request.app.state.worker.call(lambda: tokenizer.decode(body.tokens))}


@routes.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> Json:
    """Return what clients need that apply the chat template themselves."""
    tokenizer: Any = asked_or_first(request, model).desk.grid.own.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length", "padding_side")
    return {"tokenizer_class": type(tokenizer).__name__} | {name: getattr(tokenizer, name) for name in names}
