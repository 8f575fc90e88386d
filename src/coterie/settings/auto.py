"""Settings of `coterie fit auto` and `coterie fit kshot-auto`, which choose by evidence."""

from pydantic import Field

from coterie.settings.commands import ElreaSettings, KshotSettings
from coterie.settings.groups import (
    JUDGE_FOLDS,
    Diversity,
    ExpertSettings,
    JudgeFolds,
    RankBy,
    SelectAdaptersSettings,
    TrainingSettings,
)


class AutoTrainingSettings(TrainingSettings):
    """Training of the base adapter.

    At these rates a small model learns from a few hundred rows, which the papers' rates for 2B models hardly move.
    Eight rows of 190 tokens in one forward pass took 6.2 GiB with a model of 135M; two take 2.7, in no more CPU time.
    """

    learning_rate: float = Field(5e-4, gt=0, description="its peak learning rate, decaying linearly to 0")
    batch_size: int = Field(8, ge=1, description="examples per optimiser step")
    micro_batch_size: int = Field(
        2, ge=1, description="examples per forward pass, at most: memory grows with them; more are faster on a GPU"
    )


class AutoExpertSettings(ExpertSettings):
    """Training of the clusters' experts, continued from the base adapter."""

    expert_epochs: int = Field(1, ge=1, description="epochs of every cluster's expert")
    expert_learning_rate: float = Field(2e-4, gt=0, description="peak learning rate of the experts")


class AutoSettings(ElreaSettings):
    """`coterie fit auto`: experts from one data set, and what to do with them, chosen by evidence."""

    command = "fit auto"
    judge_folds: JudgeFolds = JUDGE_FOLDS
    unlike: str | None = Field(
        None, description="rows unlike the training data, by which the mixture learns to refuse; default: 56 of ours"
    )
    caution: float = Field(
        0.1, ge=0, le=1, description="share of rows like its own that is left to the base adapter as unfamiliar"
    )
    budget: int | None = Field(
        None, ge=1, description="tokens to train on, at most, the copies that judge included; fewer rows are used then"
    )
    training: AutoTrainingSettings = AutoTrainingSettings()
    experts: AutoExpertSettings = AutoExpertSettings()

    @property
    def passes(self) -> int:
        """How often a row is trained on: by the base adapter and an expert, and by their copies of all other folds."""
        return (self.training.epochs + self.experts.expert_epochs) * self.judge_folds

    @property
    def least_rows(self) -> int:
        """How many rows there have to be for every cluster to have one in every fold."""
        return self.clustering.clusters * self.judge_folds


class SelectByLossSettings(SelectAdaptersSettings):
    """Selecting adapters by the shots: those that predict them best."""

    rank_by: RankBy = "perplexity"
    diversity: Diversity = "none"


class KshotAutoSettings(KshotSettings):
    """`coterie fit kshot-auto`: from a few examples and a bank to what the examples themselves show to be good.

    Adapters are ranked by their loss on the examples, which needs no answers: it takes a part of the time, works where
    answers cannot be checked, and chose better on two of six tasks and worse on one (docs/evidence.md).
    """

    command = "fit kshot-auto"
    judge_folds: JudgeFolds = JUDGE_FOLDS
    adapters: SelectByLossSettings = SelectByLossSettings()
