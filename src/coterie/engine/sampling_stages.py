"""What happens to the logits of a batch of requests until the largest is the token that is chosen.

The stages and their order are those of `generate` of transformers: biases, penalties, temperature, top-k and top-p,
min-p. What they leave is drawn from by adding Gumbel noise and taking the largest (Gumbel 1954; Maddison et al. 2014),
which gives every token its probability. The noise of a token is a hash of (seed, place in the answer, token), so that a
request's tokens hang neither on what else is in the batch nor on the device, and a place that is looked at again gets
the same noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coterie.data.devices import on_device
from coterie.features.projection import signed, splitmix64
from coterie.settings.sampling import SamplingSettings

Logits = Float[Tensor, "request position vocabulary"]
Drafts = Int[Tensor, "request position-1"]
FEW, SOME = 256, 4096  # likeliest tokens that are looked at before a whole vocabulary is sorted, which takes longest
COLDEST = 1e-6  # a temperature below is as good as greedy, and no number to divide by


@dataclass
class SampledText:
    """How an answer is sampled, and the tokens of its text, which whoever samples adds to: at first the prompt's."""

    settings: SamplingSettings
    ids: list[int]

    def __post_init__(self) -> None:
        """Note where the answer begins."""
        self.start = len(self.ids)


class Stage(ABC):
    """Changes the logits of those requests of a batch that ask for it; row by row, so that nobody notices the others.

    Logits have several positions where a request has drafts: behind its text, and behind each of its drafts.
    """

    def __init__(self, rows: Sequence[int], texts: Sequence[SampledText], logits: Logits) -> None:
        """Gather what the requests in `rows` ask for, on the device of the logits."""
        self._texts = [texts[row] for row in rows]
        self._settings = [text.settings for text in self._texts]
        self._every = len(rows) == len(texts)
        self._rows = on_device(rows, logits.device)
        self._vocabulary = logits.shape[-1]

    @staticmethod
    @abstractmethod
    def needed(settings: SamplingSettings) -> bool:
        """Say whether a request asks for it."""

    @abstractmethod
    def change(self, scores: Logits, drafts: Drafts | None) -> Logits:
        """Return the scores of its requests, changed."""

    def advance(self, ids: Int[Tensor, "request position"], right: Int[Tensor, " request"]) -> None:  # noqa: B027
        """Go on behind the tokens that were chosen, the drafts that are right and one more; most stages need not."""

    def __call__(self, scores: Logits, drafts: Drafts | None) -> Logits:
        """Return the scores of all requests, those of its own changed."""
        own = self.change(self.own(scores), None if drafts is None else self.own(drafts))
        return own if self._every else scores.index_copy(0, self._rows, own)

    def own(self, values: Tensor) -> Tensor:
        """Return the part of its requests."""
        return values if self._every else values[self._rows]

    def column(self, name: str) -> Float[Tensor, "request 1 1"]:
        """Return a setting of each of its requests."""
        values = [getattr(settings, name) for settings in self._settings]
        return on_device(values, self._rows.device, torch.float32)[:, None, None]


class Biases(Stage):
    """Adds to the logits of single tokens."""

    def __init__(self, rows: Sequence[int], texts: Sequence[SampledText], logits: Logits) -> None:
        """Gather biases as (row, token, bias)."""
        super().__init__(rows, texts, logits)
        biases = [(row, *pair) for row, own in enumerate(self._settings) for pair in own.biases().items()]
        row, token, bias = zip(*biases, strict=True)
        self._places = on_device(row, logits.device), on_device(token, logits.device)
        self._biases = on_device(bias, logits.device)[:, None]

    @staticmethod
    def needed(settings: SamplingSettings) -> bool:
        """Say whether a request asks for it."""
        return bool(settings.logit_bias)

    def change(self, scores: Logits, drafts: Drafts | None) -> Logits:
        """Add the biases."""
        row, token = self._places
        changed = scores.clone()
        changed[row, :, token] += self._biases
        return changed


class Penalties(Stage):
    """Makes tokens less likely that stand in the text (repetition, arXiv 1909.05858) or in the answer (the others).

    Presence and frequency penalties are those of OpenAI: taken off once, and for each time.
    """

    def __init__(self, rows: Sequence[int], texts: Sequence[SampledText], logits: Logits) -> None:
        """Count the tokens that are there."""
        super().__init__(rows, texts, logits)
        self._repetition = self.column("repetition_penalty")
        self._presence, self._frequency = self.column("presence_penalty"), self.column("frequency_penalty")
        self._answer = self._counted([text.ids[text.start :] for text in self._texts])
        self._prompt = self._counted([text.ids[: text.start] for text in self._texts]) > 0

    def _counted(self, ids: Sequence[Sequence[int]]) -> Int[Tensor, "request vocabulary"]:
        size = self._vocabulary
        counts = [torch.bincount(torch.tensor(own, dtype=torch.long), minlength=size)[:size] for own in ids]
        return on_device(torch.stack(counts).int(), self._rows.device)

    @staticmethod
    def needed(settings: SamplingSettings) -> bool:
        """Say whether a request asks for it."""
        return settings.penalises

    def change(self, scores: Logits, drafts: Drafts | None) -> Logits:
        """Penalise every position by the text before it, drafts included."""
        answer = self._answer[:, None]
        if drafts is not None:
            length = scores.shape[1]
            read = drafts[:, None].expand(-1, length, -1)
            is_before = torch.ones_like(read, dtype=torch.int32).tril(-1) * (read >= 0)
            answer = answer.repeat(1, length, 1).scatter_add(2, read.clamp(min=0), is_before)
        is_seen = (answer > 0) | self._prompt[:, None]
        repeated = torch.where(scores < 0, scores * self._repetition, scores / self._repetition)
        scores = torch.where(is_seen, repeated, scores)
        return scores - self._frequency * answer - self._presence * (answer > 0)

    def advance(self, ids: Int[Tensor, "request position"], right: Int[Tensor, " request"]) -> None:
        """Count the tokens that were chosen."""
        ids, right = self.own(ids), self.own(right)
        is_kept = torch.arange(ids.shape[1], device=ids.device) <= right[:, None]
        self._answer.scatter_add_(1, ids, is_kept.int())


class Temperature(Stage):
    """Divides by the temperature, with the largest logit at 0 so that the coldest gives no infinity."""

    def __init__(self, rows: Sequence[int], texts: Sequence[SampledText], logits: Logits) -> None:
        """Gather the temperatures."""
        super().__init__(rows, texts, logits)
        self._temperature = self.column("temperature").clamp(min=COLDEST)

    @staticmethod
    def needed(settings: SamplingSettings) -> bool:
        """Say whether a request asks for it."""
        return settings.temperature not in (0, 1)

    def change(self, scores: Logits, drafts: Drafts | None) -> Logits:
        """Divide."""
        return (scores - scores.amax(dim=-1, keepdim=True)) / self._temperature


class Nucleus(Stage):
    """Keeps the likeliest K tokens (top-k), and of these the fewest that have a probability mass (top-p).

    Top-p is nucleus sampling (Holtzman et al., arXiv 1904.09751). Tokens as likely as the last one stay with it.
    """

    def __init__(self, rows: Sequence[int], texts: Sequence[SampledText], logits: Logits) -> None:
        """Gather both, and how many of the likeliest tokens have to be looked at."""
        super().__init__(rows, texts, logits)
        counts = [min(own.top_k or self._vocabulary, self._vocabulary) for own in self._settings]
        self._top_k = on_device(counts, logits.device)[:, None, None]
        self._top_p, self._is_cut = self.column("top_p"), self._top_k < self._vocabulary
        longest, cut = max(counts), max((own for own in counts if own < self._vocabulary), default=0)
        looks = [FEW, SOME] if logits.device.type == "cpu" else []  # elsewhere, to ask whether these do is to wait
        self._looks = [*(size for size in looks if cut <= size < longest), longest]

    @staticmethod
    def needed(settings: SamplingSettings) -> bool:
        """Say whether a request asks for it."""
        return settings.temperature > 0 and (settings.top_k > 0 or settings.top_p < 1)

    def change(self, scores: Logits, drafts: Drafts | None) -> Logits:
        """Let all others have no chance."""
        whole = scores.softmax(dim=-1).amax(dim=-1, keepdim=True).reciprocal()
        for size in self._looks:
            likeliest = scores.topk(size, dim=-1).values
            is_kept = torch.arange(size, device=scores.device) < self._top_k
            chances = (likeliest - likeliest[..., :1]).exp() * is_kept
            mass = chances.cumsum(dim=-1)
            total = torch.where(self._is_cut, mass[..., -1:], whole)
            is_kept = is_kept & ((mass - chances < self._top_p * total) | (self._top_p == 1))
            if size == self._looks[-1] or not bool((is_kept[..., -1:] & ~self._is_cut).any()):
                break
        lowest = likeliest.masked_fill(~is_kept, torch.inf).amin(dim=-1, keepdim=True)
        return scores.masked_fill(scores < lowest, -torch.inf)


class MinP(Stage):
    """Keeps tokens that are likely beside the likeliest one (Nguyen et al., arXiv 2407.01082)."""

    def __init__(self, rows: Sequence[int], texts: Sequence[SampledText], logits: Logits) -> None:
        """Gather the smallest shares, as logs."""
        super().__init__(rows, texts, logits)
        self._least = self.column("min_p").log()

    @staticmethod
    def needed(settings: SamplingSettings) -> bool:
        """Say whether a request asks for it."""
        return settings.temperature > 0 and settings.min_p > 0

    def change(self, scores: Logits, drafts: Drafts | None) -> Logits:
        """Let all others have no chance."""
        return scores.masked_fill(scores < scores.amax(dim=-1, keepdim=True) + self._least, -torch.inf)


class Noise(Stage):
    """Adds the noise by which the largest score is a draw."""

    def __init__(self, rows: Sequence[int], texts: Sequence[SampledText], logits: Logits) -> None:
        """Gather what the noise hangs on."""
        super().__init__(rows, texts, logits)
        self._seeds = on_device([signed(own.seed) for own in self._settings], logits.device)
        self._positions = on_device([len(text.ids) - text.start for text in self._texts], logits.device)

    @staticmethod
    def needed(settings: SamplingSettings) -> bool:
        """Say whether a request asks for it."""
        return settings.temperature > 0

    def change(self, scores: Logits, drafts: Drafts | None) -> Logits:
        """Add the noise of every position."""
        positions = self._positions[:, None] + torch.arange(scores.shape[1], device=scores.device)
        return scores + gumbel(self._seeds, positions, self._vocabulary)

    def advance(self, ids: Int[Tensor, "request position"], right: Int[Tensor, " request"]) -> None:
        """Go on behind the tokens that were chosen."""
        self._positions += self.own(right) + 1


def gumbel(
    seeds: Int[Tensor, " request"], positions: Int[Tensor, "request position"], vocabulary: int
) -> Float[Tensor, "request position vocabulary"]:
    """Return Gumbel noise, a hash of a request's seed, the place in its answer and the token: on every device alike."""
    keys = splitmix64(positions + 1, seeds[:, None])[..., None]  # counted from 1, since the hash of 0 under 0 is 0
    bits = splitmix64(torch.arange(1, vocabulary + 1, device=seeds.device), keys)
    # Uniform in (0, 1), and fine near 0 where the largest noise comes from, so that no token's chance is cut off.
    uniform = ((bits >> 1) & (2**63 - 1)).float().mul_(2.0**-63).clamp_(2.0**-64, 1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


STAGES: tuple[type[Stage], ...] = (Biases, Penalties, Temperature, Nucleus, MinP, Noise)
