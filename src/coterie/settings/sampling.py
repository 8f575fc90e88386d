"""How tokens are chosen: what the engine and every client of it understand by sampling."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from coterie.settings.reading import Settings

MOST_TOP_LOGPROBS = 20
"""As many as OpenAI's servers show."""


def _as_list(given: Any) -> Any:  # noqa: ANN401 - whatever a user gives
    """Write a mapping of token ids to biases, as servers take it, as the flag's list."""
    return [f"{token}={bias}" for token, bias in given.items()] if isinstance(given, Mapping) else given


def _check_biases(given: list[str]) -> list[str]:
    for text in given:
        token, _, bias = text.partition("=")
        if not re.fullmatch(r"\d{1,9}", token, re.ASCII) or not re.fullmatch(r"[+-]?\d+(\.\d*)?|[+-]?\.\d+", bias):
            raise ValueError("give a token id and what is added to its logit, such as 1734=-100")
        if abs(float(bias)) > 100:
            raise ValueError(f"the bias of token {token} lies between -100 and 100")
    if len({text.partition("=")[0].lstrip("0") for text in given}) < len(given):
        raise ValueError("a token has one bias; give each id once")
    return given


def _check_proposer(given: str) -> str:
    if not re.fullmatch(r"off|lookup|base|merged|blocks:[1-9]\d{0,3}", given, re.ASCII):
        raise ValueError("give off, lookup, base, merged or blocks:K, such as blocks:8")
    return given


class SamplingSettings(Settings):
    """Sampling of tokens."""

    max_new_tokens: int | None = Field(None, ge=1, description="longest answer in tokens; default: the task's")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0: greedy; above: sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the smallest set of tokens with this probability mass")
    top_k: int = Field(0, ge=0, description="keep only the K likeliest tokens; 0: all")
    min_p: float = Field(
        0.0, ge=0, le=1, description="keep only tokens at least this many times as likely as the likeliest; 0: all"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="above 1: tokens that stand in the text become less likely"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="taken off the logits of tokens that stand in the answer"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="taken off the logits of tokens for each time that they stand in the answer"
    )
    logit_bias: Annotated[list[str], BeforeValidator(_as_list), AfterValidator(_check_biases)] = Field(
        [], description="added to the logit of a token: ID=BIAS, from -100 to 100; may be repeated"
    )
    stop: list[str] = Field([], description="stop before this text; may be repeated")
    seed: int = Field(0, ge=0, description="seed of sampling, for every prompt on its own")
    top_logprobs: int = Field(
        0, ge=0, le=MOST_TOP_LOGPROBS, description="likeliest tokens that are shown beside each one of an answer"
    )

    speculate: Annotated[str, AfterValidator(_check_proposer)] = Field(
        "off",
        description="propose tokens where verifying them pays; answers stay the same. lookup: what followed the same "
        "tokens before; base: the base adapter's; merged: those of all experts in one; blocks:K: of its first K blocks",
    )

    def biases(self) -> dict[int, float]:
        """Return what is added to the logits, by token id."""
        pairs = (text.partition("=") for text in self.logit_bias)
        return {int(token): float(bias) for token, _, bias in pairs}

    @property
    def penalises(self) -> bool:
        """Whether the choice of a token hangs on those before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def acting(self) -> dict[str, Any]:
        """Return the fields of other values than the defaults, and those that there always were.

        What is keyed by settings is then found again when there are more of them.
        """
        later = ("min_p", "presence_penalty", "frequency_penalty", "logit_bias", "top_logprobs", "speculate")
        fields = type(self).model_fields
        return {name: value for name, value in self if name not in later or value != fields[name].default}
