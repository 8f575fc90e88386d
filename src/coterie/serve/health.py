"""What machines ask: whether the server lives, whether it may be asked, and what it has measured."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

routes = APIRouter()


@routes.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """Answer 200 as long as what is asked can be answered one day: a dead server is to be started again."""
    is_alive = request.app.state.worker.is_alive
    return JSONResponse({"status": "alive" if is_alive else "dead"}, 200 if is_alive else 503)


@routes.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """Return all that is measured, in the form that Prometheus reads."""
    page, kind = request.app.state.metrics.page(request.headers.get("accept", ""))
    return Response(page, headers={"Content-Type": kind})
