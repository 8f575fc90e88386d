"""What an evaluation leaves behind: `evaluation.json`, the summary, and `rows.jsonl`, one object for every test row."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import fsum
from typing import Annotated

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from coterie.artifacts import FORMAT
from coterie.records.auto import AutoRecord
from coterie.records.recruits import OutcomeRecord, Profile
from coterie.records.schema import (
    Amounts,
    Count,
    Counts,
    Facts,
    Grid,
    Interval,
    KnownAmounts,
    Names,
    Number,
    Position,
    Rank,
    Record,
    Texts,
    Weight,
)
from coterie.records.task import GateLoads, GatheringRecord, SelectionRecord
from coterie.records.task_choice import TaskChoiceRecord

OVERALL = "all"  # the source name of a table row that averages over all sources
MEASURES, LEVEL = ("accuracy", "nll"), 0.05  # an adjusted p below the level counts as significant
_ROUNDING = 0.02  # how far the recorded weights of a token may be from a sum of 1


@dataclass(frozen=True)
class Difference:
    """A method's paired difference to the control and its 95% interval, both in the measure's own unit.

    `p` is adjusted for the number of comparisons (Holm's method).
    """

    value: float
    interval: tuple[float, float] | None
    p: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    @property
    def significant(self) -> bool:
        """Whether the adjusted p is known and small."""
        return self.p is not None and self.p < LEVEL

    @property
    def sure(self) -> bool:
        """Whether chance would hardly explain it: by its p, or by its interval where no p is known."""
        return self.clear if self.p is None else self.significant


class TableRow(Record):
    """One method on one source, or on all rows: accuracy and F1 as shares of 1, NLL in nats a token.

    Differences are to the control. `accuracy_p` is McNemar's exact p-value and `nll_p` that of the paired sign-flip
    test, each adjusted by Holm over the methods compared on this source. `oracle_share` is the share of the oracle's
    gain in NLL over the base that the method captures; it can be negative or above 1. `rows_to_see_5_points` is how
    many rows would show a difference of 5 points in accuracy, `cut` how many answers the limit of tokens broke off.
    """

    method: StrictStr
    source: StrictStr
    control: StrictStr = ""
    rows: Count
    graded: Count
    accuracy: Number = None
    accuracy_difference: Number = None
    accuracy_interval: Interval | None = None
    accuracy_p: Number = None
    rows_to_see_5_points: Count | None = None
    cut: Count = 0
    f1: Number = None
    nll: Number = None
    nll_difference: Number = None
    nll_interval: Interval | None = None
    nll_p: Number = None
    oracle_share: Number = None
    oracle_share_interval: Interval | None = None

    def value(self, measure: str) -> float | None:
        """Return the accuracy or the NLL."""
        return self.accuracy if measure == "accuracy" else self.nll

    def difference(self, measure: str) -> Difference | None:
        """Return the difference to the control in accuracy or NLL."""
        value, ends, p = (getattr(self, f"{measure}_{field}") for field in ("difference", "interval", "p"))
        return None if value is None else Difference(value, ends, p)


class Trace(Record):
    """The routing of one answer, token by token.

    Attributes:
        experts: names.
        pieces: the text that became certain with every token.
        weights: normalised, of every expert at every token: those that the token was chosen with.
    """

    experts: Texts
    pieces: Texts
    weights: tuple[tuple[Weight, ...], ...]

    @model_validator(mode="after")
    def _check_that_all_fits(self) -> "Trace":
        if not self.experts or len({*self.experts}) < len(self.experts):
            raise ValueError("'experts' should be a list of names, each once")
        if len(self.weights) != len(self.pieces):
            raise ValueError(f"'weights' should be a row for each of {len(self.pieces)} 'pieces'")
        if any(len(row) != len(self.experts) or abs(fsum(row) - 1) > _ROUNDING for row in self.weights):
            raise ValueError(f"'weights' should be rows of {len(self.experts)} numbers that sum to 1")
        return self

    @cached_property
    def leaders(self) -> tuple[str, ...]:
        """The expert with the largest weight at every token; among equals the first."""
        return tuple(self.experts[row.index(max(row))] for row in self.weights)

    @property
    def switches(self) -> int:
        """How often the leading expert changes from one token to the next."""
        return sum(one != other for one, other in pairwise(self.leaders))


class MethodResult(Record):
    """What one method wrote for one row, how it was graded, and its NLL on the reference in nats a token.

    `correct` is None where it was not graded, `text` where nothing was written; `tokens` of the reference were scored.
    """

    text: StrictStr | None = None
    correct: StrictBool | None = None
    extracted: StrictStr | None = None
    f1: Number = None
    nll: Number = None
    tokens: Count = 0
    finish_reason: StrictStr | None = None
    trace: Trace | None = None

    @property
    def cut(self) -> bool:
        """Whether the answer was cut off at the limit."""
        return self.finish_reason == "length"


class RowRecord(Record):
    """One test row with every method's result.

    `weights` are those of the mixture's own method, `expert_nll` the NLL of its experts, each alone. Where experts are
    recruited by `skills`, `recruited` tells how the first method's answer came about, and `outcomes` those of others.
    """

    id: StrictStr = ""
    source: StrictStr = ""
    category: StrictStr | None = None
    prompt: StrictStr
    reference: StrictStr | None = None
    answer: StrictStr | None = None
    skills: Texts = ()
    expert_nll: KnownAmounts = {}
    methods: dict[StrictStr, MethodResult] = {}
    weights: Amounts = {}
    recruited: OutcomeRecord | None = None
    outcomes: dict[StrictStr, OutcomeRecord] = {}


class SharedSeconds(Record):
    """What one stage took for several methods at once, so that none of them has a time of its own there."""

    stage: StrictStr
    methods: Names
    seconds: Weight


class MapPoint(Record):
    """One training row on the map, with its cluster's label under every seed."""

    x: Position
    y: Position
    source: StrictStr = ""
    category: StrictStr | None = None
    clusters: tuple[StrictInt | StrictStr, ...]


class FeatureMap(Record):
    """The training rows' features drawn on a plane and clustered with several seeds.

    `stability` is the mean adjusted Rand index over pairs of seeds, `agreement` the index of clusters and sources for
    every seed.
    """

    kind: StrictStr
    points: tuple[MapPoint, ...]
    seeds: tuple[StrictInt | StrictStr, ...]
    stability: Number = None
    agreement: tuple[Number, ...] = ()

    @model_validator(mode="after")
    def _check_labels(self) -> "FeatureMap":
        for number, point in enumerate(self.points, start=1):
            if len(point.clusters) != len(self.seeds):
                raise ValueError(f"'points' {number}, 'clusters' should be a label for each of {len(self.seeds)} seeds")
        return self


class Clustering(Record, extra="allow"):
    """How the training rows were clustered: the settings, and how far the clusters agree with the sources."""

    adjusted_rand_index: Number = None


class EvaluationRecord(Record):
    """The summary of an evaluation; names keep the order of the records.

    `control` is the strongest on these rows of `control_among`, where there are any, `routed` the mixture's own method.
    By method: `seconds` a stage, mean `answer_tokens`, `memory` in bytes, relative Frobenius `merge_error`, `costs` a
    question, `unfamiliar_routing`: mean weights. `composition` has rows of clusters by "source / category", `choice` is
    that of `fit auto`; `selection`, `gathering`, `gates` are of few-shot mixtures, `profile` and all below of recruits.
    """

    format: Annotated[int, Field(strict=True, ge=FORMAT, le=FORMAT)]
    mixture: StrictStr
    base_model: Facts = {}
    control: StrictStr
    control_among: Names = ()
    routed: StrictStr | None = None
    methods: Names
    experts: Names
    rows: Count
    sources: Names
    settings: Facts = {}
    features: Facts = {}
    hardware: Facts = {}
    table: tuple[TableRow, ...]
    routing: Grid = {}
    routing_by_category: Grid = {}
    unfamiliar_routing: Grid = {}
    seconds: Grid = {}
    shared_seconds: tuple[SharedSeconds, ...] = ()
    answer_tokens: KnownAmounts = {}
    memory: Counts = {}
    merge_error: KnownAmounts = {}
    choice: AutoRecord | TaskChoiceRecord | None = None
    notes: Texts = ()
    clusters: dict[str, Counts] = {}
    composition: dict[str, Counts] = {}
    clustering: Clustering = Clustering()
    selection: SelectionRecord | None = None
    gathering: GatheringRecord | None = None
    gates: GateLoads | None = None
    map: FeatureMap | None = None
    profile: Profile | None = None
    aggregator: StrictStr | None = None
    recruits: Counts = {}
    costs: Grid = {}
    loads: Counts = {}
    peak_bytes: Rank = None
    data: StrictStr = ""

    @model_validator(mode="after")
    def _check_names(self) -> "EvaluationRecord":
        for name, place in [(self.control, "as control"), *((row.method, "in 'table'") for row in self.table)]:
            if name not in self.methods:
                raise ValueError(f"names {name!r} {place}, but not in 'methods'")
        return self

    @property
    def subject(self) -> str | None:
        """The method that the mixture stands for: as recorded, by its folder's name, or the only one there is."""
        others = [name for name in self.methods if name != self.control]
        folder_name = self.mixture.rstrip("/").rpartition("/")[2]
        only = others[0] if len(others) == 1 else None
        return next((name for name in (self.routed, folder_name, only) if name in others), None)

    def score(self, method: str, source: str = OVERALL) -> TableRow | None:
        """Find a table row; None where the records have none."""
        return next((row for row in self.table if (row.method, row.source) == (method, source)), None)

    def scores(self, source: str = OVERALL) -> list[TableRow]:
        """List the table's rows of a source, in the order of the methods."""
        return [score for method in self.methods if (score := self.score(method, source))]
