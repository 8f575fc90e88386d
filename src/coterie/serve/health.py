"""What machines ask: whether the server lives, whether it may be asked, and what it has measured."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

routes = APIRouter()


@routes.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """Answer 200 as long as what is asked can be answered one day: a dead server is to be started again."""
    is_alive = request.app.state.worker.is_alive
    return JSONResponse({"status": "alive" if is_alive else "dead"}, 200 if is_alive else 503)


@routes.get("/ready", response_model=None)
async def ready(request: Request) -> Response:
    """Answer 200 while requests are taken: all that is served has been loaded, and the server is not told to stop."""
    server = request.app.state
    state = server.lifetime.state if server.worker.is_alive else "dead"
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@routes.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """Return all that is measured, in the form that Prometheus reads."""
    page, kind = await request.app.state.told(request.headers.get("accept", ""))
    return Response(page, headers={"Content-Type": kind})
