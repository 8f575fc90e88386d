"""Settings of what goes to the model hub and comes from it."""

from pydantic import Field

from coterie.settings.reading import Settings


class PushSettings(Settings):
    """`coterie push`: a mixture or a bank to the model hub."""

    command = "push"
    folder: str = Field(description="folder of a mixture or of a bank")
    repository: str = Field(description="OWNER/NAME on the hub; made where it is not there")
    licence: str | None = Field(None, description="licence of the experts, as the hub spells it, such as apache-2.0")
    evaluation: str | None = Field(None, description="folder that `coterie eval` wrote, for the card's measurements")
    base_model: str | None = Field(
        None, description="what the hub calls the base model, OWNER/NAME, where it was loaded from a folder"
    )
    public: bool = Field(False, description="let everybody see a new repository; it is private otherwise")


class BankFindSettings(Settings):
    """`coterie bank find`: adapters on the model hub that fit a base model."""

    command = "bank find"
    base: str = Field(description="base model: an alias or a hub id")
    search: str | None = Field(None, description="words that an adapter's name must hold")
    licence: str | None = Field(
        None, description="licences that will do, as the hub spells them, separated by commas; default: any"
    )
    max_rank: int | None = Field(None, ge=1, description="largest rank that will do")
    limit: int = Field(20, ge=1, le=200, description="adapters to look at, the most downloaded first")
