"""How a mixture for a task of a few shots came about: `selection.json`, `gather.json` and `gates.json`."""

from math import fsum
from typing import Any

from pydantic import StrictBool, StrictStr, model_validator

from coterie.records.schema import Count, Counts, Facts, Names, Number, Position, Rank, Record, Weight


class AdapterRecord(Record):
    """One adapter of a bank, as it did on a task's shots.

    Numbers are None where it was left out before they were measured. `similarity` is to the chosen group, on average.
    `leak` counts the shots and excluded rows among its `known_rows` of training data; `dropped` tells why it was left
    out before all shots were scored, `why` in words why it is in or out.
    """

    name: StrictStr
    accuracy: Number
    perplexity: Number
    rank_accuracy: Rank
    rank_perplexity: Rank
    rank_sum: Rank
    similarity: Number
    nll: Number
    candidate: StrictBool = False
    chosen: StrictBool = False
    leak: Count = 0
    known_rows: Count | None = None
    dropped: StrictStr | None = None
    why: StrictStr | None = None


class ShotRecord(Record):
    """An adapter on a shot: whether its answer is right, where that can be told, and the rationale's NLL per token."""

    adapter: StrictStr
    shot: StrictStr
    correct: StrictBool | None
    nll: Position
    tokens: Count


class GatheredRecord(Record):
    """A gathered row: the shot that it is nearest to."""

    nearest_shot: StrictStr


class GroupRecord(Record):
    """Candidates as a group: the best group has the smallest score, the sum of its two ranks."""

    names: Names
    rank_sum: Rank
    similarity: Number
    rank_diversity: Rank
    score: Rank


class HalvingRound(Record):
    """One round of successive halving: adapters scored on so many shots, and how many were kept.

    `tau` tells how well the round's order foresaw the final one.
    """

    shots: Count
    scored: Count
    kept: Count
    tau: Number = None


class SelectionRecord(Record):
    """How experts were chosen from a bank: all adapters, best first, and the best groups (`subsets`), best first."""

    settings: Facts = {}
    shots: Count
    chosen: Names
    adapters: tuple[AdapterRecord, ...]
    subsets: tuple[GroupRecord, ...] = ()
    halving: tuple[HalvingRound, ...] = ()

    @property
    def first(self) -> str:
        """The adapter that ranks first."""
        return self.adapters[0].name


class PoolSource(Record):
    """One source of a pool: its rows, and how many of them were chosen."""

    pool: StrictStr
    rows: Count
    chosen: Count


class ShotServed(Record):
    """A shot, and the number of chosen rows that are nearest to it."""

    id: StrictStr
    nearest_of_chosen: Count


class Quantiles(Record):
    """Similarity to the shots, of all compared rows and of the chosen ones, at evenly spaced levels."""

    levels: tuple[Number, ...] = ()
    compared: tuple[Number, ...] = ()
    chosen: tuple[Number, ...] = ()


class PoolPoint(Record):
    """A shot or a pool row on the map of a pool, what became of it, and how its text begins."""

    x: Position
    y: Position
    fate: StrictStr
    similarity: Number = None
    label: StrictStr = ""


class GatheringRecord(Record, extra="allow"):
    """What was chosen from a pool of open data: rows by what became of them, by source, and a map of some.

    The settings stand beside these fields.
    """

    rows: Count
    fates: Counts = {}
    pools: tuple[PoolSource, ...] = ()
    shots: tuple[ShotServed, ...] = ()
    excluded_rows: Count = 0
    similarity_quantiles: Quantiles = Quantiles()
    map: tuple[PoolPoint, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What stands beside the fields as a plain text or number."""
        return {key: value for key, value in (self.model_extra or {}).items() if isinstance(value, str | int | float)}


class GateLoad(Record):
    """The load of the experts, and its entropy in nats."""

    load: tuple[Weight, ...]
    entropy: Number = None

    @property
    def shares(self) -> tuple[float, ...]:
        """The load as shares of 1."""
        total = fsum(self.load)
        return tuple(value / total for value in self.load)


class LayerLoad(GateLoad):
    """The load of the gate of one linear layer, named by its `path` in the model."""

    path: StrictStr


class StepLoad(GateLoad):
    """The mean load of all gates at one step of training."""

    step: Count


class GateLoads(GateLoad):
    """The load of token-wise gates: over all, layer by layer, and over the steps of training.

    `top_k` experts take part at every token; null where all do.
    """

    experts: Names
    top_k: Count | None = None
    layers: tuple[LayerLoad, ...] = ()
    steps: tuple[StepLoad, ...] = ()

    @model_validator(mode="after")
    def _check_loads(self) -> "GateLoads":
        if not self.experts:
            raise ValueError("'experts' should be a list of names, got none")
        lines = [("", self), *((f"'layers' {n}, ", own) for n, own in enumerate(self.layers, start=1))]
        lines += [(f"'steps' {n}, ", own) for n, own in enumerate(self.steps, start=1)]
        for place, line in lines:
            if len(line.load) != len(self.experts) or not any(line.load):
                raise ValueError(f"{place}'load' should be {len(self.experts)} numbers that are not all 0")
        return self

    @property
    def active(self) -> int:
        """How many experts take part at a token."""
        return min(self.top_k or len(self.experts), len(self.experts))
