"""`coterie fit kshot-auto`: a few examples and a bank to what the examples themselves show to be good for the task.

Published k-shot expertise always gathers open data and always trains. Here every way is judged on shots that had no
part in it (`methods/kshot/judge.py`): one adapter as it is, unless something is significantly better.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coterie import ranks
from coterie.artifacts import RunFolder, as_path, run_folder, write_json, write_text
from coterie.combiners.layers import LayerCombiner
from coterie.errors import CoterieError
from coterie.evaluation.choice import Candidate, chance, choose
from coterie.experts.bank import load_bank
from coterie.experts.names import BACKBONE, NULL
from coterie.experts.plain_adapter import write_null_adapter
from coterie.methods.common import copy_expert, named_sources
from coterie.methods.kshot.fit import (
    AND_GATHERED,
    AUTO,
    METHOD,
    SELECTION,
    SHOTS_ALONE,
    Given,
    Prepared,
    choose_and_gather,
    prepare,
    trained_mixture,
    work_of,
)
from coterie.methods.kshot.judge import FIRST, ONE, UNIFORM, Judged, ScoredShots, gathered_near, judge, untrained
from coterie.methods.kshot.task import KshotTask
from coterie.methods.kshot.train import gate_options
from coterie.mixture import Mixture
from coterie.progress import part, whole
from coterie.records.choice import AUTO_FILE, PAGE_FILE
from coterie.records.evaluation import LEVEL
from coterie.records.task_choice import TaskChoiceRecord
from coterie.settings.auto import KshotAutoSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import from_flat

logger = logging.getLogger(__name__)

LEAST_SHOTS = 1 + math.ceil(-math.log2(LEVEL))
"""Of fewer not even a difference that all of them agree on is significant: its p by sign flips is 2 ** (1 - shots)."""


def kshot_auto(bank: str | Path, shots: str | Sequence[str], *, output: str | Path, **settings: Any) -> Mixture:  # noqa: ANN401
    """Make a task's mixture from a few examples, a bank of adapters and open data, by what the examples show.

    Args:
        bank: folder of a bank, as `bank_add` makes it.
        shots: the task's examples: a JSONL file or `datasets` source, or several.
        output: folder to write the mixture to; its `auto.md` tells what was chosen and why.
        **settings: fields of `KshotAutoSettings` and its groups by their plain names, such as pool or judge_folds=2.

    Raises:
        CoterieError: for bad data or settings, a bank without enough adapters, or an output folder that exists.
    """
    flat = {"bank": str(bank), "shots": named_sources(shots)[0], "output": str(output), **settings}
    return fit_kshot_auto(from_flat(KshotAutoSettings, flat))


@takes_fields(KshotAutoSettings)
@ranks.joined()
def fit_kshot_auto(settings: KshotAutoSettings) -> Mixture:
    """Choose adapters and gather open data, judge what to do with them on left-out shots, and do that with all.

    An interrupted run goes on where it stopped and ends with the same files.

    Raises:
        CoterieError: for bad data, too few shots to judge by, a bank without enough adapters, or an output folder that
            exists.
    """
    output = as_path(settings.output)
    task, data, inputs = ranks.each(lambda: _prepare(settings))
    work = work_of(settings, task, data)
    work["judging"] = (settings.judge_folds - 1) * work["training"] * (2 if data or settings.gathered else 1)
    with run_folder(output, settings, inputs) as run, whole(settings.command, work):
        given = choose_and_gather(run, task, data, settings)
        scored = ScoredShots.read(run.path / SELECTION, task)
        with part("judging"):
            judged = judge(run, task, scored, settings)
        with part("training"):
            mixture, record = _made(run, task, given, scored, judged, settings)
        write_json(run.path / AUTO_FILE, record.plain())
        write_text(run.path / PAGE_FILE, record.page())
        mixture.write_description(run.path)
        logger.info("%s", " ".join(record.sentences))
    return replace(mixture, folder=output)


def _prepare(settings: KshotAutoSettings) -> Prepared:
    prepared = prepare(settings)
    shots, least = len(prepared.task.shots), max(LEAST_SHOTS, settings.judge_folds)
    if shots < least:
        raise CoterieError(
            f"{shots} examples are too few to tell what is good for the task, which takes {least} or more; give more, "
            f"or type coterie fit {METHOD}, which tries nothing"
        )
    if settings.selected:
        ScoredShots.read(as_path(settings.selected), prepared.task)
    if settings.gathered:
        gathered_near(as_path(settings.gathered))
    return prepared


def _made(
    run: RunFolder,
    task: KshotTask,
    given: Given,
    scored: ScoredShots,
    judged: Judged,
    settings: KshotAutoSettings,
) -> tuple[Mixture, TaskChoiceRecord]:
    """Choose by the losses, and make of all shots what was chosen."""
    every = range(len(task.shots))
    ways = untrained(scored.of_least_loss(every), scored.ranked(every)[0].name, given.chosen)
    active = {BACKBONE: 0, UNIFORM: len(given.chosen)}
    active |= dict.fromkeys((SHOTS_ALONE, AND_GATHERED), gate_options(settings, len(given.chosen))["top_k"])
    is_same = ways[FIRST].weights == ways[ONE].weights and torch.equal(judged.nll[FIRST], judged.nll[ONE])
    others = judged.nll.keys() - ({ONE, FIRST} if is_same else {ONE})
    order = [ONE, *(name for name in judged.nll if name in others)]
    candidates = [Candidate(name, float(active.get(name, 1)), judged.nll[name]) for name in order]
    choice = choose(candidates, judged.tokens)
    if (router := ways.get(choice.chosen)) is not None:
        names = [name for name in router.weights if name != NULL]
        folders = {name: copy_expert(run, name, task.bank.folder_of(name)) for name in names}
        if not names:
            folders[NULL] = run.stage(f"experts/{NULL}", lambda folder: write_null_adapter(task.backbone, folder), {})
        bank = load_bank(folders, task.backbone.model)
        mixture = Mixture(task.backbone, bank, router, LayerCombiner(), task.prompts, AUTO, run.path)
    else:
        added = given.gathered if choice.chosen == AND_GATHERED else []
        mixture = replace(trained_mixture(run, task, given.chosen, added, settings), method=AUTO)
    record = TaskChoiceRecord(
        chosen=choice.chosen,
        adapters=mixture.bank.names,
        shots=len(judged.tokens),
        folds=settings.judge_folds,
        candidates=choice.records(),
        expected=choice.own.gap.value,
        interval=choice.own.gap.ends,
        p=None if choice.chosen == ONE else chance(choice.own.candidate.nll, candidates[0].nll, judged.tokens),
    )
    return mixture, record
