"""What an admin's key may do: load, replace and remove adapters and whole mixtures while others are answered.

A request that has begun ends with the weights that it began with; the weights that are put in place are those of
requests that come after. The routes for adapters are vLLM's.
"""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from coterie.artifacts import as_path
from coterie.errors import shortened
from coterie.experts.bank import load_adapter
from coterie.serve.errors import ApiError

routes = APIRouter()


class LoadAdapter(BaseModel):
    """An adapter that is to answer by itself, in a folder of PEFT's form."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapter(BaseModel):
    """An adapter that is to answer no longer."""

    lora_name: str


class LoadMixture(BaseModel):
    """A mixture, in a folder of its own."""

    name: str
    path: str
    load_inplace: bool = False


class UnloadMixture(BaseModel):
    """A mixture that is to answer no longer."""

    name: str


@routes.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadAdapter, request: Request) -> PlainTextResponse:
    """Let an adapter answer under a name; its files are read beside what is being answered."""
    server = opened(request)
    folder = allowed(server.settings.access.allow_folder, body.lora_path, "lora_path")
    backbone = server.catalogue.base_of(folder)
    adapter = await asyncio.to_thread(load_adapter, folder, backbone.model)

    def put_in_place() -> None:
        check_new(server, body.lora_name, in_place=body.load_inplace)
        server.catalogue.add(body.lora_name, adapter, body.lora_path, backbone)

    await server.worker.call(put_in_place)
    return PlainTextResponse(f"Success: LoRA adapter {body.lora_name!r} added successfully.")


@routes.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadAdapter, request: Request) -> PlainTextResponse:
    """Let nothing new be asked of an adapter that was loaded so."""
    await remove(request, body.lora_name, is_adapter=True)
    return PlainTextResponse(f"Success: LoRA adapter {body.lora_name!r} removed successfully.")


@routes.post("/v1/load_mixture")
async def load_mixture(body: LoadMixture, request: Request) -> PlainTextResponse:
    """Let a mixture answer under a name; answers pause for as long as it is read."""
    server = opened(request)
    folder = allowed(server.settings.access.allow_folder, body.path, "path")

    def put_in_place() -> None:
        check_new(server, body.name, in_place=body.load_inplace)
        server.catalogue.load(body.name, str(folder))

    await server.worker.call(put_in_place)
    return PlainTextResponse(f"Success: mixture {body.name!r} added successfully.")


@routes.post("/v1/unload_mixture")
async def unload_mixture(body: UnloadMixture, request: Request) -> PlainTextResponse:
    """Let nothing new be asked of a mixture."""
    await remove(request, body.name, is_adapter=False)
    return PlainTextResponse(f"Success: mixture {body.name!r} removed successfully.")


def opened(request: Request) -> Any:  # noqa: ANN401 - the application's state
    """Return what the routes share, where something can be loaded at all.

    Raises:
        ApiError: where another server computes the answers.
    """
    server = request.app.state
    if server.upstream:
        raise ApiError("with --upstream another server has the weights; load them there and start this one again", 400)
    return server


def check_new(server: Any, name: str, *, in_place: bool) -> None:  # noqa: ANN401
    """Refuse a name that something is loaded under, unless it is to be replaced.

    Raises:
        ApiError: as vLLM words it.
    """
    if not in_place and name in server.catalogue.loaded:
        words = f"{shortened(name, 80)!r} has already been loaded; say load_inplace to replace it"
        raise ApiError(words, 400, code="already_loaded")


async def remove(request: Request, name: str, *, is_adapter: bool) -> None:
    """Remove an adapter or a mixture, with all that was measured of its models.

    Raises:
        ApiError: when there is none of this name.
    """
    server = request.app.state

    def remove() -> set[str]:
        loaded = server.catalogue.loaded
        if name not in loaded or (loaded[name] is not None) != is_adapter:
            kind = "adapter" if is_adapter else "mixture"
            raise ApiError(f"no {kind} is loaded as {shortened(name, 80)!r}", 404, code="model_not_found")
        before = {cell.id for cell in server.catalogue.listed}
        server.catalogue.remove(name)
        return before - {cell.id for cell in server.catalogue.listed}

    for model in await server.worker.call(remove):
        server.metrics.forget(model)


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
