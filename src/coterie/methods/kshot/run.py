"""What a run of `coterie fit kshot-moe` was made from, so that its rivals can be made of the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from coterie.data.batching import TokenRow, tokenise
from coterie.data.examples import Example, load_examples
from coterie.errors import CoterieError
from coterie.methods.extras import FittedRun
from coterie.methods.kshot.choose_adapters import SELECTION_FILE, read_selection
from coterie.methods.kshot.fit import AND_GATHERED, AUTO, GATHERED, METHOD, SELECTION, SHOTS_ALONE
from coterie.methods.kshot.gather_rows import GATHERED_FILE, SUMMARY_FILE
from coterie.methods.kshot.task import KshotTask, open_task
from coterie.methods.kshot.train import GATES_FILE
from coterie.records.choice import AUTO_FILE
from coterie.records.schema import Record, read
from coterie.records.task import GateLoads, GatheringRecord, SelectionRecord
from coterie.records.task_choice import TaskChoiceRecord
from coterie.settings.auto import KshotAutoSettings
from coterie.settings.commands import KshotSettings

AGAIN = f"make the mixture again with coterie fit {METHOD}"


@dataclass(frozen=True)
class KshotRun(FittedRun[KshotSettings]):
    """A run of `coterie fit kshot-moe`, opened for further training."""

    made_by = KshotSettings
    also_made_by = (KshotAutoSettings,)

    @cached_property
    def task(self) -> KshotTask:
        """The task and its bank, as they were.

        Raises:
            CoterieError: when one of them is gone, or has changed.
        """
        settings = self.settings
        task = open_task(settings.bank, settings, settings.training.system_prompt, self.mixture.backbone)
        changed = [name for name, value in task.inputs().items() if self.inputs.get(name) != value]
        if changed:
            raise CoterieError(
                f"{changed[0]} is not what {self.folder} was fitted on any more; restore it, or fit again"
            )
        return task

    @cached_property
    def gathered(self) -> list[Example]:
        """The open data that was gathered for the run, to be trained on beside the shots."""
        file = self.folder / GATHERED / GATHERED_FILE
        return load_examples(file) if file.exists() else []

    @cached_property
    def trained_on(self) -> list[Example] | None:
        """The open data that the run's own mixture was trained on beside the shots; None where it was not trained."""
        if self.mixture.method != AUTO:
            return self.gathered
        chosen = read(
            TaskChoiceRecord, self.folder / AUTO_FILE, f"make the mixture again with coterie fit {AUTO}"
        ).chosen
        return {AND_GATHERED: self.gathered, SHOTS_ALONE: []}.get(chosen)

    @cached_property
    def pools(self) -> list[str]:
        """The sources of open data that those rows were gathered from."""
        file = self.folder / GATHERED / SUMMARY_FILE
        return [source.pool for source in read(GatheringRecord, file, AGAIN).pools] if file.exists() else []

    def tokenised(self, added: list[Example]) -> Sequence[TokenRow]:
        """Tokenise the shots and other rows beside them, in the run's order."""
        task, longest = self.task, self.settings.training.max_length
        return tokenise(task.prompts, [*task.shots, *added], longest, task.backbone.positions).rows

    @cached_property
    def selection(self) -> SelectionRecord:
        """Which experts were chosen, and why."""
        return read_selection(self.folder / SELECTION)


def task_records(folder: Path | None) -> dict[str, Any]:
    """Read how a task's mixture came about, where its folder tells: the choice, the gathered rows, the gates."""
    if folder is None:
        return {}
    records: dict[str, tuple[Path, type[Record]]] = {
        "selection": (folder / SELECTION / SELECTION_FILE, SelectionRecord),
        "gathering": (folder / GATHERED / SUMMARY_FILE, GatheringRecord),
        "gates": (folder / GATES_FILE, GateLoads),
    }
    return {name: read(kind, file, AGAIN) for name, (file, kind) in records.items() if file.exists()}
