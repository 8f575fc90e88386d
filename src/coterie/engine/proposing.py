"""Who proposes tokens for the answers of a step, how many pay, and the cheaper models that propose some.

Such a model is the base model with one row for each answer: with the base adapter, with the experts merged into one, or
with no more than its first blocks (LayerSkip, arXiv 2404.16710). It chooses as the answer does, with the same noise.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os.path import commonprefix
from typing import Any

import torch

from coterie.backbone.adding import ModelInUse, swapped
from coterie.backbone.model import Backbone
from coterie.backbone.row_mix import RequestRows
from coterie.engine.answers import Answer
from coterie.engine.reading import Reader, Text
from coterie.engine.request import Request, Rerouting
from coterie.engine.sampling import Step
from coterie.engine.speculation import FREE, LENGTHS, PassCosts, draft_length
from coterie.errors import CoterieError
from coterie.experts.names import BASE
from coterie.settings.sampling import SamplingSettings


class Proposing:
    """Proposes as many tokens for answers as pay, by what passes and proposals cost and how good these were."""

    def __init__(self, reader: Reader, longest: float, chunk: int) -> None:
        """Know nothing yet.

        Args:
            reader: reads the answers' texts, and those of cheaper models.
            longest: tokens that a text may have.
            chunk: tokens of a text that a model catches up with in a step.
        """
        self.costs = PassCosts()
        self._reader = reader
        self._longest = longest
        self._chunk = chunk

    def rows(self, request: Request, plan: RequestRows) -> int:
        """Return how many rows of the cache each answer to a request takes, that of a cheaper model among them.

        Raises:
            CoterieError: when the base model has no more blocks than are to propose.
        """
        proposer, depth = request.draws[0].speculate, len(self._reader.backbone.blocks)
        if proposer.startswith("blocks:") and _blocks(proposer) >= depth:
            raise CoterieError(
                f"--speculate {proposer}: the base model has {depth} blocks; let fewer propose, such as "
                f"blocks:{max(1, depth // 4)}"
            )
        return len(plan.votes) + self._takes_a_row(request.draws[0])

    def unclaimed(self, answers: Sequence[Answer]) -> int:
        """Return how many rows models will still claim for answers that are being written."""
        waiting = [own for own in answers if own.written and own.drafting.text is None]
        return sum(self._takes_a_row(own.sampled.settings) for own in waiting)

    def _takes_a_row(self, settings: SamplingSettings) -> bool:
        return settings.speculate not in FREE and self._reader.can_speculate

    def forget(self, answer: Answer) -> None:
        """Give back what a model holds of an answer."""
        if (text := answer.drafting.text) is not None:
            self._reader.close(text)
            answer.drafting.text = None

    def __call__(self, answers: Sequence[Answer]) -> tuple[int, int]:
        """Put proposals behind the texts of answers; return the rows of a pass over them, and the tokens of each."""
        rows = sum(len(answer.text.rows) for answer in answers)
        most = {answer: min(self._most(answer), LENGTHS[-1]) for answer in answers}
        models: dict[str, list[Answer]] = {}
        chances = []
        for answer in answers:
            proposer, own = answer.sampled.settings.speculate, answer.drafting
            own.proposed = []
            if most[answer] > 0 and proposer == "lookup":
                own.proposed = own.proposer.propose(answer.text.ids, most[answer])
            elif most[answer] > 0:
                models.setdefault(proposer, []).append(answer)
            chances.append((own.chance, most[answer] if proposer not in FREE else len(own.proposed)))
        drafting = sum(self.costs.of_drafts(proposer, len(group), rows) for proposer, group in models.items())
        length = 0
        if self.costs.knows(rows) and any(count > 0 for _, count in chances):
            length = draft_length(chances, lambda size: self.costs.of(rows, size) + drafting * (size - 1))
        for proposer, group in models.items() if length else ():
            count = min(length, max(most[answer] for answer in group))
            self._let_propose(proposer, [answer for answer in group if most[answer] >= count], count)
        for answer in answers:
            answer.text.drafts = answer.drafting.proposed[:length]
        return rows, 1 + max((len(answer.text.drafts) for answer in answers), default=0)

    def _most(self, answer: Answer) -> int:
        """Return how many tokens may be proposed: fewer than the answer or its present weights have left."""
        off = answer.sampled.settings.speculate == "off" or answer.drafting.is_given_up
        if off or not self._reader.can_speculate:
            return 0
        left = min(answer.request.limit - answer.written, self._longest - len(answer.text.ids))
        if isinstance(rerouting := answer.request.routing, Rerouting):
            left = min(left, rerouting.every - answer.written % rerouting.every)
        return int(left) - 1

    # ----------------------------------------------------------------------------------------- cheaper models

    def _let_propose(self, proposer: str, answers: Sequence[Answer], count: int) -> None:
        """Let a model propose tokens for answers whose texts it has read; it catches up with those of the others.

        Whatever goes wrong there costs the answers their proposals alone.
        """
        try:
            texts = {answer: self._text(proposer, answer) for answer in answers}
            with self._model(proposer):
                if behind := [text for text in texts.values() if text.unread > self._chunk]:
                    self._reader.read(behind, [self._chunk] * len(behind))
                ready = {answer: text for answer, text in texts.items() if text not in behind}
                if ready:
                    self._draft(proposer, ready, count)
        except ModelInUse:
            raise
        except Exception:  # noqa: BLE001 - a model's own code, or want of memory
            for answer in answers:
                self.forget(answer)
                answer.drafting.proposed, answer.drafting.is_given_up = [], True

    def _draft(self, proposer: str, texts: dict[Answer, Text], count: int) -> None:
        """Propose tokens one by one, which leave the device together."""
        started, most = time.perf_counter(), max(text.unread for text in texts.values())
        own = list(texts.values())
        chooser, ids = None, []
        with torch.inference_mode():
            states = torch.cat([hidden[:, -1:] for hidden in self._reader.read(own, [text.unread for text in own])])
            while True:
                logits = self._reader.planned(own).logits(self._reader.backbone, states)
                chooser = chooser or Step([answer.sampled for answer in texts], logits)
                ids.append(chooser.choose(logits, None)[0])
                if len(ids) == count:
                    break
                states = self._reader.read_on(own, ids[-1])
            proposed = torch.cat(ids, dim=1).cpu().tolist()
        for (answer, text), tokens in zip(texts.items(), proposed, strict=True):
            answer.drafting.proposed = tokens
            text.ids += tokens[:-1]
        if most <= 1 + LENGTHS[-1]:
            self.costs.note_drafts(proposer, len(own), (time.perf_counter() - started) / count)

    def _text(self, proposer: str, answer: Answer) -> Text:
        """Return what a model has read of an answer's text, without proposals that were wrong."""
        own, ids = answer.drafting, answer.text.ids
        if own.text is None:
            own.text = self._reader.open(ids, _plan(proposer, answer), answer.text.reach)
        text = own.text
        agreed = len(commonprefix([text.ids[: text.read], ids]))
        if agreed < text.read:
            self._reader.slots.rollback(text.rows, [agreed])
            text.read = agreed
        text.ids = list(ids)
        if proposer != BASE and len(answer.text.rows) == 1:
            text.plan = answer.text.plan  # which may have been weighed again
        return text

    @contextmanager
    def _model(self, proposer: str) -> Iterator[None]:
        if not proposer.startswith("blocks:"):
            yield
            return
        with first_blocks(self._reader.backbone, _blocks(proposer)):
            yield


def _blocks(proposer: str) -> int:
    return int(proposer.removeprefix("blocks:"))


def _plan(proposer: str, answer: Answer) -> RequestRows:
    """Return the one row that proposes for an answer."""
    plan, experts = answer.text.plan, answer.request.routing.experts
    if proposer == BASE:
        return RequestRows(torch.tensor([[float(name == BASE) for name in experts]]), torch.ones(1))
    return plan if len(plan.votes) == 1 else RequestRows((plan.votes @ plan.weights)[None], torch.ones(1))


@contextmanager
def first_blocks(backbone: Backbone, count: int) -> Iterator[None]:
    """Context manager: let the model end behind its first blocks; what follows the blocks stays."""
    last, *others = list(backbone.blocks)[count - 1 :]
    forward, given = last.forward, [None]

    def run(*inputs: Any, **options: Any) -> Any:  # noqa: ANN401 - a block's own
        given[0] = forward(*inputs, **options)
        return given[0]

    with swapped({last: run, **dict.fromkeys(others, lambda *inputs, **options: given[0])}):
        yield
