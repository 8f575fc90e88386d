"""A task of which a few examples are known, and the bank of adapters that could serve it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.artifacts import JsonCache, RunFolder
from coterie.backbone.loading import Backbone, BaseModelIdentity, check_identity, load_backbone
from coterie.data.batching import PromptFormat
from coterie.data.examples import Example, load_all
from coterie.experts.bank_folder import BankFolder, open_bank
from coterie.methods.common import backbone_key, hash_examples, load_questions
from coterie.settings.commands import KshotSettings, SelectSettings
from coterie.settings.groups import ModelSettings
from coterie.settings.reading import values_of

NOT_OF_SCORES = ("keep", "candidates", "perplexity_of", "diversity", "halving", "exclude_leaks", "group_size")
"""Settings of choosing that are about what follows from scores, or which of them are made together."""


@dataclass(frozen=True)
class KshotTask:
    """What is known of a task, and what may serve it.

    Attributes:
        bank: adapters to choose from.
        backbone: their base model.
        prompts: renders questions.
        shots: verified examples.
        excluded: rows that must not be known to any adapter, such as a test set.
    """

    bank: BankFolder
    backbone: Backbone
    prompts: PromptFormat
    shots: list[Example]
    excluded: list[Example]

    def inputs(self) -> dict[str, str]:
        """Hash all of it, by name."""
        adapters = {f"adapter {card.name}": card.sha256 for card in self.bank.cards}
        data = {"shots": hash_examples(self.shots), "exclude": hash_examples(self.excluded)}
        return {"base_model": self.backbone.identity.sha256, **data, **adapters}


def open_task(
    bank: str, settings: SelectSettings | KshotSettings, system_prompt: str | None, backbone: Backbone | None = None
) -> KshotTask:
    """Load a task's examples, and open a bank for it; the base model may be loaded already.

    Raises:
        CoterieError: for bad data, a broken bank, or a base model that cannot be had or is another one by now.
    """
    excluded = load_questions(settings.adapters.exclude, reading=settings.reading.shared)
    examples = load_all(settings.shots, settings.limit, settings.reading)
    opened = open_bank(Path(bank))
    wanted = BaseModelIdentity(**opened.base_model)
    if backbone is None:
        placement = settings.placement.model_dump()
        backbone = load_backbone(ModelSettings(model=wanted.id, revision=wanted.revision, **placement))
    check_identity(wanted, backbone.identity, f"{bank} is a bank for")
    prompts = PromptFormat(backbone.tokenizer, system_prompt, settings.reading)
    return KshotTask(opened, backbone, prompts, examples, excluded)


def choosing_values(
    settings: SelectSettings | KshotSettings, system_prompt: str | None, task: KshotTask
) -> dict[str, Any]:
    """Return what decides which adapters are chosen, beside the bank and the examples."""
    how = {**values_of(settings.adapters, ("exclude",)), **values_of(settings.rationale), **values_of(settings.reading)}
    return {**how, "system_prompt": system_prompt, **backbone_key(task.backbone)}


def scores_cache(run: RunFolder, how: Mapping[str, Any]) -> JsonCache:
    """Return what keeps scores on shots; how adapters are chosen by them does not matter to these."""
    made_from = {name: value for name, value in how.items() if name not in NOT_OF_SCORES}
    return run.cache(made_from, inputs=("base_model", "shots"))
