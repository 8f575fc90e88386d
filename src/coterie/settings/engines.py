"""Settings of the engine that answers."""

from typing import Literal

from pydantic import Field

from coterie.settings.reading import Settings


class EngineSettings(Settings):
    """The engine that answers."""

    idle_with = {"gguf": ("engine", ("coterie",))}

    engine: Literal["coterie", "llama.cpp"] = Field(
        "coterie", description="coterie, or llama.cpp: faster on CPUs, for combiner layers; needs the extra 'llamacpp'"
    )
    gguf: str | None = Field(
        None, description="the base model as a GGUF file; default: the file that the base model itself was loaded from"
    )
