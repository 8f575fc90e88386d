"""Settings of the server."""

from pydantic import Field

from coterie.settings.groups import PlacementSettings
from coterie.settings.reading import Settings


class AddressSettings(Settings):
    """Where the server listens."""

    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: every one of this machine")
    port: int = Field(8000, ge=0, le=65535, description="port to listen at; 0: any free one")


class CapacitySettings(Settings):
    """How much is answered at once."""

    places: int = Field(16, ge=1, description="answers that are written at once, for each mixture; others wait")
    cache_memory: float | None = Field(
        None, gt=0, description="GiB that the cache of each mixture may take; default: as much as its answers need"
    )
    prefix_memory: float = Field(
        0.25, ge=0, description="GiB in which each mixture keeps prompts for later ones that begin alike; 0: none"
    )
    timeout: float = Field(600.0, gt=0, description="seconds that a request may take in all")


class ServeSettings(Settings):
    """`coterie serve`: mixtures behind OpenAI's API."""

    command = "serve"
    mixtures: list[str] = Field(
        min_length=1, description="folders of mixtures, or NAME=FOLDER for another name than the folder's"
    )
    methods: str | None = Field(
        None,
        description="other methods that mixtures answer as, separated by commas; see `coterie methods`; default: all "
        "for which nothing more was to be trained",
    )
    address: AddressSettings = AddressSettings()
    capacity: CapacitySettings = CapacitySettings()
    placement: PlacementSettings = PlacementSettings()
