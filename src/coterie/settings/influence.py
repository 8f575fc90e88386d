"""Settings of `coterie influence`."""

from typing import Literal

from pydantic import Field

from coterie.settings.groups import FeatureSettings, PlacementSettings
from coterie.settings.reading import Settings
from coterie.settings.rows import ReadingSettings


class AnswerFeatureSettings(FeatureSettings):
    """Gradient features of whole rows: of the loss on their answers."""

    loss_on: Literal["response"] = Field("response", description="tokens that carry loss: the answer's")  # pyrefly: ignore


class InfluenceSettings(Settings):
    """`coterie influence`: which rows of much data would lower the loss on a few, by gradients (LESS, 2402.04333)."""

    command = "influence"
    idle_with = {"directions": ("geometry", ("adam",))}
    mixture: str = Field(description="folder of a run of fit elrea or fit auto: its base adapter's epochs are used")
    target_rows: list[str] = Field(
        min_length=1, description="a few rows of what is aimed at: JSONL file or datasets source; may be repeated"
    )
    data: list[str] = Field(min_length=1, description="rows to choose from, in the same forms; may be repeated")
    output: str = Field(description="folder to write scores and chosen rows to")
    share: float = Field(0.05, gt=0, le=1, description="share of the rows that is written out, the most helpful first")
    geometry: Literal["adam", "subspace"] = Field(
        "adam",
        description="adam: Adam's steps of the rows (LESS); subspace: plain gradients, in the strongest directions of "
        "those aimed at (GIST, 2602.18584)",
    )
    directions: int = Field(16, ge=1, description="directions of that subspace, at most")
    d_proj: int = Field(8192, ge=2, le=2**20, description="dimensions after projection")
    seed: int = Field(0, ge=0, description="seed of the projection")
    limit: int | None = Field(None, ge=1, description="use only the first N rows of every source of data")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    reading: ReadingSettings = ReadingSettings()
    placement: PlacementSettings = PlacementSettings()
