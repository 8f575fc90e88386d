"""The batch scheduler: all questions first, then expert by expert, each loaded at most once.

Symbolic-MoE (Chen et al. 2025) recruits experts for every question and then inverts the plan: each expert is loaded
once and answers all of its questions. Here the adapters of one base model count as one load, models stay in memory as
long as they fit, and endpoints answer meanwhile.
"""

import gc
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from coterie.errors import CoterieError
from coterie.experts.answering import Answerer, ExpertGroup, Question, Reply, failed
from coterie.experts.reply_cache import ReplyCache
from coterie.progress import steps

GIB = 2**30


class _Unwritable(Exception):
    """A reply that could not be kept: no fault of the expert's."""


class ExpertScheduler(AbstractContextManager["ExpertScheduler"]):
    """Loads groups of experts within a memory budget, each at most once where it can, and batches their questions.

    Attributes:
        loads: how often every group was loaded.
        peak: most bytes that loaded groups took together, by their own estimates.
    """

    def __init__(
        self,
        groups: Sequence[ExpertGroup],
        identities: Mapping[str, str],
        cache: ReplyCache,
        budget: int | None = None,
        around: AbstractContextManager[object] | None = None,
    ) -> None:
        """Load nothing yet.

        Args:
            groups: who answers; every expert stands in one of them.
            identities: what stands for every expert's weights in the cache.
            cache: replies that are there already, and where new ones go.
            budget: bytes that loaded groups may take together; without one, one group is loaded at a time.
            around: is entered for as long as experts are asked, such as a cluster of workers.
        """
        self._around = around or nullcontext()
        self.cache = cache
        self.loads: Counter[str] = Counter()
        self.peak = 0
        self._groups = {expert: group for group in groups for expert in group.experts}
        self._identities = dict(identities)
        self._budget = budget
        self._held: dict[str, tuple[Answerer, int]] = {}
        self._remote: dict[str, Answerer] = {}
        self._later: set[str] = set()

    def __enter__(self) -> "ExpertScheduler":
        """Get ready to ask."""
        self._around.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Free everything."""
        for answerer in self._remote.values():
            answerer.close()
        for name in list(self._held):
            self._free(name)
        self._around.__exit__(*error)

    def ask(self, questions: Sequence[Question], last: Sequence[str] = ()) -> list[Reply]:
        """Get the replies to all questions, in their order; equal questions are asked once.

        An expert that fails costs its own replies: these have an `error`.

        Args:
            questions: all of them, whichever expert each goes to.
            last: experts whose group comes last, so that it is still loaded for what follows.

        Raises:
            CoterieError: when a model needs more memory than there may be, or replies cannot be written.
        """
        self._later = {self._groups[expert].name for expert in last}
        keys = [self.key(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if self.cache.get(key) is None}
        if missing:
            distinct = len(set(keys))
            with steps("answers", distinct, "answer", done=distinct - len(missing)) as told:
                errors = self._answer(missing, told)
        else:
            errors = {}
        found = [self.cache.get(key) or errors.get(key) for key in keys]
        return [reply or failed("no reply came") for reply in found]

    def knows(self, questions: Sequence[Question]) -> bool:
        """Tell whether the replies to all questions are there already."""
        return all(self.cache.get(self.key(question)) is not None for question in questions)

    def key(self, question: Question) -> str:
        """Hash all that the reply to a question depends on."""
        return question.key(self._identities[question.expert])

    def group(self, expert: str) -> ExpertGroup:
        """Return the group that an expert is loaded in."""
        return self._groups[expert]

    def fits_beside(self, expert: str, kept: Collection[str]) -> bool:
        """Tell whether an expert can be loaded while these groups stay; beside nothing, it is tried."""
        local = {group.name: group for group in self._groups.values() if not group.is_remote}
        own = self._groups[expert]
        others = {*kept} & local.keys() - {own.name}
        if own.is_remote or not others:
            return True
        sizes = [local[name].size for name in (own.name, *others)]
        return self._budget is not None and None not in sizes and sum(size or 0 for size in sizes) <= self._budget

    def loaded(self, expert: str, keep: Collection[str] = ()) -> Answerer:
        """Return an expert's answerer, loaded.

        Args:
            expert: its name.
            keep: groups that are freed last, since somebody asks them.

        Raises:
            CoterieError: when it cannot be loaded, or not within the memory.
        """
        group = self._groups[expert]
        if group.is_remote:  # takes no memory, and is held by the one thread that works for it
            if group.name not in self._remote:
                self._remote[group.name] = group.load()
            return self._remote[group.name]
        if group.name not in self._held:
            need = self._need(group)
            taken = need + sum(size for _, size in self._held.values())
            for name in sorted(self._held, key=lambda name: (name in keep, name in self._later)):  # the oldest first
                if self._budget is None or taken > self._budget:
                    taken -= self._held[name][1]
                    self._free(name)
            self.loads[group.name] += 1
            self._held[group.name] = (group.load(), need)
            self.peak = max(self.peak, taken)
        return self._held[group.name][0]

    def _answer(self, missing: Mapping[str, Question], told: Callable[..., None]) -> dict[str, Reply]:
        """Let every group answer its questions; return the replies of those that failed."""
        shares: dict[str, dict[str, Question]] = {}
        for key, question in missing.items():
            shares.setdefault(self._groups[question.expert].name, {})[key] = question
        errors: dict[str, Reply] = {}
        unwritable: list[Exception] = []
        groups = {group.name: group for group in self._groups.values() if group.name in shares}.values()
        local = [group for group in groups if not group.is_remote]
        needs = {group.name: self._need(group) for group in local}
        # What is loaded already comes first, then the largest; what is needed afterwards, at the end.
        local.sort(key=lambda group: (group.name in self._later, group.name not in self._held, -needs[group.name]))

        def answer_remotely(group: ExpertGroup) -> None:
            try:
                self._answer_group(group, shares[group.name], errors, told)
            except _Unwritable as error:  # told to the thread that waits
                unwritable.append(error)

        # Endpoints work in threads of their own, which end with the program if it is stopped.
        remote = [group for group in groups if group.is_remote]
        threads = [threading.Thread(target=answer_remotely, args=[group], daemon=True) for group in remote]
        for thread in threads:
            thread.start()
        try:
            for group in local:
                self._answer_group(group, shares[group.name], errors, told)
            for thread in threads:
                thread.join()
                if unwritable:
                    raise unwritable[0]
        except _Unwritable as error:
            assert error.__cause__ is not None
            raise error.__cause__ from None
        return errors

    def _answer_group(
        self, group: ExpertGroup, share: Mapping[str, Question], errors: dict[str, Reply], told: Callable[..., None]
    ) -> None:
        """Let one group answer its share; errors fail only the unanswered questions."""
        keys, questions = list(share), list(share.values())

        def done(number: int, reply: Reply) -> None:
            if reply.error is not None:
                errors[keys[number]] = reply
            try:
                self.cache.add(keys[number], reply)
            except Exception as error:
                raise _Unwritable from error
            told(1, questions[number].expert)

        try:
            self.loaded(questions[0].expert).answer(questions, done)
        except _Unwritable:
            raise
        except Exception as error:  # a model, a server or a library may raise anything; the others go on
            for key in keys:
                if self.cache.get(key) is None and key not in errors:
                    errors[key] = failed(error)

    def _need(self, group: ExpertGroup) -> int:
        """Return the bytes that a group takes, all there are where that is not known; refuse more than that."""
        need = group.size if group.size is not None else self._budget or 0
        if self._budget is not None and need > self._budget:
            raise CoterieError(
                f"{group.name} needs about {need / GIB:.2g} GiB, and there may be {self._budget / GIB:.2g}; "
                "raise --memory, or take a smaller --dtype or --batch-size"
            )
        return need

    def _free(self, name: str) -> None:
        answerer, _ = self._held.pop(name)
        answerer.close()
        del answerer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
