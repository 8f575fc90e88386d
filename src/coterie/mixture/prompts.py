"""Prompts in the forms in which people have them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from coterie.data.examples import Example, from_prompt, load_examples

Prompt = str | Example | Mapping[str, Any] | Sequence[Mapping[str, str]]
"""A question, an example or a row of data (their answers are not looked at), or a list of turns {role, content}."""


def as_examples(prompts: Prompt | Sequence[Prompt]) -> list[Example]:
    """Take one prompt, or several, in any of the forms.

    Raises:
        CoterieError: when one is empty.
    """
    is_one = isinstance(prompts, str | Example | Mapping) or (prompts and all(map(_is_turn, prompts)))
    several: list[Any] = [prompts] if is_one else list(prompts)  # the turns of a conversation are one prompt
    return [_as_example(prompt, number) for number, prompt in enumerate(several)]


def _is_turn(given: object) -> bool:
    return isinstance(given, Mapping) and ("role" in given or "from" in given)


def _as_example(prompt: Prompt, number: int) -> Example:
    if isinstance(prompt, Example):
        return prompt
    if isinstance(prompt, str):
        return from_prompt(prompt, number)
    row = prompt if isinstance(prompt, Mapping) else {"messages": list(prompt)}
    return replace(load_examples([row], need_response=False)[0], id=str(number))
