"""What an admin's key may do: load, replace and remove adapters and whole mixtures while others are answered.

A request that has begun ends with the weights that it began with; the weights that are put in place are those of
requests that come after. The routes for adapters are vLLM's.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from coterie.artifacts import as_path
from coterie.errors import shortened
from coterie.experts.bank import load_adapter
from coterie.serve.errors import ApiError

routes = APIRouter()

ADAPTER, MIXTURE = "LoRA adapter", "mixture"


class Load(BaseModel):
    """What is to answer under a name, and from where it is read."""

    name: str
    path: str
    load_inplace: bool = False


class Unload(BaseModel):
    """What is to answer no longer."""

    name: str


class LoadAdapter(Load):
    """An adapter that is to answer by itself, in a folder of PEFT's form."""

    name: str = Field(alias="lora_name")
    path: str = Field(alias="lora_path")


class UnloadAdapter(Unload):
    """An adapter that is to answer no longer."""

    name: str = Field(alias="lora_name")


@routes.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadAdapter, request: Request) -> PlainTextResponse:
    """Let an adapter answer under a name; its files are read beside what is being answered."""
    catalogue = request.app.state.catalogue
    folder = opened(request, body.path, "lora_path")
    backbone = catalogue.base_of(folder)
    adapter = await asyncio.to_thread(load_adapter, folder, backbone.model)
    return await put_in_place(request, body, ADAPTER, lambda: catalogue.add(body.name, adapter, body.path, backbone))


@routes.post("/v1/load_mixture")
async def load_mixture(body: Load, request: Request) -> PlainTextResponse:
    """Let a mixture answer under a name; answers pause for as long as it is read."""
    folder = opened(request, body.path, "path")
    return await put_in_place(request, body, MIXTURE, lambda: request.app.state.catalogue.load(body.name, str(folder)))


@routes.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadAdapter, request: Request) -> PlainTextResponse:
    """Let nothing new be asked of an adapter that was loaded so."""
    return await remove(request, body, ADAPTER)


@routes.post("/v1/unload_mixture")
async def unload_mixture(body: Unload, request: Request) -> PlainTextResponse:
    """Let nothing new be asked of a mixture."""
    return await remove(request, body, MIXTURE)


def opened(request: Request, path: str, param: str) -> Path:
    """Return the folder that a path means, where something can be loaded at all.

    Raises:
        ApiError: where another server computes the answers, or there are several replicas, or as `allowed`.
    """
    server = alone(request)
    if server.upstream:
        raise ApiError("with --upstream another server has the weights; load them there and start this one again", 400)
    return allowed(server.settings.access.allow_folder, path, param)


def alone(request: Request) -> Any:  # noqa: ANN401 - the application's state
    """Return what the routes share, where one process serves it all: of replicas, one alone would hear of a change.

    Raises:
        ApiError: where there are several.
    """
    if request.app.state.settings.replication.ray:
        raise ApiError("with --ray every replica serves the same; start them again with what is to be served", 400)
    return request.app.state


async def put_in_place(request: Request, body: Load, kind: str, act: Callable[[], None]) -> PlainTextResponse:
    """Let something answer under its name from now on; one that something has already is taken only where it was said.

    Raises:
        ApiError: for such a name, as vLLM words it.
    """
    server = request.app.state

    def put() -> None:
        if not body.load_inplace and body.name in server.catalogue.loaded:
            words = f"{shortened(body.name, 80)!r} has already been loaded; say load_inplace to replace it"
            raise ApiError(words, 400, code="already_loaded")
        act()

    await server.worker.call(put)
    return PlainTextResponse(f"Success: {kind} {body.name!r} added successfully.")


async def remove(request: Request, body: Unload, kind: str) -> PlainTextResponse:
    """Let something answer no longer, and forget all that was measured of its models.

    Raises:
        ApiError: when there is none of this name.
    """
    server, name = alone(request), body.name

    def ids() -> set[str]:
        return {cell.id for cell in (*server.catalogue.listed, *server.catalogue.recruits)}

    def remove() -> set[str]:
        loaded = server.catalogue.loaded
        if name not in loaded or (loaded[name] is not None) != (kind == ADAPTER):
            raise ApiError(f"no {kind} is loaded as {shortened(name, 80)!r}", 404, code="model_not_found")
        before = ids()
        server.catalogue.remove(name)
        return before - ids()

    for model in await server.worker.call(remove):
        server.metrics.forget(model)
    return PlainTextResponse(f"Success: {kind} {name!r} removed successfully.")


def allowed(folders: list[str] | None, given: str, param: str) -> Path:
    """Return the folder that a path means, where it lies inside one of those that may be loaded from, links followed.

    A relative path is looked for inside each. What lies elsewhere is refused before it is looked at.

    Raises:
        ApiError: 403 for anywhere else, 404 where there is no folder.
    """
    if not folders:
        words = "this server loads nothing at run time; start it with --allow-folder FOLDER"
        raise ApiError(words, 403, param=param, code="loading_is_off")
    try:
        roots = [as_path(folder).resolve() for folder in folders]
        inside = [path for root in roots if (path := (root / given).resolve()).is_relative_to(root)]
        found = next((path for path in inside if path.is_dir()), None)
    except (OSError, ValueError):  # too long, or a byte that no path has
        inside, found = [], None
    if not inside:
        words = f"{param} is not inside a folder that this server loads from"
        raise ApiError(words, 403, param=param, code="path_not_allowed")
    if found is None:
        raise ApiError(f"{param}: there is no such folder", 404, param=param, code="path_not_found")
    return found
