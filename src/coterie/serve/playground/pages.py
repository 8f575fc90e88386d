"""The playground's files, which ask nobody but the server that they came from, and need no key."""

from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter, Response

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
"""No script, style, picture or call from elsewhere, no script made of text, and no page around this one."""
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PARTS = {file.name: file for file in files("coterie.serve.playground").iterdir() if PurePath(file.name).suffix in KINDS}

routes = APIRouter(include_in_schema=False)


@routes.get("/")
def page() -> Response:
    """Return the page."""
    return part("index.html")


@routes.get("/playground/{name}")
def part(name: str) -> Response:
    """Return the page, a script of it, or its style."""
    if name not in PARTS:
        return Response("the playground has no such part", 404, media_type="text/plain")
    return Response(PARTS[name].read_text("utf-8"), media_type=KINDS[PurePath(name).suffix], headers=HEADERS)
