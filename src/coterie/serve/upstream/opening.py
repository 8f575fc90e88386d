"""`--upstream KIND=URL`."""

from coterie.errors import CoterieError
from coterie.mixture import Mixture
from coterie.serve.upstream.base import Upstream
from coterie.serve.upstream.llama_cpp import LlamaCppUpstream
from coterie.serve.upstream.vllm import VllmUpstream
from coterie.serve.worker import Worker


def open_upstream(text: str | None, mixtures: list[Mixture], worker: Worker) -> Upstream | None:
    """Find the other server that computes a mixture's answers; None where this one does.

    Raises:
        CoterieError: for another form than KIND=URL, several mixtures, or a server that does not have its experts.
    """
    if text is None:
        return None
    kind, _, url = text.partition("=")
    if kind not in ("llama.cpp", "vllm") or not url:
        raise CoterieError(f"--upstream: {text!r} is neither llama.cpp=http://... nor vllm=http://...")
    if len(mixtures) != 1:
        raise CoterieError(f"--upstream computes one mixture, and {len(mixtures)} are served; serve one")
    return VllmUpstream(url, mixtures[0], worker) if kind == "vllm" else LlamaCppUpstream(url, mixtures[0])
