"""The three places put together: a bank, a router and a combiner on one base model."""

from coterie.mixture.completion import Completion, Trace
from coterie.mixture.core import Mixture
from coterie.mixture.prompts import Prompt, as_examples

__all__ = ["Completion", "Mixture", "Prompt", "Trace", "as_examples"]
