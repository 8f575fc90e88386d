"""Rationales for the answers of a task's examples: from the data, or from a model that is shown the answer.

"Leveraging Open Knowledge for Advancing Task Expertise" (arXiv 2408.15915) has a larger model explain every verified
answer, and ranks adapters by how little the explanations surprise them.
"""

from collections.abc import Sequence
from dataclasses import replace

from coterie.backbone.aliases import cache_folder
from coterie.data.examples import Example, Message, from_prompt
from coterie.errors import CoterieError
from coterie.experts.answering import Question
from coterie.experts.expert_pool import Pool, parse_expert
from coterie.experts.reply_cache import ReplyCache
from coterie.grading.lengths import ANSWER_TOKENS
from coterie.mixture.memory import budget_of, groups_of
from coterie.mixture.scheduler import ExpertScheduler
from coterie.settings.groups import ExpertServingSettings, PlacementSettings, RationaleSettings, SamplingSettings

FROM_DATA = "data"
WRITER = "rationales"
CACHE_FILE = "rationales.jsonl"
REQUEST = """{question}

The right answer is:
{answer}

Explain step by step why this is the answer, in at most three sentences. Do not write anything else."""


def with_rationales(
    shots: Sequence[Example], settings: RationaleSettings, placement: PlacementSettings, batch_size: int
) -> list[Example]:
    """Return the shots with a rationale in their responses.

    A written one is put behind the shot's own response or before it, so the right answer stands in it whatever the
    writer says. What was written once is kept in the user's cache. `placement` and `batch_size` are for a writer that
    is a model on this machine.

    Raises:
        CoterieError: when there is no such writer, or it fails.
    """
    if settings.rationales == FROM_DATA:
        return list(shots)
    sampling = SamplingSettings(max_new_tokens=settings.rationale_tokens)
    requests = [REQUEST.format(question=shot.instruction, answer=shot.response) for shot in shots]
    texts = _written(requests, settings.rationales, sampling, placement, batch_size)
    explained = []
    for shot, text in zip(shots, texts, strict=True):
        parts = [shot.response or "", text]
        if settings.rationale_order == "rationale-first":
            parts.reverse()
        explained.append(replace(shot, messages=(*shot.prompt, Message("assistant", "\n".join(parts)))))
    return explained


def _written(
    requests: Sequence[str], writer: str, sampling: SamplingSettings, placement: PlacementSettings, batch_size: int
) -> list[str]:
    pool = Pool((parse_expert(f"{WRITER}={writer}"),))
    work = ExpertServingSettings()
    new_tokens = sampling.max_new_tokens or ANSWER_TOKENS
    groups = groups_of(pool, placement, work, batch_size=batch_size, new_tokens=new_tokens)
    cache = ReplyCache(cache_folder() / CACHE_FILE)
    with ExpertScheduler(groups, pool.identities, cache, budget_of(work, placement)) as scheduler:
        replies = scheduler.ask([Question(WRITER, from_prompt(text).messages, sampling) for text in requests])
    errors = [reply.error for reply in replies if reply.error]
    if errors:
        raise CoterieError(
            f"{writer} wrote no rationale for {len(errors)} of {len(requests)} shots ({errors[0]}); "
            "the same command asks for those again"
        )
    return [reply.text.strip() for reply in replies]
