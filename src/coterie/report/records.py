"""The records of an evaluation as the page sees them; everything it shows comes from here."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

FORMAT = 1
OVERALL = "all"  # the source name of a table row that averages over all sources
MEASURES = ("accuracy", "nll")
LEVEL = 0.05  # an adjusted p below this counts as significant


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


@dataclass(frozen=True)
class Score:
    """One method on one source, or on all rows: accuracy and F1 as shares of 1, NLL in nats a token.

    `oracle_share` is the share of the way from the control to the oracle; it can be negative or above 1.
    """

    method: str
    source: str
    rows: int
    graded: int
    accuracy: float | None
    accuracy_difference: Difference | None
    nll: float | None
    nll_difference: Difference | None
    f1: float | None = None
    oracle_share: float | None = None
    oracle_interval: tuple[float, float] | None = None

    def value(self, measure: str) -> float | None:
        """Return the accuracy or the NLL."""
        return self.accuracy if measure == "accuracy" else self.nll

    def difference(self, measure: str) -> Difference | None:
        """Return the difference to the control in accuracy or NLL."""
        return self.accuracy_difference if measure == "accuracy" else self.nll_difference


@dataclass(frozen=True)
class Trace:
    """The routing of one answer, token by token: `pieces[t]` was written under `weights[t]`, one number per expert."""

    experts: tuple[str, ...]
    pieces: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]

    @cached_property
    def leaders(self) -> tuple[str, ...]:
        """The expert with the largest weight at every token; among equals the first."""
        return tuple(self.experts[row.index(max(row))] for row in self.weights)

    @property
    def switches(self) -> int:
        """How often the leading expert changes from one token to the next."""
        return sum(one != other for one, other in pairwise(self.leaders))


@dataclass(frozen=True)
class Answer:
    """What one method wrote for one row, and how it was graded (`correct` is None where it was not)."""

    method: str
    text: str | None
    correct: bool | None
    extracted: str | None
    nll: float | None
    cut: bool
    f1: float | None = None
    trace: Trace | None = None


@dataclass(frozen=True)
class Said:
    """What one recruited expert answered, and whether it was right; `error` tells why it gave no answer."""

    expert: str
    text: str
    correct: bool | None
    error: str | None


@dataclass(frozen=True)
class Recruiting:
    """Who was recruited for one row, by which skills, and how their answers became one; `cost` of it all."""

    skills: tuple[str, ...]
    said: tuple[Said, ...]
    aggregator: str
    synthesis: str | None
    cost: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """What experts showed on validation questions: right answers and trials, by expert and skill."""

    experts: tuple[str, ...]
    skills: tuple[str, ...]
    right: tuple[tuple[float, ...], ...]
    trials: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Row:
    """One test row with every method's answer."""

    identifier: str
    source: str
    prompt: str
    reference: str
    weights: dict[str, float]
    answers: tuple[Answer, ...]
    expert_nll: dict[str, float] = field(default_factory=dict)
    recruiting: Recruiting | None = None


@dataclass(frozen=True)
class Place:
    """One training row on the map, with its cluster's label under every seed."""

    x: float
    y: float
    source: str
    clusters: tuple[str, ...]


@dataclass(frozen=True)
class GradientMap:
    """The training rows' gradient features drawn on a plane and clustered with several seeds.

    `stability` is the mean adjusted Rand index over pairs of seeds, `agreement` the index of clusters and sources for
    every seed.
    """

    kind: str
    places: tuple[Place, ...]
    seeds: tuple[str, ...]
    stability: float | None
    agreement: tuple[float | None, ...]


@dataclass(frozen=True)
class Spread:
    """One method's mean and standard deviation over several seeds."""

    method: str
    seeds: int
    accuracy_mean: float | None
    accuracy_sd: float | None
    nll_mean: float | None
    nll_sd: float | None


@dataclass(frozen=True)
class Adapter:
    """One adapter of a bank, as it did on a task's shots.

    Numbers are None where it was left out before they were measured. `leak` counts the shots among its `known_rows` of
    training data; `dropped` tells why it was left out.
    """

    name: str
    accuracy: float | None
    perplexity: float | None
    rank_accuracy: float | None
    rank_perplexity: float | None
    rank_sum: float | None
    candidate: bool
    chosen: bool
    similarity: float | None  # to the chosen group, on average
    leak: int
    known_rows: int | None
    dropped: str | None


@dataclass(frozen=True)
class AdapterGroup:
    """Candidates as a group: the best group has the smallest score, the sum of its two ranks."""

    names: tuple[str, ...]
    rank_sum: float | None
    similarity: float | None
    rank_diversity: float | None
    score: float | None


@dataclass(frozen=True)
class Halving:
    """One round of successive halving: adapters scored on so many shots, and how many were kept."""

    shots: int
    scored: int
    kept: int
    tau: float | None


@dataclass(frozen=True)
class AdapterSelection:
    """How the experts were chosen from a bank; `groups` are the best ones, best first."""

    shots: int
    settings: dict[str, str]
    adapters: tuple[Adapter, ...]
    groups: tuple[AdapterGroup, ...]
    chosen: tuple[str, ...]
    halving: tuple[Halving, ...]


@dataclass(frozen=True)
class PoolPoint:
    """A shot or a pool row on the map of a pool, and what became of it."""

    x: float
    y: float
    fate: str
    similarity: float | None
    label: str


@dataclass(frozen=True)
class PoolPart:
    """One source of a pool: its rows, and how many of them were chosen."""

    name: str
    rows: int
    chosen: int


@dataclass(frozen=True)
class Gathering:
    """What was chosen from a pool of open data: how many rows met which fate, by source, and a map of some.

    `shots` counts for every shot the chosen rows that are nearest to it. `median` is the similarity to the shots in the
    middle of all compared rows and of the chosen ones.
    """

    rows: int
    settings: dict[str, str]
    fates: dict[str, float]
    pools: tuple[PoolPart, ...]
    shots: tuple[tuple[str, int], ...]
    median: tuple[float | None, float | None]
    points: tuple[PoolPoint, ...]


@dataclass(frozen=True)
class GateLoad:
    """How gates share their load over the experts, as shares of 1, and their entropy in nats.

    `name` is that of a layer, `step` one of training, where it is known.
    """

    load: tuple[float, ...]
    entropy: float | None
    name: str = ""
    step: int = 0

    @property
    def largest(self) -> float:
        """The largest share."""
        return max(self.load)


@dataclass(frozen=True)
class GateLoads:
    """The load of token-wise gates: over all, layer by layer, and over the steps of training.

    `active` experts take part at every token.
    """

    experts: tuple[str, ...]
    active: int
    overall: GateLoad
    layers: tuple[GateLoad, ...]
    steps: tuple[GateLoad, ...]


@dataclass(frozen=True)
class Evaluation:
    """The whole evaluation; names keep the order of the records.

    The fields with a default are optional in the records: `seconds` a stage, `memory` in bytes, `merge_error` the
    relative Frobenius error of a method's merge, `composition` rows of every cluster by "source / category". `profile`
    and `costs` (of a question, by method) are those of recruited experts; `selection`, `gathering` and `gates` tell how
    a mixture was made from a few shots.
    """

    mixture: str
    data: str
    control: str
    subject: str | None  # the method the mixture stands for, where the records tell
    methods: tuple[str, ...]
    experts: tuple[str, ...]
    sources: tuple[str, ...]
    base_model: dict[str, str]
    settings: dict[str, str]
    hardware: dict[str, str]
    clusters: dict[str, dict[str, float]]
    adjusted_rand_index: float | None
    routing: dict[str, dict[str, float]]
    seconds: dict[str, dict[str, float]]
    table: tuple[Score, ...]
    rows: tuple[Row, ...]
    memory: dict[str, float] = field(default_factory=dict)
    merge_error: dict[str, float] = field(default_factory=dict)
    composition: dict[str, dict[str, float]] = field(default_factory=dict)
    routing_by_category: dict[str, dict[str, float]] = field(default_factory=dict)
    features: dict[str, float] = field(default_factory=dict)
    map: GradientMap | None = None
    spread: tuple[Spread, ...] = ()
    notes: tuple[str, ...] = ()
    profile: Profile | None = None
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    selection: AdapterSelection | None = None
    gathering: Gathering | None = None
    gates: GateLoads | None = None

    def score(self, method: str, source: str = OVERALL) -> Score | None:
        """Find a table row; None where the records have none."""
        return next((row for row in self.table if (row.method, row.source) == (method, source)), None)

    def scores(self, source: str = OVERALL) -> list[Score]:
        """List the table's rows of a source, in the order of the methods."""
        return [score for method in self.methods if (score := self.score(method, source))]
