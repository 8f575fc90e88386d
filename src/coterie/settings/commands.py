"""One class of settings for every command."""

from typing import Literal

from pydantic import Field

from coterie.settings.engines import EngineSettings
from coterie.settings.groups import (
    ClusterSettings,
    DomainTrainingSettings,
    ExpertServingSettings,
    ExpertSettings,
    ExtrasSettings,
    FeatureSettings,
    FewShotSettings,
    GateSettings,
    GatherRowsSettings,
    LoraSettings,
    ModelSettings,
    PlacementSettings,
    RationaleSettings,
    RecruitSettings,
    ReroutingSettings,
    RoutingSettings,
    SamplingSettings,
    SelectAdaptersSettings,
    SimilaritySettings,
    SkillSettings,
    TaskTrainingSettings,
    TrainingSettings,
)
from coterie.settings.reading import Settings
from coterie.settings.rows import ReadingSettings
from coterie.settings.workers import WorkerSettings

SYMBOLIC_ONLY = "Serving experts (acts on runs of symbolic-moe only)"
WORKERS_TOO = "Serving experts (acts on runs of symbolic-moe only), and workers"


class ElreaSettings(Settings):
    """`coterie fit elrea`: the whole loop, from one data set to a mixture."""

    command = "fit elrea"
    model: ModelSettings
    data: list[str] = Field(min_length=1, description="training data: JSONL file or datasets source; may be repeated")
    output: str = Field(description="folder to write the mixture to")
    limit: int | None = Field(None, ge=1, description="use only the first N examples of every data source")
    seed: int = Field(0, ge=0, description="seed of shuffling, initialisation, dropout, projection and clustering")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    reading: ReadingSettings = ReadingSettings()
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    experts: ExpertSettings = ExpertSettings()
    features: FeatureSettings = FeatureSettings()
    clustering: ClusterSettings = ClusterSettings()


class TokenLevelSettings(Settings):
    """`coterie fit token-level`: one adapter for each domain, and centroids to route by."""

    command = "fit token-level"
    model: ModelSettings
    data: list[str] = Field(
        min_length=1, description="NAME=SOURCE: an expert's training data, JSONL file or datasets source; repeated"
    )
    output: str = Field(description="folder to write the mixture to")
    limit: int | None = Field(None, ge=1, description="use only the first N examples of every data source")
    seed: int = Field(0, ge=0, description="seed of shuffling, initialisation, dropout and k-means")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    reading: ReadingSettings = ReadingSettings()
    lora: LoraSettings = LoraSettings()
    training: DomainTrainingSettings = DomainTrainingSettings()
    similarity: SimilaritySettings = SimilaritySettings()
    rerouting: ReroutingSettings = ReroutingSettings()


class FromAdaptersSettings(Settings):
    """`coterie fit from-adapters`: a mixture of adapters that exist already."""

    command = "fit from-adapters"
    idle_with = {"names": ("bank", (None,))}
    bank: str | None = Field(None, description="folder of a bank, made by coterie bank add: all its adapters")
    names: str | None = Field(None, description="adapters of --bank to take, separated by commas; default: all")
    adapter: list[str] = Field([], description="NAME=FOLDER: an expert, a plain PEFT folder; repeated")
    centroid_data: list[str] = Field(
        [],
        description="NAME=SOURCE: texts that an expert was made for, as training data is given; repeated; default: "
        "what its card in --bank names",
    )
    router: Literal["auto", "similarity", "arrow", "spectr", "logo"] = Field(
        "auto",
        description="arrow, spectr, logo: by the adapters' own updates, no texts needed; similarity: to the texts that "
        "every expert was made for; auto: similarity where all experts have texts, else arrow",
    )
    output: str = Field(description="folder to write the mixture to")
    model: str | None = Field(None, description="base model; default: the one that the adapters name")
    revision: str | None = Field(None, description="revision of a hub model (branch, tag or commit)")
    limit: int | None = Field(None, ge=1, description="use only the first N examples of every data source")
    max_length: int = Field(2048, ge=8, description="longest example in tokens; longer ones are dropped and counted")
    system_prompt: str | None = Field(None, description="system prompt of every prompt; default: the template's own")
    seed: int = Field(0, ge=0, description="seed of k-means")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    reading: ReadingSettings = ReadingSettings()
    placement: PlacementSettings = PlacementSettings()
    similarity: SimilaritySettings = SimilaritySettings()
    rerouting: ReroutingSettings = ReroutingSettings()


class BankAddSettings(Settings):
    """`coterie bank add`: adapters into a bank on disk."""

    command = "bank add"
    folder: str = Field(description="folder of the bank; made where there is none")
    adapters: list[str] = Field(
        min_length=1, description="PEFT folders or hub ids, or NAME=FOLDER for another name than the folder's"
    )
    trained_on: list[str] = Field(
        [], description="NAME=SOURCE: data that an adapter was trained on, so that leaks can be found; repeated"
    )
    model: str | None = Field(None, description="base model of a new bank; default: the bank's own")
    revision: str | None = Field(None, description="revision of a hub model (branch, tag or commit)")
    overwrite: bool = Field(False, description="replace adapters that have the same names")
    reading: ReadingSettings = ReadingSettings()
    placement: PlacementSettings = PlacementSettings()


class BankRemoveSettings(Settings):
    """`coterie bank remove`: adapters out of a bank on disk."""

    command = "bank remove"
    folder: str = Field(description="folder of the bank")
    name: list[str] = Field(min_length=1, description="names of adapters in the bank")


class BankVerifySettings(Settings):
    """`coterie bank verify`: re-hash and re-check every adapter."""

    command = "bank verify"
    folder: str = Field(description="folder of the bank")
    placement: PlacementSettings = PlacementSettings()


class RouteSettings(Settings):
    """`coterie route`: the weights a prompt gets."""

    command = "route"
    mixture: str = Field(description="folder of a mixture")
    reading: ReadingSettings = ReadingSettings()
    placement: PlacementSettings = PlacementSettings()
    routing: RoutingSettings = RoutingSettings()


class GenerateSettings(RouteSettings):
    """`coterie generate`: answers of the mixture."""

    command = "generate"
    sampling: SamplingSettings = SamplingSettings()
    n: int = Field(1, ge=1, description="answers to every prompt, each drawn with a seed of its own")
    batch_size: int = Field(8, ge=1, description="answers decoded together")
    output: str | None = Field(None, description="file to write the answers to, a JSON object a line")
    overwrite: bool = Field(False, description="replace the file of answers if it exists")
    engine: EngineSettings = EngineSettings()
    serving: ExpertServingSettings = Field(ExpertServingSettings(), title=SYMBOLIC_ONLY)


class PlanSettings(GenerateSettings):
    """`coterie plan`: what it will take recruited experts to answer."""

    command = "plan"


class EvaluationSettings(Settings):
    """`coterie eval`: methods of the table side by side on held-out rows."""

    command = "eval"
    mixture: str = Field(description="folder of a mixture")
    data: list[str] = Field(min_length=1, description="test data: JSONL file or datasets source; may be repeated")
    output: str = Field(description="folder to write the records to")
    methods: str | None = Field(
        None,
        description="methods to compare, separated by commas, or all; see `coterie methods`; default: the run's own "
        "method and its simplest rivals",
    )
    control: str | None = Field(
        None,
        description="method that the others are compared with; default: of those that are one expert or the untouched "
        "base model, the one that does best on the rows",
    )
    router: str | None = Field(
        None, description="routers to compare besides, separated by commas: those that --router of generate takes"
    )
    every: str | None = Field(None, description="compare token-level re-routed at every N-th token; several: 1,2,inf")
    limit: int | None = Field(None, ge=1, description="use only the first N examples of every data source")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    generate: bool = Field(True, description="answers of every method, beside likelihoods of the references")
    allow_code_execution: bool | None = Field(
        None,
        description="run the code that methods write, in a limited child process, where rows bring tests; "
        "--no-allow-code-execution leaves such rows ungraded",
    )
    resamples: int = Field(2000, ge=100, description="bootstrap resamples of the share of the oracle's gain")
    batch_size: int = Field(8, ge=1, description="prompts decoded together")
    reading: ReadingSettings = ReadingSettings()
    placement: PlacementSettings = PlacementSettings()
    sampling: SamplingSettings = SamplingSettings()
    extras: ExtrasSettings | None = None
    solved: FewShotSettings = FewShotSettings()
    serving: ExpertServingSettings = Field(ExpertServingSettings(), title=WORKERS_TOO)


class TrainExtrasSettings(Settings):
    """`coterie train-extras`: what methods need beyond a fitted run, into the run's folder."""

    command = "train-extras"
    mixture: str = Field(description="folder of a mixture")
    methods: str = Field(
        "all", description="methods that are to be ready, separated by commas, or all; see `coterie methods`"
    )
    placement: PlacementSettings = PlacementSettings()
    extras: ExtrasSettings = ExtrasSettings()


class ExpertPoolSettings(Settings):
    """`coterie experts init`: experts of any kind by name."""

    command = "experts init"
    folder: str = Field(description="folder of the experts")
    expert: list[str] = Field(
        min_length=1,
        description="NAME=SOURCE, may be repeated: an adapter's folder, a base model, or an endpoint as URL#MODEL",
    )
    base: str | None = Field(None, description="base model of the adapters; default: the one that each adapter names")
    overwrite: bool = Field(False, description="replace the folder's list of experts")


class ExpertAddSettings(ExpertPoolSettings):
    """`coterie experts add`: more experts to those of a folder."""

    command = "experts add"
    overwrite: bool = Field(False, description="replace experts that have the same names")


class ExpertRemoveSettings(Settings):
    """`coterie experts remove`: experts out of a folder's list."""

    command = "experts remove"
    folder: str = Field(description="folder of the experts")
    name: list[str] = Field(min_length=1, description="names of experts in the list")


class ProfileSettings(Settings):
    """`coterie profile`: what experts are good at, skill by skill."""

    command = "profile"
    folder: str = Field(description="folder of the experts")
    data: list[str] = Field(min_length=1, description="validation data: JSONL file or datasets source; may be repeated")
    limit: int | None = Field(None, ge=1, description="use only the first N examples of every data source")
    overwrite: bool = Field(False, description="replace the profile; replies that still hold are not asked for again")
    score: Literal["answers", "likelihood"] = Field(
        "answers", description="answers: right or wrong; likelihood: of the reference, for models too small to answer"
    )
    batch_size: int = Field(8, ge=1, description="questions decoded together")
    reading: ReadingSettings = ReadingSettings()
    skill: SkillSettings = SkillSettings()
    placement: PlacementSettings = PlacementSettings()
    serving: ExpertServingSettings = ExpertServingSettings()
    sampling: SamplingSettings = SamplingSettings()


class SymbolicSettings(Settings):
    """`coterie fit symbolic-moe`: recruiting by skills, and the aggregator of answers (Chen et al. 2025)."""

    command = "fit symbolic-moe"
    experts: str = Field(description="folder of experts that were profiled")
    output: str = Field(description="folder to write the method to")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    aggregator: str = Field(
        "auto", description="auto: the best on made-up tasks; or majority, weighted-vote, or an expert"
    )
    aggregator_for: Literal["task", "question"] = Field(
        "task", description="one aggregator for all questions, or for each the best on its skills"
    )
    aggregator_tasks: int = Field(100, ge=1, description="most made-up tasks: one right answer among wrong ones")
    batch_size: int = Field(8, ge=1, description="questions decoded together")
    recruiting: RecruitSettings = RecruitSettings()
    placement: PlacementSettings = PlacementSettings()
    serving: ExpertServingSettings = ExpertServingSettings()
    sampling: SamplingSettings = SamplingSettings()


class GatherSettings(Settings):
    """`coterie gather`: rows of open data for a task of which a few examples are known."""

    command = "gather"
    shots: list[str] = Field(min_length=1, description="the task's examples: JSONL file or datasets source; repeated")
    pool: list[str] = Field(min_length=1, description="open data to choose from, as shots are given; may be repeated")
    output: str = Field(description="folder to write the chosen rows to")
    exclude: list[str] = Field([], description="rows that must not be found again, such as a test set; repeated")
    encoder: str = Field("minilm", description="text encoder: minilm, a folder, or hidden (the states of --model)")
    model: str | None = Field(None, description="base model, for --encoder hidden only")
    embeddings: str | None = Field(
        None, description="folder that keeps embeddings for later; default: the user's cache"
    )
    limit: int | None = Field(None, ge=1, description="use only the first N rows of every source of open data")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    reading: ReadingSettings = ReadingSettings()
    rows: GatherRowsSettings = GatherRowsSettings()
    placement: PlacementSettings = PlacementSettings()


class SelectSettings(Settings):
    """`coterie select`: adapters of a bank for a task of which a few examples are known (arXiv 2408.15915)."""

    command = "select"
    folder: str = Field(description="folder of a bank, made by coterie bank add")
    shots: list[str] = Field(min_length=1, description="the task's examples: JSONL file or datasets source; repeated")
    output: str = Field(description="folder to write the choice to")
    limit: int | None = Field(None, ge=1, description="use only the first N shots of every source (the paper's K)")
    system_prompt: str | None = Field(None, description="system prompt of every prompt; default: the template's own")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    reading: ReadingSettings = ReadingSettings()
    adapters: SelectAdaptersSettings = SelectAdaptersSettings()
    rationale: RationaleSettings = RationaleSettings()
    sharing: WorkerSettings = WorkerSettings()
    placement: PlacementSettings = PlacementSettings()


class KshotSettings(Settings):
    """`coterie fit kshot-moe`: from a few examples, a bank and open data to a task's mixture (arXiv 2408.15915)."""

    command = "fit kshot-moe"
    idle_with = {"encoder": ("pool", ([],)), "embeddings": ("pool", ([],))}
    bank: str = Field(description="folder of a bank, made by coterie bank add")
    shots: list[str] = Field(min_length=1, description="the task's examples: JSONL file or datasets source; repeated")
    output: str = Field(description="folder to write the mixture to")
    pool: list[str] = Field([], description="open data to add rows from; without it, the shots alone are trained on")
    selected: str | None = Field(None, description="folder that coterie select wrote: its adapters, none chosen anew")
    gathered: str | None = Field(None, description="folder that coterie gather wrote: its rows, in place of --pool")
    limit: int | None = Field(None, ge=1, description="use only the first N shots of every source (the paper's K)")
    encoder: str = Field(
        "minilm",
        description="text encoder that compares open data with the shots: minilm, hidden (the base model's own "
        "states), or a folder",
    )
    embeddings: str | None = Field(
        None, description="folder that keeps embeddings for later; default: the user's cache"
    )
    seed: int = Field(0, ge=0, description="seed of gates, shuffling and dropout")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    reading: ReadingSettings = ReadingSettings()
    adapters: SelectAdaptersSettings = SelectAdaptersSettings()
    rationale: RationaleSettings = RationaleSettings()
    sharing: WorkerSettings = WorkerSettings()
    rows: GatherRowsSettings = GatherRowsSettings()
    gates: GateSettings = GateSettings()
    training: TaskTrainingSettings = TaskTrainingSettings()
    placement: PlacementSettings = PlacementSettings()


class ExportSettings(Settings):
    """`coterie export`: the experts, or one static mixture of them, as other programs read them."""

    command = "export"
    idle_with = {
        "router": ("prompt", (None,)),
        "top_k_experts": ("prompt", (None,)),
        "base_type": ("target", ("vllm", "peft")),
    }
    mixture: str = Field(description="folder of a mixture")
    target: Literal["vllm", "peft", "llama.cpp"] = Field(description="the program that will read it")
    output: str = Field(description="folder to write to")
    weights: str | None = Field(
        None, description="NAME=W,NAME=W,...: one static mixture with these weights, instead of the experts"
    )
    prompt: str | None = Field(None, description="one static mixture, weighed as the router weighs this prompt")
    router: str | None = Field(None, description="another router, as for coterie route")
    top_k_experts: int | None = Field(None, ge=1, description="keep only the K experts with the largest weights")
    merge: str | None = Field(
        None,
        description="how a mixture becomes one adapter: exact (ranks are stacked), svd:R, or as combiners merge; "
        "default: exact; llama.cpp mixes the experts by itself, unless this is given",
    )
    base_type: Literal["f32", "f16", "q8_0", "q4_1"] | None = Field(
        None, description="write the base model too, with weights of this type (for llama.cpp)"
    )
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    placement: PlacementSettings = PlacementSettings()
