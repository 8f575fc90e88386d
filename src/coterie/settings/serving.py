"""Settings of the server."""

from typing import Literal

from pydantic import Field

from coterie.settings.groups import EndpointSettings, ExpertServingSettings, PlacementSettings
from coterie.settings.reading import Settings


class AddressSettings(Settings):
    """Where the server listens."""

    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: every one of this machine")
    port: int = Field(8000, ge=0, le=65535, description="port to listen at; 0: any free one")


class CapacitySettings(Settings):
    """How much is answered at once."""

    places: int = Field(16, ge=1, description="answers that are written at once, for each mixture; others wait")
    prefill_chunk: int | None = Field(
        None,
        ge=1,
        description="tokens of prompts that a step reads, each counted for every expert that reads it, while answers "
        "wait for their next token; default: 128 on a CPU, else 512",
    )
    memory: float | None = Field(
        None,
        gt=0,
        description="GiB that each mixture may take in all, its base model included; default: what answers need",
    )
    prefix_memory: float = Field(
        0.25, ge=0, description="GiB in which each mixture keeps prompts for later ones that begin alike; 0: none"
    )
    timeout: float = Field(600.0, gt=0, description="seconds that a request may take in all")


class AccessSettings(Settings):
    """Who may ask, and for what."""

    api_key_file: str | None = Field(
        None, description="file with a key on every line; default: everybody who reaches the server may ask"
    )
    cors_origin: list[str] | None = Field(
        None, description="origin of pages in browsers that may ask, such as https://chat.example.org; default: none"
    )
    allowed_hosts: list[str] | None = Field(
        None,
        description="name under which clients may ask, such as llm.example.org or *.example.org; default: any with "
        "--api-key-file, else addresses and names without a dot, which no stranger's page can take on",
    )
    allow_folder: list[str] | None = Field(
        None, description="folder from inside which adapters and mixtures may be loaded at run time; default: none"
    )


class LimitSettings(Settings):
    """What a request may take."""

    max_body: float = Field(8.0, gt=0, description="MiB that the body of a request may have")
    max_queue: int = Field(1024, ge=1, description="requests that are answered or wait at once; others get 429")


class RecruitedSettings(EndpointSettings):
    """Recruited experts, of runs of symbolic-moe."""

    expert_memory: float | None = Field(
        None, gt=0, description="GiB that the models of one run may take together; default: what is free at the start"
    )
    expert_timeout: float = Field(120.0, gt=0, description="seconds that an endpoint may take for one answer")

    @property
    def serving(self) -> ExpertServingSettings:
        """The same, under the names that commands have for it whose experts are all recruited."""
        plain = {name.removeprefix("expert_"): value for name, value in self}
        return ExpertServingSettings(**plain)


class OperationSettings(Settings):
    """How the server is watched, and how it ends."""

    drain: int = Field(25, ge=0, description="seconds in which answers may end after the server was told to stop")

    metrics_names: Literal["coterie", "vllm"] = Field(
        "coterie", description="prefix of /metrics: coterie_, or vllm: for dashboards and gateways made for vLLM"
    )


class ReplicaSettings(Settings):
    """How many processes answer, and where."""

    idle_with = {"replicas": ("ray", (False,))}

    ray: bool = Field(
        False,
        description="answer as a Ray Serve deployment, on the cluster that RAY_ADDRESS names or one of this machine "
        "alone; needs the extra 'ray'",
    )
    replicas: int = Field(1, ge=1, description="processes that answer, each with all that is served and a GPU, if any")


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
    upstream: str | None = Field(
        None,
        description="another server that computes the answers, llama.cpp=URL or vllm=URL: experts are weighed here "
        "and mixed there, in the layers",
    )
    address: AddressSettings = AddressSettings()
    capacity: CapacitySettings = CapacitySettings()
    access: AccessSettings = AccessSettings()
    limits: LimitSettings = LimitSettings()
    recruited: RecruitedSettings = RecruitedSettings()
    operation: OperationSettings = OperationSettings()
    replication: ReplicaSettings = ReplicaSettings()
    placement: PlacementSettings = PlacementSettings()
