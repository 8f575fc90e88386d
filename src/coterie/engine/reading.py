"""Reading texts with the model: each request's rows run its own experts, and all rows share the forward pass."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coterie.backbone.gates import MeanWeights
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone
from coterie.backbone.row_mix import RequestRows, RowMix
from coterie.backbone.slots import Slots
from coterie.backbone.steps import Record, Steps
from coterie.data.devices import on_device
from coterie.engine.row_keys import row_keys

MIXES_KEPT = 3  # of the requests that write, of those whose prompts are being read, and of what proposes tokens


@dataclass(eq=False)
class Text:
    """A text as the model reads it.

    Attributes:
        ids: its tokens.
        plan: the model rows that read it.
        rows: where their cache lies.
        reach: how many tokens may be read in the end.
        read: how many tokens were read.
        drafts: tokens that are proposed to follow, and are read behind all others.
        gate_weights: what gates have weighed so far, on average over what was read.
    """

    ids: list[int]
    plan: RequestRows
    rows: list[int]
    reach: int = 0
    drafts: list[int] = field(default_factory=list)
    read: int = 0
    gate_weights: Float[Tensor, " expert"] | None = None

    @property
    def unread(self) -> int:
        """Tokens that were not read yet."""
        return len(self.ids) - self.read


class Plan(NamedTuple):
    """What the rows of several texts run, and how they sum to each text's.

    Attributes:
        requests: keeps the plans of the texts alive, by whose identity this is found again.
        mix: what the rows run.
        rows: (text, row): each text's rows, filled up with its first one.
        votes: (text, row): the weights of these; 0 where filled up.
    """

    requests: tuple[RequestRows, ...]
    mix: RowMix
    rows: Int[Tensor, "text most"]
    votes: Float[Tensor, "text most"]

    def row(self, place: int) -> RequestRows:
        """Return what one of the rows runs, as a request of its own."""
        for own in self.requests:
            if place < len(own.votes):
                return replace(own, weights=own.weights[place : place + 1], votes=own.votes[place : place + 1])
            place -= len(own.votes)
        raise IndexError(place)

    def sum(self, states: Float[Tensor, "row position width"]) -> Float[Tensor, "text position width"]:
        """Sum each text's own rows with their votes, in float32; what is wrong with a row stays with its text."""
        return torch.einsum("tr,trpd->tpd", self.votes, states[self.rows].float())

    def logits(
        self, backbone: Backbone, states: Float[Tensor, "row position width"]
    ) -> Float[Tensor, "text position vocabulary"]:
        """Return each text's next-token logits."""
        return summed_logits(backbone, self.sum, states)


def summed_logits(
    backbone: Backbone, add_up: Callable[[Tensor], Tensor], states: Float[Tensor, "*rows width"]
) -> Tensor:
    """Return the logits of hidden states, added up over rows.

    Where logits are linear in the hidden state, the sum is taken before the output layer: the same logits for one
    product a text instead of one a row. A soft cap is not linear, so there every row goes through on its own.
    """
    return backbone.head(add_up(states)) if backbone.logit_cap is None else add_up(backbone.head(states))


class Reader:
    """Reads pieces of texts into their rows of the cache."""

    def __init__(self, backbone: Backbone, layers: ExpertLayers, slots: Slots, record: Record | None = None) -> None:
        """Read nothing yet.

        Args:
            backbone: the base model.
            layers: the bank's experts.
            slots: the cache.
            record: keeps passes over texts that are written, in steps of a fixed shape, where the model allows these.
        """
        self.backbone = backbone
        self.layers = layers
        self.slots = slots
        self.tokens = 0  # that were read so far, each once for all rows of its text
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._steps = Steps(backbone, layers, slots, record) if record and Steps.allows(backbone, slots) else None

    def open(self, ids: Sequence[int], plan: RequestRows, reach: int = 0) -> Text:
        """Claim rows for a text of which nothing was read yet, and which may become so long, as far as is known."""
        return Text(list(ids), plan, self.slots.claim(len(plan.votes), reach), reach)

    def recall(self, text: Text) -> None:
        """Take over from earlier texts what they had in common with this one, of which nothing was read yet.

        What gates weigh is averaged while a prompt is read, so that where there are gates all of it is read.
        """
        if self.slots.keeps_prefixes and text.plan.gates is None:
            text.read = self.slots.recall(text.rows, row_keys(self.layers, text.plan), text.ids)

    def remember(self, text: Text) -> None:
        """Keep what was read of a text for later ones; it must have run its plan from its first token on."""
        if self.slots.keeps_prefixes and text.plan.gates is None:
            self.slots.keep(text.rows, row_keys(self.layers, text.plan), text.ids[: text.read])

    def fork(self, text: Text) -> Text:
        """Let a second text go on from what was read of one."""
        return replace(text, ids=list(text.ids), rows=self.slots.fork(text.rows))

    def close(self, text: Text) -> None:
        """Give the rows back."""
        self.slots.release(text.rows)

    def change(self, text: Text, plan: RequestRows, *, recompute: bool) -> None:
        """Read on under another plan: with what was read under the earlier one, or forgetting it.

        Raises:
            ValueError: when the cache is kept and the new plan has another number of rows.
        """
        if recompute:
            self.slots.release(text.rows)
            text.rows, text.read, text.gate_weights = self.slots.claim(len(plan.votes), text.reach), 0, None
        elif len(plan.votes) != len(text.rows):
            raise ValueError("weights can change only where every request has one row of its own")
        text.plan = plan

    @property
    def can_speculate(self) -> bool:
        """Whether several tokens can be read at once, and forgotten again."""
        return self.slots.can_rollback and self.backbone.reads.in_pieces

    def keep(self, text: Text, right: int) -> None:
        """Take so many drafts as read, which are about to be written behind the text, and forget the others."""
        text.read += right
        if right < len(text.drafts):
            self.slots.rollback(text.rows, [text.read] * len(text.rows))
        text.drafts = []

    def planned(self, texts: Sequence[Text]) -> Plan:
        """Return what the rows of texts run; the same as before while neither texts nor their plans change."""
        key = tuple(id(text.plan) for text in texts)
        if key not in self._plans:
            while len(self._plans) >= MIXES_KEPT:
                del self._plans[next(iter(self._plans))]
            requests, device = tuple(text.plan for text in texts), self.backbone.device
            sizes = [len(own.votes) for own in requests]
            starts = [sum(sizes[:place]) for place in range(len(sizes))]
            most = range(max(sizes))
            rows = [
                [start + (row if row < size else 0) for row in most] for start, size in zip(starts, sizes, strict=True)
            ]
            votes = torch.nn.utils.rnn.pad_sequence([own.votes.float() for own in requests], batch_first=True)
            self._plans[key] = Plan(
                requests, self.layers.mix(requests), on_device(rows, device), on_device(votes, device)
            )
        return self._plans[key]

    def restore(self, text: Text, count: int) -> None:
        """Go back to what was read before a pass over so many tokens that broke off, or read all anew.

        A longer piece may have written over what sliding windows look at, and states cannot be turned back.
        """
        count, text.drafts = count + len(text.drafts), []
        if count == 1 and self.slots.can_rollback:
            self.slots.rollback(text.rows, [text.read] * len(text.rows))
        else:
            self.change(text, text.plan, recompute=True)

    @torch.inference_mode()
    def read(
        self, texts: Sequence[Text], counts: Sequence[int], *, watch_gates: bool = False, in_steps: bool = False
    ) -> list[Float[Tensor, "_ _ width"]]:
        """Read the next tokens of every text, as many as its count, and its drafts.

        Args:
            texts: what is read.
            counts: tokens of each.
            watch_gates: average what gates weigh.
            in_steps: of a fixed shape, where there are such; for those that are written.

        Returns:
            Each text's rows' last hidden states at all of these.
        """
        sizes = [len(text.rows) for text in texts]
        pieces = [[*text.ids[text.read : text.read + n], *text.drafts] for text, n in zip(texts, counts, strict=True)]
        longest = max(map(len, pieces))
        filled = torch.tensor([[*piece, *[self.backbone.pad_id] * (longest - len(piece))] for piece in pieces])
        tokens = filled.repeat_interleave(torch.tensor(sizes), dim=0)
        lengths = [len(piece) for piece, size in zip(pieces, sizes, strict=True) for _ in range(size)]
        watch = _GateWatch(lengths, self.backbone.device) if watch_gates else None
        if in_steps and watch is None and self._steps is not None and self._steps.take(longest):
            hidden = self._steps.read(
                [row for text in texts for row in text.rows], tokens, lengths, self.planned(texts).mix
            )
        else:
            tokens = on_device(tokens, self.backbone.device)
            hidden = self._read(texts, tokens, None if min(lengths) == longest else lengths, watch)
        self.tokens += sum(map(len, pieces))
        starts = itertools.accumulate([0, *sizes])
        weighed = None if watch is None else watch.means()[:, : len(self.layers.adapters)]  # merged ones come behind
        for text, count, start in zip(texts, counts, starts, strict=False):
            if weighed is not None and text.plan.gates:
                own = weighed[start]
                before = own if text.gate_weights is None else text.gate_weights
                text.gate_weights = before.lerp(own, count / (text.read + count))
            text.read += count
        return [own[:, : len(piece)] for own, piece in zip(hidden.split(sizes), pieces, strict=True)]

    @torch.inference_mode()
    def read_on(self, texts: Sequence[Text], tokens: Int[Tensor, "text 1"]) -> Float[Tensor, "text 1 width"]:
        """Read one further token of texts of one row each, which the host need not know."""
        hidden = self._read(texts, tokens)
        for text in texts:
            text.read += 1
        return hidden

    def _read(
        self,
        texts: Sequence[Text],
        tokens: Int[Tensor, "row position"],
        lengths: Sequence[int] | None = None,
        watch: "_GateWatch | None" = None,
    ) -> Float[Tensor, "row position width"]:
        plan, rows = self.planned(texts), [row for text in texts for row in text.rows]

        def running(places: Sequence[int]) -> AbstractContextManager[None]:
            mix = plan.mix if len(places) == len(rows) else self.layers.mix([plan.row(place) for place in places])
            return self.layers.running(mix, None if watch is None else watch.of(places))

        return self.slots.read(rows, tokens, lengths, running)


class _GateWatch:
    """What gates weigh on average in the rows of one read, which may go through the model in parts."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._lengths = torch.tensor(lengths)
        self._device = device
        self._parts: list[tuple[Sequence[int], MeanWeights]] = []

    def of(self, places: Sequence[int]) -> MeanWeights:
        """Watch some of the rows."""
        own = self._lengths[list(places)]
        is_token = torch.arange(int(own.max()))[None] < own[:, None]
        self._parts.append((places, MeanWeights(on_device(is_token.long(), self._device))))
        return self._parts[-1][1]

    def means(self) -> Float[Tensor, "row expert"]:
        """Return the mean over the tokens and layers of every row, on the CPU."""
        order = torch.tensor([place for places, _ in self._parts for place in places]).argsort()
        return torch.cat([seen.mean() for _, seen in self._parts])[order]
