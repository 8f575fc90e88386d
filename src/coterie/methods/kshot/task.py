"""A task of which a few examples are known, and the bank of adapters that could serve it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.backbone.loading import Backbone, check_identity, identity_from, load_backbone
from coterie.data.batching import PromptFormat, TokenRow, tokenise
from coterie.data.examples import Example, load_all, load_examples
from coterie.experts.bank_folder import BankFolder, open_bank
from coterie.methods.common import hash_examples
from coterie.settings.groups import ModelSettings, PlacementSettings


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

    def rows(self, examples: Sequence[Example], max_length: int) -> list[TokenRow]:
        """Tokenise training rows.

        Raises:
            CoterieError: when none is short enough.
        """
        return tokenise(self.prompts, examples, max_length).rows


def open_task(
    bank: str,
    shots: Sequence[str],
    exclude: Sequence[str],
    limit: int | None,
    placement: PlacementSettings,
    system_prompt: str | None,
    backbone: Backbone | None = None,
) -> KshotTask:
    """Load a task's examples, and open a bank for it.

    Args:
        bank: its folder.
        shots: sources of the examples.
        exclude: sources of rows that must not be known.
        limit: most examples of every source.
        placement: how the base model is held in memory.
        system_prompt: of every prompt; None for the template's own.
        backbone: the base model, if it is loaded already.

    Raises:
        CoterieError: for bad data, a broken bank, or a base model that cannot be had or is another one by now.
    """
    excluded = [row for source in exclude for row in load_examples(source, need_response=False)]
    examples = load_all(shots, limit)
    opened = open_bank(Path(bank))
    wanted = identity_from(opened.base_model)
    if backbone is None:
        backbone = load_backbone(ModelSettings(model=wanted.id, revision=wanted.revision, **placement.model_dump()))
    check_identity(wanted, backbone.identity, bank)
    return KshotTask(opened, backbone, PromptFormat(backbone.tokenizer, system_prompt), examples, excluded)
