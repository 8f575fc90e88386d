"""One typed object per command: it is the flag list, the YAML schema and the record in `run.yaml`.

Nothing here imports torch, so that the command line can show its help at once. A description stands in one place,
beside its field. Groups are shared between commands; their fields become plain flags, so names are unique over all
groups of a command.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from coterie.errors import CoterieError, unknown_name

FeatureForm = Literal["adam", "adam-centred", "sgd"]
Projection = Literal["sketch", "rademacher"]
CacheUse = Literal["keep", "recompute"]
ClusterMethod = Literal["birch", "spherical-kmeans", "birch-pca", "kmeans-pca"]
SimilarityRule = Literal["max-cosine", "convex-hull", "kde"]


def _check_every(written: str | None) -> str | None:
    if written not in (None, NEVER) and not (written.isascii() and written.isdigit() and int(written)):
        raise ValueError("give a number of tokens from 1 upwards, or inf")
    return written


NEVER = "inf"
Every = Annotated[str, AfterValidator(_check_every)]
"""After how many tokens weights are renewed, as it is written; see `renewal_interval`."""


def renewal_interval(every: str) -> int | None:
    """Return the number of tokens that share weights; None for all of them."""
    return None if every == NEVER else int(every)


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class PlacementSettings(Settings):
    """How a base model is held in memory."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the base weights; auto: float32 on CPU, the checkpoint's own elsewhere"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    load_in_4bit: bool = Field(False, description="hold the base in 4 bits (NF4); needs the extra 'quant'")


class ModelSettings(PlacementSettings):
    """Which base model, and how it is held in memory."""

    model: str = Field(description="base model: hub id, local folder, .gguf file, or the alias smollm2-135m")
    revision: str | None = Field(None, description="revision of a hub model (branch, tag or commit)")


class LoraSettings(Settings):
    """Shape of every adapter."""

    rank: int = Field(8, ge=1, description="rank r of every adapter")
    alpha: int | None = Field(None, ge=1, description="LoRA alpha; default 4 times the rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the input of the LoRA branch while training")
    target_modules: str = Field("all-linear", description="all-linear, or names of linear layers separated by commas")


class TrainingSettings(Settings):
    """Training of an adapter from a fresh start, such as the base adapter on all data."""

    epochs: int = Field(2, ge=1, description="epochs of an adapter that is trained from a fresh start")
    learning_rate: float = Field(5e-5, gt=0, description="its peak learning rate, decaying linearly to 0")
    batch_size: int = Field(16, ge=1, description="examples per optimiser step")
    micro_batch_size: int = Field(8, ge=1, description="examples per forward pass")
    max_length: int = Field(2048, ge=8, description="longest example in tokens; longer ones are dropped and counted")
    system_prompt: str | None = Field(
        None, description="system prompt put before every example; default: the template's own"
    )
    report_to: str = Field("none", description="experiment tracker known to transformers, such as trackio or wandb")


class ExpertSettings(Settings):
    """Training of one expert per cluster, continued from the base adapter."""

    expert_epochs: int = Field(2, ge=1, description="epochs of every cluster's expert")
    expert_learning_rate: float = Field(2e-5, gt=0, description="peak learning rate of the experts")


class FeatureSettings(Settings):
    """How a prompt is described by its gradient."""

    form: FeatureForm = Field("adam", description="adam (the paper's), adam-centred (minus the training mean) or sgd")
    projection: Projection = Field("sketch", description="sketch (fast) or rademacher (the paper's dense +-1)")
    d_proj: int = Field(8192, ge=2, description="dimensions after projection")
    blocks: str = Field("all", description="blocks whose gradients count: all, or last:K")
    loss_on: Literal["user-text", "prompt"] = Field(
        "user-text", description="tokens that carry loss: the user's own text, or the whole rendered prompt"
    )
    feature_batch_size: int = Field(8, ge=1, description="prompts per forward and backward pass")


class ClusterSettings(Settings):
    """How training rows are grouped."""

    clusters: int = Field(5, ge=2, description="clusters asked for in the first round")
    cluster_rounds: int = Field(3, ge=1, le=3, description="rounds of splitting clusters that stayed too large")
    cluster_method: ClusterMethod = Field(
        "birch", description="birch (the paper's), spherical-kmeans, birch-pca or kmeans-pca"
    )
    cluster_threshold: float | None = Field(None, gt=0, description="BIRCH leaf radius; default: chosen from the data")
    cluster_sample: int = Field(5000, ge=10, description="rows the clustering is fitted on")
    normalise_features: bool = Field(True, description="scale features to unit length before clustering")


class ElreaSettings(Settings):
    """`coterie fit elrea`: the whole loop, from one data set to a mixture."""

    model: ModelSettings
    data: list[str] = Field(min_length=1, description="training data: JSONL file or datasets source; may be repeated")
    output: str = Field(description="folder to write the mixture to")
    limit: int | None = Field(None, ge=1, description="use only the first N examples of every data source")
    seed: int = Field(0, ge=0, description="seed of shuffling, initialisation, dropout, projection and clustering")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    experts: ExpertSettings = ExpertSettings()
    features: FeatureSettings = FeatureSettings()
    clustering: ClusterSettings = ClusterSettings()


class SimilaritySettings(Settings):
    """How a text is compared with what every expert was made for."""

    encoder: str = Field(
        "minilm", description="text encoder: minilm, hidden (the base model's own states), or a folder"
    )
    window: int | None = Field(
        None, ge=1, description="let only the last N tokens of a text count; default: all that the encoder can read"
    )
    routing_temperature: float | None = Field(
        None, gt=0, description="temperature of a softmax over cosines; default: the published weighting"
    )
    centroids: int = Field(1, ge=1, description="centroids of every expert, by k-means of its texts")
    centroids_by: Literal["origin", "performance"] = Field(
        "origin", description="a text counts for the expert that it was given to, or for the one that predicts it best"
    )
    null_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="add an expert that changes nothing and takes over below the similarity that this share of the "
        "experts' own texts has; default: none",
    )


class RenewalSettings(Settings):
    """When the weights are renewed while an answer is written."""

    every: Every = Field("1", description="renew the weights at every N-th token of an answer; inf: never")
    cache: CacheUse = Field("keep", description="keep what earlier weights left in the KV cache, or recompute it")


class TokenLevelSettings(Settings):
    """`coterie fit token-level`: one adapter for each domain, and centroids to route by."""

    model: ModelSettings
    data: list[str] = Field(
        min_length=1, description="NAME=SOURCE: an expert's training data, JSONL file or datasets source; repeated"
    )
    output: str = Field(description="folder to write the mixture to")
    limit: int | None = Field(None, ge=1, description="use only the first N examples of every data source")
    seed: int = Field(0, ge=0, description="seed of shuffling, initialisation, dropout and k-means")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    similarity: SimilaritySettings = SimilaritySettings()
    renewal: RenewalSettings = RenewalSettings()


class BankSettings(Settings):
    """`coterie bank build`: a mixture of adapters that exist already."""

    adapter: list[str] = Field(min_length=1, description="NAME=FOLDER: an expert, a plain PEFT folder; repeated")
    centroid_data: list[str] = Field(
        min_length=1, description="NAME=SOURCE: texts that the expert was made for, as training data is given; repeated"
    )
    output: str = Field(description="folder to write the mixture to")
    model: str | None = Field(None, description="base model; default: the one that the adapters name")
    revision: str | None = Field(None, description="revision of a hub model (branch, tag or commit)")
    limit: int | None = Field(None, ge=1, description="use only the first N examples of every data source")
    max_length: int = Field(2048, ge=8, description="longest example in tokens; longer ones are dropped and counted")
    system_prompt: str | None = Field(None, description="system prompt of every prompt; default: the template's own")
    seed: int = Field(0, ge=0, description="seed of k-means")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    placement: PlacementSettings = PlacementSettings()
    similarity: SimilaritySettings = SimilaritySettings()
    renewal: RenewalSettings = RenewalSettings()


class SamplingSettings(Settings):
    """How tokens are chosen from the combined distribution."""

    max_new_tokens: int = Field(64, ge=1, description="longest answer in tokens")
    temperature: float = Field(0.0, ge=0, description="0: greedy; above: sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the smallest set of tokens with this probability mass")
    top_k: int = Field(0, ge=0, description="keep only the K likeliest tokens; 0: all")
    repetition_penalty: float = Field(
        1.0, gt=0, description="above 1: tokens that stand in the text become less likely"
    )
    stop: list[str] = Field([], description="stop before this text; may be repeated")
    seed: int = Field(0, ge=0, description="seed of sampling, for every prompt on its own")


class RoutingSettings(Settings):
    """Changes to a mixture's own router, for one call."""

    router: str | None = Field(None, description="use another router: uniform, or the name of one expert")
    combiner: str | None = Field(
        None, description="let experts meet elsewhere: logits, layers, weights, weights:svd:16 and others, or texts"
    )
    method: str | None = Field(None, description="answer as another method of the table does; see `coterie methods`")
    top_k_experts: int | None = Field(None, ge=1, description="keep only the K experts with the largest weights")
    every: Annotated[str | None, AfterValidator(_check_every)] = Field(
        None, description="renew the weights at every N-th token of an answer, or never (inf); default: as fitted"
    )
    cache: CacheUse | None = Field(None, description="with --every: keep or recompute what earlier weights have left")


class RouteSettings(Settings):
    """`coterie route`: the weights a prompt gets."""

    mixture: str = Field(description="folder of a mixture")
    placement: PlacementSettings = PlacementSettings()
    routing: RoutingSettings = RoutingSettings()


class GenerateSettings(Settings):
    """`coterie generate`: answers of the mixture."""

    mixture: str = Field(description="folder of a mixture")
    placement: PlacementSettings = PlacementSettings()
    routing: RoutingSettings = RoutingSettings()
    sampling: SamplingSettings = SamplingSettings()
    batch_size: int = Field(8, ge=1, description="prompts decoded together")


class GridSettings(Settings):
    """How the experts, gates and routers are trained that methods need beyond a fitted run."""

    encoder: str = Field(
        "minilm",
        description="sentence encoder of instruction-embedding: minilm, hidden (the base model's), or a folder",
    )
    ensemble_size: int = Field(4, ge=2, description="adapters of lora-ensembles, the base adapter among them")
    gate_epochs: int = Field(1, ge=1, description="epochs of mole's gates")
    gate_learning_rate: float = Field(2e-5, gt=0, description="peak learning rate of mole's gates")
    judge_folds: int = Field(
        2, ge=2, description="parts of the training rows: experts are judged on each by copies trained on the others"
    )


class ShotSettings(Settings):
    """Few-shot prompting: solved examples of the same task before every question."""

    shots: list[str] = Field([], description="data to take solved examples from; may be repeated")
    shot_count: int = Field(3, ge=1, description="solved examples before a question, of its own source and category")
    longest_prompt: int = Field(
        1200, ge=8, description="tokens of a prompt; solved examples are left out until it fits"
    )


class EvaluationSettings(Settings):
    """`coterie eval`: methods of the table side by side on held-out rows."""

    mixture: str = Field(description="folder of a mixture")
    data: list[str] = Field(min_length=1, description="test data: JSONL file or datasets source; may be repeated")
    output: str = Field(description="folder to write the records to")
    methods: str | None = Field(
        None,
        description="methods to compare, separated by commas, or all; see `coterie methods`; default: the run's own "
        "method and its simplest rivals",
    )
    control: str | None = Field(
        None, description="method that the others are compared with; default: base, or the first one where it is not"
    )
    every: str | None = Field(
        None, description="compare token-level with its weights renewed at every N-th token; several: 1,2,inf"
    )
    limit: int | None = Field(None, ge=1, description="use only the first N examples of every data source")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    generate: bool = Field(True, description="let every method answer; without it only likelihoods are measured")
    allow_code_execution: bool | None = Field(
        None, description="run the code that methods write, in a limited child process, where rows bring tests"
    )
    resamples: int = Field(2000, ge=100, description="bootstrap resamples behind every interval")
    batch_size: int = Field(8, ge=1, description="prompts decoded together")
    placement: PlacementSettings = PlacementSettings()
    sampling: SamplingSettings = SamplingSettings()
    grid: GridSettings = GridSettings()
    few_shot: ShotSettings = ShotSettings()


class SelectionSettings(Settings):
    """Which rows of a pool are chosen: similar to some examples, and diverse among themselves."""

    budget: int = Field(1000, ge=1, description="rows to choose")
    rule: SimilarityRule = Field("max-cosine", description="similar: to one example, to their hull, or where dense")
    gamma: float = Field(2.0, gt=0, description="sharpness of kde")
    keep: Literal["greedy", "published"] = Field(
        "greedy", description="greedy: pass over near-duplicates until the budget is full; published: drop them from it"
    )
    tau: float = Field(0.9, gt=0, le=1, description="chosen rows have at most this cosine among themselves")
    exclude_tau: float = Field(0.9, gt=0, le=1, description="largest cosine to an example or an excluded row")
    block_rows: int = Field(8192, ge=1, description="pool rows held in memory at a time")


class GatherSettings(Settings):
    """`coterie gather`: rows of open data for a task of which a few examples are known."""

    shots: list[str] = Field(min_length=1, description="the task's examples: JSONL file or datasets source; repeated")
    pool: list[str] = Field(min_length=1, description="open data to choose from, as shots are given; may be repeated")
    output: str = Field(description="folder to write the chosen rows to")
    exclude: list[str] = Field([], description="rows that must not be found again, such as a test set; repeated")
    encoder: str = Field("minilm", description="text encoder: minilm, a folder, or hidden (the states of --model)")
    model: str | None = Field(None, description="base model, for --encoder hidden only")
    embeddings: str | None = Field(
        None, description="folder that keeps embeddings for later; default: the user's cache"
    )
    limit: int | None = Field(None, ge=1, description="use only the first N rows of every pool")
    overwrite: bool = Field(False, description="replace the output folder if it exists")
    selection: SelectionSettings = SelectionSettings()
    placement: PlacementSettings = PlacementSettings()


AnySettings = TypeVar("AnySettings", bound=Settings)


def flat_fields(kind: type[Settings]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every field with its plain name, groups opened up."""
    for name, field in kind.model_fields.items():
        group = _group(field)
        if group is None:
            yield name, field
        else:
            yield from flat_fields(group)


def from_flat(kind: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Build settings from plain names, putting each into its group.

    Raises:
        CoterieError: for an unknown name or a value that does not fit, naming the field, its value and the reason.
    """
    known = [name for name, _ in flat_fields(kind)]
    for name in values:
        if name not in known:
            raise unknown_name("setting", name, known)
    return checked(kind, _grouped(kind, values))


def checked(kind: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Build settings from grouped values, as they stand in a YAML file.

    Raises:
        CoterieError: for an unknown name or a value that does not fit.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][-1]).replace("_", "-") if first["loc"] else "settings"
        given = "" if first["type"] == "missing" else f", got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise CoterieError(f"--{name}: {message[:1].lower()}{message[1:]}{given}") from error


def _group(field: FieldInfo) -> type[Settings] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _grouped(kind: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        group = _group(field)
        if group is not None:
            result[name] = _grouped(group, values)
        elif name in values:
            result[name] = values[name]
    return result
