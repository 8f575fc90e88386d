"""What a run of `coterie fit elrea` was made from, so that more can be trained on the same rows in the same way."""

import random
import re
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from coterie.data.batching import Tokenised, tokenise
from coterie.data.examples import spool_all
from coterie.data.spooled import Chosen
from coterie.errors import CoterieError
from coterie.features.gradient import read_features
from coterie.methods.common import IN_MEMORY, hash_examples
from coterie.methods.extras import FittedRun, load_extra, read_losses
from coterie.records.mixture import TrainingRow
from coterie.records.schema import read_rows
from coterie.routers.centroid import CentroidRouter
from coterie.routers.loss import CrossFitLosses
from coterie.settings.auto import AutoSettings
from coterie.settings.commands import ElreaSettings


@dataclass(frozen=True)
class ElreaRun(FittedRun[ElreaSettings]):
    """A run of `coterie fit elrea`, opened for further training."""

    made_by = ElreaSettings
    also_made_by = (AutoSettings,)
    given: Tokenised | None = None
    """The training rows, where they are at hand already."""

    @cached_property
    def kept(self) -> Tokenised:
        """The training rows, as they were tokenised for the run.

        Raises:
            CoterieError: when the data is not there any more, or is another one.
        """
        if self.given is not None:
            return self.given
        if IN_MEMORY in self.settings.data:
            raise CoterieError(
                f"{self.folder} was fitted on rows in memory, so nothing more can be trained on them; "
                "write them to a JSONL file and fit from that"
            )
        examples = spool_all(self.settings.data, self.settings.limit, self.settings.reading)
        if hash_examples(examples) != self.inputs.get("data"):
            raise CoterieError(
                f"{', '.join(self.settings.data)} is not what {self.folder} was fitted on; "
                "restore the file, or fit again"
            )
        kept = tokenise(
            self.mixture.prompts, examples, self.settings.training.max_length, self.mixture.backbone.positions
        )
        return within_budget(kept, self.settings)

    @cached_property
    def router(self) -> CentroidRouter:
        """ELREA's own router, also where evidence chose another one for the mixture."""
        router = self.mixture.named_router("gradient-centroids")
        assert isinstance(router, CentroidRouter)
        return router

    @property
    def losses(self) -> CrossFitLosses:
        """The experts' losses on the training rows, by copies that were not trained on them.

        Raises:
            CoterieError: when the experts were not judged yet, or the files are broken.
        """
        return read_losses(load_extra(self.mixture, "judged"))

    @cached_property
    def row_count(self) -> int:
        """The number of training rows, without reading them."""
        return len(self._rows_of_clusters)

    @cached_property
    def _rows_of_clusters(self) -> tuple[TrainingRow, ...]:
        return read_rows(TrainingRow, self.folder / "clusters.jsonl", "get the folder again, or fit again")

    @cached_property
    def labels(self) -> list[int]:
        """The cluster of every training row."""
        numbers = [row.cluster.rpartition("-")[2] for row in self._rows_of_clusters]
        if len(numbers) != len(self.kept.rows) or not all(re.fullmatch("[0-9]{1,6}", number) for number in numbers):
            raise CoterieError(
                f"{self.folder / 'clusters.jsonl'} does not name a cluster for each of the {len(self.kept.rows)} "
                "training rows; get the folder again, or fit again"
            )
        return [int(number) for number in numbers]

    @cached_property
    def sources(self) -> list[str | None]:
        """The data set that every training row comes from."""
        return [row.source for row in self.kept.rows]

    @cached_property
    def features(self) -> Tensor:
        """The training rows' un-normalised gradient features, (row, d_proj).

        Raises:
            CoterieError: when the run's folder lacks them.
        """
        return read_features(self.folder / "features", len(self.kept.rows), "fit again")


def within_budget(kept: Tokenised, settings: ElreaSettings) -> Tokenised:
    """Keep as many rows, drawn by the seed, as can be trained on within the budget of a run that chooses by evidence.

    Raises:
        CoterieError: when it does not do for as many rows as are judged at the least.
    """
    if not isinstance(settings, AutoSettings) or settings.budget is None:
        return kept
    order = list(range(len(kept.rows)))
    random.Random(settings.seed).shuffle(order)
    left, chosen = settings.budget, []
    for number in order:
        left -= settings.passes * len(kept.rows[number].ids)
        if left < 0:
            break
        chosen.append(number)
    if len(chosen) < settings.least_rows <= len(kept.rows):
        tokens = settings.passes * sum(sorted(len(row.ids) for row in kept.rows)[-settings.least_rows :])
        raise CoterieError(
            f"--budget {settings.budget} does for {len(chosen)} rows, and {settings.clustering.clusters} clusters "
            f"judged in {settings.judge_folds} folds need {settings.least_rows}; give --budget {tokens}, or lower "
            "--clusters or --judge-folds"
        )
    chosen.sort()
    return Tokenised(Chosen(kept.examples, chosen), Chosen(kept.rows, chosen), kept.dropped)
