"""Choosing the next tokens of all requests of a step at once, on the device, from their combined logits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coterie.data.devices import on_device
from coterie.engine.sampling_stages import STAGES, Drafts, Logits, SampledText
from coterie.errors import CoterieError
from coterie.settings.sampling import SamplingSettings


class Chosen(NamedTuple):
    """One token of a request.

    Attributes:
        id: the token.
        logprob: natural log of its probability under the combined distribution, before temperature and penalties.
        top: the likeliest tokens there with their logs, where they were asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def check_biases(settings: SamplingSettings, vocabulary: int) -> None:
    """Refuse a bias of a token that the model cannot write.

    Raises:
        CoterieError: naming it.
    """
    if beyond := [token for token in settings.biases() if token >= vocabulary]:
        raise CoterieError(f"--logit-bias {beyond[0]}: the model's tokens have the ids 0 to {vocabulary - 1}")


class BatchSampler:
    """Chooses the next tokens of any texts at once, each as if it were alone.

    What they ask for stands in tensors that stay as long as the same texts come. A step does what some text needs, on
    the rows of those that need it, and copies from the device once.
    """

    def __init__(self) -> None:
        """Know no texts yet."""
        self._texts: list[SampledText] = []
        self._step: Step | None = None

    @torch.inference_mode()
    def choose(self, texts: Sequence[SampledText], logits: Logits, drafts: Drafts | None = None) -> list[list[Chosen]]:
        """Choose every text's next token, and those behind it as far as its drafts are what would be chosen.

        Args:
            texts: what is sampled, with all that was chosen before.
            logits: combined logits behind each text, and behind each of its drafts.
            drafts: tokens that were proposed to come next, first to last; -1 for none.

        Returns:
            For every text the drafts that were right and one token more: what one step after the other chooses.
        """
        if self._step is None or list(map(id, texts)) != list(map(id, self._texts)):
            self._step, self._texts = Step(texts, logits), list(texts)
        ids, right = self._step.choose(logits, drafts)
        logprobs = logits.log_softmax(dim=-1)
        chosen = logprobs.gather(2, ids[..., None]).squeeze(2)
        top_ids, top_logs = self._step.top(logprobs)
        parts = [right[:, None], ids, bits_of(chosen), top_ids.flatten(1), bits_of(top_logs).flatten(1)]
        copied = torch.cat([part.int() for part in parts], dim=1).cpu()
        counts, *columns = copied.split([part.shape[1] for part in parts], dim=1)
        result = []
        for text, count, own in zip(texts, counts[:, 0].tolist(), zip(*columns, strict=True), strict=True):
            own_ids, logs, tops, top_logs = own[0].tolist(), floats_of(own[1]).tolist(), own[2], floats_of(own[3])
            tokens = [Chosen(*pair) for pair in zip(own_ids, logs, strict=True)][: count + 1]
            if most := text.settings.top_logprobs:
                shown = zip(tops.view(len(logs), -1).tolist(), top_logs.view(len(logs), -1).tolist(), strict=True)
                pairs = [tuple(zip(*both, strict=True))[:most] for both in shown]
                tokens = [token._replace(top=top) for token, top in zip(tokens, pairs, strict=False)]
            result.append(tokens)
        return result


def bits_of(values: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Show float32 numbers as integers of the same bits, so that they leave the device together with such."""
    return values.float().view(torch.int32)


def floats_of(bits: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Show bits as the float32 numbers that they are."""
    return bits.contiguous().view(torch.float32)


class Step:
    """What a step does for requests that stay the same from one to the next."""

    def __init__(self, texts: Sequence[SampledText], logits: Logits) -> None:
        """Put what they ask for into tensors on the device of the logits."""
        needed = ((stage, [row for row, own in enumerate(texts) if stage.needed(own.settings)]) for stage in STAGES)
        self._stages = [stage(rows, texts, logits) for stage, rows in needed if rows]
        showing = [row for row, own in enumerate(texts) if own.settings.top_logprobs]
        self._showing = on_device(showing, logits.device, torch.long)
        self._most_shown = max((own.settings.top_logprobs for own in texts), default=0)

    def choose(
        self, logits: Logits, drafts: Drafts | None
    ) -> tuple[Int[Tensor, "request position"], Int[Tensor, " request"]]:
        """Return the token that would be chosen at every position, and how many drafts of each request are right."""
        scores = logits
        for stage in self._stages:
            scores = stage(scores, drafts)
        ids = scores.argmax(dim=-1)
        right = ids.new_zeros(len(ids)) if drafts is None else (ids[:, :-1] == drafts).cumprod(dim=1).sum(dim=1)
        for stage in self._stages:
            stage.advance(ids, right)
        return ids, right

    def top(
        self, logprobs: Logits
    ) -> tuple[Int[Tensor, "request position top"], Float[Tensor, "request position top"]]:
        """Return the likeliest tokens of the requests that show them; zeros for the others."""
        shape = (*logprobs.shape[:2], self._most_shown)
        ids, logs = self._showing.new_zeros(shape), logprobs.new_zeros(shape)
        if self._most_shown:
            logs[self._showing], ids[self._showing] = logprobs[self._showing].topk(self._most_shown, dim=-1)
        return ids, logs
