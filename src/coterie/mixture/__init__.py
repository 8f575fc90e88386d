"""The three places put together: a bank, a router and a combiner on one base model."""

from coterie.mixture.completion import Completion, Trace
from coterie.mixture.core import Mixture, Prompt, as_example

__all__ = ["Completion", "Mixture", "Prompt", "Trace", "as_example"]
