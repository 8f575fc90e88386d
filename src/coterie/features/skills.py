"""A question seen as the skills it needs: keywords from a model, a typed choice from a list, or the data's own.

Symbolic-MoE (Chen et al. 2025) asks a model five times for two to five keywords and keeps those that come back.
"""

import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.errors import CoterieError
from coterie.features.embedding import SentenceEncoder, encoder_folder

LONGEST_KEYWORD = 20  # characters; longer ones are sentences as a rule
LEAST_SAMPLES = 2  # how often a keyword must come back
ANSWER_PREFIX = "Keywords:"
MOST_CHOSEN = 5
NEAR_BEST = 0.5  # share of the best option's probability from which another option counts as well
NO_ENCODER = "none"

Embed = Callable[[Sequence[str]], Tensor]
"""Turns texts into vectors of length 1: (text, dimension)."""

_KEYWORD_PROMPT = """Name the knowledge, subjects and skills that are needed to answer the question, as 2 to 5 keywords.
Write one line: "Keywords:" and the keywords, separated by commas.

Question: A train covers 120 km in 1.5 hours. What is its average speed?
Keywords: arithmetic, rates, unit conversion

Question: Which organelle makes ATP in animal cells?
Keywords: cell biology, metabolism

Question: {question}
"""
_CHOICE_PROMPT = """Which field of knowledge does the question below need most? Reply with one letter.

Question: {question}

{options}

Answer:"""
BLANK = "N/A"  # a question that says nothing, for what a model thinks of the letters themselves


def keyword_request(question: str) -> str:
    """Return the prompt that asks for a question's keywords."""
    return _KEYWORD_PROMPT.format(question=question)


def parse_keywords(text: str) -> list[str]:
    """Read the keywords of one sample: from the first line with text after the last "Keywords:".

    They are put into lower case without full stops; those of more than 20 characters are dropped.
    """
    after = text.rpartition(ANSWER_PREFIX)[2]
    line = next((line for line in after.splitlines() if line.strip()), "")
    words = [" ".join(part.replace(".", "").lower().split()) for part in line.split(",")]
    return [word for word in words if word and len(word) <= LONGEST_KEYWORD]


def kept_keywords(samples: Sequence[str]) -> tuple[str, ...]:
    """Return the keywords that stand at least twice in all samples together, the most frequent first."""
    counts = Counter(word for text in samples for word in parse_keywords(text))
    return tuple(word for word, count in counts.most_common() if count >= LEAST_SAMPLES)


def choice_request(question: str, skills: Sequence[str]) -> str:
    """Return the prompt whose next token is the letter of a skill.

    Raises:
        CoterieError: for fewer than 2 skills, or more than there are letters.
    """
    options = "\n".join(f"({letter}) {skill}" for letter, skill in zip(letters(skills), skills, strict=True))
    return _CHOICE_PROMPT.format(question=question, options=options)


def letters(skills: Sequence[str]) -> list[str]:
    """Return the letters that stand for skills.

    Raises:
        CoterieError: as `choice_request`.
    """
    if not 2 <= len(skills) <= len(string.ascii_uppercase):
        raise CoterieError(f"a choice is made between 2 and 26 skills, got {len(skills)}; give others by --skill-list")
    return list(string.ascii_uppercase[: len(skills)])


def chosen_skills(
    logprobs: Float[Tensor, "question option"], blank: Float[Tensor, " option"], skills: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return every question's likeliest skill, and up to four more that are at least half as likely.

    A small model prefers some letters whatever is asked; what it gives them for an empty question is divided out
    (contextual calibration, Zhao et al. 2021).

    Args:
        logprobs: of every option after every question.
        blank: of every option after the question that says nothing.
        skills: in the order of the options.
    """
    shares = (logprobs - blank).softmax(dim=1)
    best, order = shares.sort(dim=1, descending=True, stable=True)
    return [
        tuple(skills[int(o)] for share, o in zip(*row, strict=True) if share >= NEAR_BEST * row[0][0])[:MOST_CHOSEN]
        for row in zip(best, order, strict=True)
    ]


def merge_synonyms(counts: Mapping[str, int], embed: Embed | None, threshold: float) -> dict[str, str]:
    """Map every skill to the name it goes by: the most frequent of those that are as near as `threshold`.

    Skills are taken in the order of their frequency; each joins the nearest name before it, or becomes a name itself.

    Args:
        counts: how often each skill is needed.
        embed: turns skills into vectors; without it none is merged.
        threshold: cosine from which two skills are one; above 1 none is merged.
    """
    order = sorted(counts, key=lambda skill: (-counts[skill], skill))
    if embed is None or threshold > 1 or len(order) < 2:
        return {skill: skill for skill in order}
    cosines = (vectors := embed(order)) @ vectors.T
    heads: list[int] = []
    names = {}
    for number, skill in enumerate(order):
        head = max(heads, key=lambda other: float(cosines[number, other]), default=None)
        if head is None or cosines[number, head] < threshold:
            heads.append(head := number)
        names[skill] = order[head]
    return names


def nearest_skills(skills: Sequence[str], known: Sequence[str], embed: Embed | None) -> dict[str, str]:
    """Map every skill to the known one that is nearest in meaning (cosine, no threshold); known ones to themselves.

    Without `embed`, a skill that is not known has no entry.
    """
    strange = sorted(set(skills) - set(known))
    names = {skill: skill for skill in skills if skill in known}
    if not strange or not known or embed is None:
        return names
    nearest = (embed(strange) @ embed(known).T).argmax(dim=1)
    return names | {skill: known[int(place)] for skill, place in zip(strange, nearest, strict=True)}


def load_embed(encoder: str, device: torch.device | str = "cpu") -> Embed | None:
    """Load a sentence encoder by name: minilm, a local folder, or none.

    Raises:
        CoterieError: when there is no such encoder, or it cannot be loaded.
    """
    if encoder == NO_ENCODER:
        return None
    return SentenceEncoder(encoder_folder(encoder, NO_ENCODER), name=encoder, device=device)
