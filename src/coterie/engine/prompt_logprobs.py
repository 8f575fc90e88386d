"""The log-probabilities of a prompt's own tokens, taken from the states that reading it computes anyway."""

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.loading import Backbone
from coterie.data.devices import on_device
from coterie.engine.answers import Answer
from coterie.engine.reading import summed_logits
from coterie.engine.request import Scored

PART = 64
"""Positions whose logits are held at once."""


@torch.inference_mode()
def score_prompt(backbone: Backbone, answer: Answer, states: Float[Tensor, "row position width"]) -> None:
    """Note how likely the prompt's tokens are behind what was just read, where its request wants to know.

    A token and its alternatives are of one tensor, so that its number among them is the same.
    """
    if (shown := answer.request.prompt_logprobs) is None or answer.written:
        return
    end = answer.text.read
    start = end - states.shape[1]
    targets = answer.request.prompt.ids[start + 1 : end + 1]  # nothing of the prompt follows its last token
    votes = on_device(answer.text.plan.votes.float(), states.device)
    found: list[Scored] = []
    for at in range(0, len(targets), PART):
        wanted = on_device(torch.tensor(targets[at : at + PART]), states.device)
        part = states[:, at : at + len(wanted)]
        logits = summed_logits(backbone, lambda rows: torch.einsum("r,rpw->pw", votes, rows.float()), part)
        logprobs = logits.log_softmax(dim=-1)
        own = logprobs.gather(1, wanted[:, None]).squeeze(1).tolist()
        top = logprobs.topk(shown, dim=-1)
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        found += map(Scored, own, tops)
    answer.begun = answer.begun._replace(prompt=(*answer.begun.prompt[:start], *found))
