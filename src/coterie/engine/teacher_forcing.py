"""Teacher-forced likelihood under re-routing: decoding with the answer's tokens given."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.loading import Backbone
from coterie.engine.decoding import ScoredTokens, scored_tokens
from coterie.engine.rerouting import Rerouting
from coterie.engine.rows import CachedRows

Text = tuple[Sequence[int], Sequence[int]]
"""A prompt and its answer, as token ids."""


def score_teacher_forced(
    backbone: Backbone, rows: CachedRows, rerouting: Rerouting, texts: Sequence[Text]
) -> list[ScoredTokens]:
    """Score answers as if the mixture had written them: the same weights at the same tokens as in decoding.

    Tokens that share their weights are read together, so this takes a forward pass for every re-routing, not for
    every token.
    Weighing may need gradients, so inference mode is on for the model's own passes only.

    Args:
        backbone: the base model.
        rows: the requests' rows, which have read nothing yet.
        rerouting: how their weights change.
        texts: a prompt and an answer of at least one token for each request.

    Returns:
        The scores of each answer's tokens.
    """
    found: list[list[ScoredTokens]] = [[] for _ in texts]
    active = list(range(len(texts)))
    hidden = _read_first(rows, rerouting, texts)
    known = 0
    while True:
        for place, number in enumerate(active):
            targets = torch.tensor(texts[number][1][known : known + rerouting.every], device=hidden.device)
            with torch.inference_mode():
                logits = backbone.head(hidden[place, : len(targets)])
                found[number].append(scored_tokens(logits, targets))
        known += rerouting.every
        places = [place for place, number in enumerate(active) if len(texts[number][1]) > known]
        active = [active[place] for place in places]
        if not active:
            return [ScoredTokens(*map(torch.cat, zip(*parts, strict=True))) for parts in found]
        rows.keep(places)
        rerouting.texts.keep(places)
        # The next tokens that share their weights; an answer that ends among them is filled up.
        staying = [texts[number] for number in active]
        length = min(rerouting.every, max(len(answer) for _, answer in staying) - known)
        filler = [backbone.pad_id] * length
        pieces = [[*answer[known - 1 :], *filler][:length] for _, answer in staying]
        pairs = zip(staying, pieces, strict=True)
        whole = [[*prompt, *answer[: known - 1], *piece] for (prompt, answer), piece in pairs]
        hidden = rows.by_request(rerouting.read(rows, pieces, whole, known))


def _read_first(
    rows: CachedRows, rerouting: Rerouting, texts: Sequence[Text]
) -> Float[Tensor, "request position width"]:
    """Read the prompts and the answer's tokens that share their weights; return the states from each prompt's last on.

    The states behind the end of a short answer are of no use, and its request leaves before they could do harm.
    """
    shared = [answer[: min(rerouting.every, len(answer)) - 1] for _, answer in texts]  # the last token is never read
    longest = max(map(len, shared))
    hidden = rows.by_request(rows.read([[*prompt, *own] for (prompt, _), own in zip(texts, shared, strict=True)]))
    total = hidden.shape[1]
    starts = [total - len(own) - 1 for own in shared]  # rows are padded on the left
    columns = [[min(start + place, total - 1) for place in range(longest + 1)] for start in starts]
    states = torch.stack([own[places] for own, places in zip(hidden, columns, strict=True)])
    rerouting.texts.append(shared)
    rerouting.texts.append_states(states[:, 1:])
    return states
