"""What a mixture's folder says of it: `mixture.json`, and `ingredient.json` of all that was trained beside it."""

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator

from coterie.artifacts import FORMAT
from coterie.records.schema import Amounts, Facts, FolderNames, Names, Position, Record, Texts, Weight
from coterie.settings.rows import READING, ReadingSettings

MIXTURE_FILE = "mixture.json"
Positive = Annotated[int, Field(strict=True, ge=1, le=2**31)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class BaseModelRecord(Record):
    """The base model that experts were trained on: its name, the hub's commit, hashes of weights and configuration."""

    id: StrictStr
    revision: StrictStr | None
    sha256: StrictStr
    config_sha256: StrictStr | None = None


class NullRecord(Record):
    """An expert that changes nothing, and the similarity or cosine below which it takes over."""

    name: StrictStr
    similarity: Position = 0.0
    cosine: Position = 0.0


class RouterRecord(Record, extra="allow"):
    """A router's entry: its kind, and the fields that routers of this kind save; see their `save` and `load`."""

    kind: StrictStr
    experts: Names | dict[StrictStr, StrictStr] = ()
    weights: Amounts = {}
    of: "RouterRecord | None" = None
    top_k: Positive | None = None
    normalised: StrictBool = False
    every: Positive | None = None
    cache: StrictStr = "keep"
    temperature: Annotated[Position, Field(gt=0)] | None = None
    null: NullRecord | None = None
    score: StrictStr = "linear"
    description: StrictStr = "gradient"
    base: StrictStr | None = None
    ddof: Annotated[int, Field(strict=True, ge=0, le=1)] = 0
    nearest: StrictBool = True
    encoder: StrictStr | None = None
    window: Positive | None = None
    tail: StrictBool = True
    checkpoints: FolderNames = ()
    features: Facts = {}
    seed: Seed = 0
    sharpness: Weight = 0.0
    fallback: StrictStr | None = None
    caution: Weight = 0.0
    tolerance: Weight = 0.0
    layer: Positive | None = None
    pooling: Literal["mean", "last"] | None = None

    @model_validator(mode="after")
    def _check_experts(self) -> "RouterRecord":
        if isinstance(self.experts, dict) != (self.kind == "source") and "experts" in self.model_fields_set:
            raise ValueError("'experts' should be names, or of a router by source an object of names")
        return self


class CombinerRecord(Record):
    """The combiner's entry: its name."""

    kind: StrictStr


class MixtureRecord(Record):
    """A mixture; `experts` are folders' names, `clustering` how the training rows were clustered."""

    format: Annotated[int, Field(strict=True, ge=FORMAT, le=FORMAT)]
    method: StrictStr
    base_model: BaseModelRecord
    system_prompt: StrictStr | None = None
    input_template: StrictStr | None = None
    map: Texts = ()
    end_of_turn: StrictStr | None = None
    experts: FolderNames
    router: RouterRecord
    combiner: CombinerRecord
    clustering: Facts = {}

    @property
    def reading(self) -> ReadingSettings:
        """How the rows were read that it was fitted on."""
        return READING.as_fitted({"input_template": self.input_template, "map": list(self.map)})


class ExtraRecord(Record):
    """What was trained beside a mixture: its experts, its router if it has one, and the settings that it depends on.

    `judged` are the experts whose losses were cross-fitted, in the order of those; `needs` the hashes of
    other extras that it was made from.
    """

    settings: Facts = {}
    experts: FolderNames
    router: RouterRecord | None
    seconds: Weight = 0.0
    judged: Names = ()
    needs: Facts = {}


class TrainingRow(Record):
    """A training row in `clusters.jsonl` or `domains.jsonl`: where it comes from, and what was trained on it."""

    id: StrictStr | None = None
    source: StrictStr | None = None
    category: StrictStr | None = None
    cluster: StrictStr = ""
    expert: StrictStr = ""
