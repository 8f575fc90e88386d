"""The three places put together: a bank, a router and a combiner on one base model."""

from coterie.mixture.core import Completion, Mixture, Prompt, as_example
from coterie.mixture.loading import RouterParts, load_router, read_mixture_record

__all__ = ["Completion", "Mixture", "Prompt", "RouterParts", "as_example", "load_router", "read_mixture_record"]
