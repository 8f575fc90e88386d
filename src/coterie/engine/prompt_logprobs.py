"""The log-probabilities of prompts' own tokens, taken from the states that reading them computes anyway."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coterie.backbone.loading import Backbone
from coterie.data.devices import on_device
from coterie.engine.answers import Answer
from coterie.engine.reading import summed_logits
from coterie.engine.request import Scored
from coterie.engine.sampling import bits_of, floats_of

PART = 64
"""Positions whose logits are held at once."""


@torch.inference_mode()
def score_prompts(backbone: Backbone, read: Sequence[tuple[Answer, Float[Tensor, "_ _ width"]]]) -> None:
    """Note how likely prompts' tokens are behind what was just read, where their requests want to know.

    All scores leave the device in one copy.
    """
    asked = [(own, states) for own, states in read if own.request.prompt_logprobs is not None and not own.written]
    found = [torch.cat([*_scores(backbone, answer, states)]) for answer, states in asked]
    if not found:
        return
    copied = torch.cat([own.flatten() for own in found]).cpu().split([own.numel() for own in found])
    for (answer, states), own, flat in zip(asked, found, copied, strict=True):
        shown, table = int(answer.request.prompt_logprobs or 0), flat.view(own.shape)
        logs, ids = floats_of(table[:, : 1 + shown]).tolist(), table[:, 1 + shown :].tolist()
        scored = [Scored(one, tuple(zip(top, tops, strict=True))) for (one, *tops), top in zip(logs, ids, strict=True)]
        start = answer.text.read - states.shape[1]
        answer.begun = answer.begun._replace(prompt=(*answer.begun.prompt[:start], *scored))


def _scores(
    backbone: Backbone, answer: Answer, states: Float[Tensor, "row position width"]
) -> Iterator[Int[Tensor, "position number"]]:
    """Yield the scores of some tokens at a time: each one's log, the logs of the likeliest there, and these.

    A token and its alternatives are of one tensor, so that its number among them is the same.
    """
    end = answer.text.read
    targets = answer.request.prompt.ids[end - states.shape[1] + 1 : end + 1]  # nothing of it follows its last token
    votes = on_device(answer.text.plan.votes.float(), states.device)
    wanted = on_device(targets, states.device, torch.long)[:, None]
    for part, own in zip(states[:, : len(targets)].split(PART, dim=1), wanted.split(PART), strict=True):
        logits = summed_logits(backbone, lambda rows: torch.einsum("r,rpw->pw", votes, rows.float()), part)
        logprobs = logits.log_softmax(dim=-1)
        top = logprobs.topk(int(answer.request.prompt_logprobs or 0), dim=-1)
        yield torch.cat([bits_of(torch.cat([logprobs.gather(1, own), top.values], dim=1)), top.indices.int()], dim=1)
