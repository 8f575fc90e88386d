"""Groups of settings that commands share: their fields become plain flags."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_serializer

from coterie.settings.reading import Settings
from coterie.settings.sampling import SamplingSettings as SamplingSettings
from coterie.settings.workers import WorkerSettings

FeatureForm = Literal["adam", "adam-centred", "sgd"]
Projection = Literal["sketch", "rademacher"]
CacheUse = Literal["keep", "recompute"]
SimilarityRule = Literal["max-cosine", "convex-hull", "kde"]
ClusterMethod = Literal["birch", "spherical-kmeans", "birch-pca", "kmeans-pca"]


def _check_every(written: str | None) -> str | None:
    if written not in (None, NEVER) and not (written.isascii() and written.isdigit() and int(written)):
        raise ValueError("give a number of tokens from 1 upwards, or inf")
    return written


NEVER = "inf"
Every = Annotated[str, AfterValidator(_check_every)]
"""After how many tokens an answer is re-routed, as it is written; see `rerouting_interval`."""


def rerouting_interval(every: str) -> int | None:
    """Return the number of tokens that share weights; None for all of them."""
    return None if every == NEVER else int(every)


class PlacementSettings(Settings):
    """Holding the base model in memory."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="float32, bfloat16, float16, or auto: float32 on CPU, the checkpoint's own elsewhere"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    load_in_4bit: bool = Field(False, description="hold the base in 4 bits (NF4); needs the extra 'quant'")
    quantize: Literal["int8"] | None = Field(
        None, description="int8: hold the base's linear layers in 8 bits, on a CPU; faster, and a little less exact"
    )


class ModelSettings(PlacementSettings):
    """The base model, and how it is held in memory."""

    model: str = Field(
        description="base model: hub id, local folder, .gguf file, or an alias: smollm2-135m, gemma3-270m"
    )
    revision: str | None = Field(None, description="revision of a hub model (branch, tag or commit)")


class LoraSettings(Settings):
    """Shape of every adapter."""

    rank: int = Field(8, ge=1, description="rank r of every adapter")
    alpha: int | None = Field(None, ge=1, description="LoRA alpha; default 4 times the rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the input of the LoRA branch while training")
    target_modules: str = Field("all-linear", description="all-linear, or names of linear layers separated by commas")


class TrainingSettings(Settings):
    """Training of an adapter from a fresh start."""

    epochs: int = Field(2, ge=1, description="epochs of an adapter that is trained from a fresh start")
    learning_rate: float = Field(5e-5, gt=0, description="its peak learning rate, decaying linearly to 0")
    batch_size: int = Field(16, ge=1, description="examples per optimiser step")
    micro_batch_size: int = Field(
        8, ge=1, description="examples per forward pass, at most: as many as divide the batch size"
    )
    max_length: int = Field(2048, ge=8, description="longest example in tokens; longer ones are dropped and counted")
    system_prompt: str | None = Field(
        None, description="system prompt put before every example; default: the template's own"
    )
    report_to: str = Field("none", description="experiment tracker known to transformers, such as trackio or wandb")


class ExpertSettings(Settings):
    """Training of the clusters' experts, continued from the base adapter."""

    expert_epochs: int = Field(2, ge=1, description="epochs of every cluster's expert")
    expert_learning_rate: float = Field(2e-5, gt=0, description="peak learning rate of the experts")


class FeatureSettings(Settings):
    """Gradient features of prompts."""

    form: FeatureForm = Field("adam", description="adam (the paper's), adam-centred (minus the training mean) or sgd")
    projection: Projection = Field("sketch", description="sketch (fast) or rademacher (the paper's dense +-1)")
    d_proj: int = Field(8192, ge=2, le=2**20, description="dimensions after projection")
    blocks: str = Field("all", description="blocks whose gradients count: all, or last:K")
    loss_on: Literal["user-text", "prompt"] = Field(
        "user-text", description="tokens that carry loss: the user's own text, or the whole rendered prompt"
    )
    feature_batch_size: int = Field(8, ge=1, description="prompts per forward and backward pass")


class ClusterSettings(Settings):
    """Clustering of training rows."""

    idle_with = {"cluster_threshold": ("cluster_method", ("spherical-kmeans", "kmeans-pca"))}

    clusters: int = Field(5, ge=2, description="clusters asked for in the first round")
    cluster_rounds: int = Field(3, ge=1, le=3, description="rounds of splitting clusters that stayed too large")
    max_clusters: int = Field(10, ge=2, description="most clusters that splitting makes (the paper has 8 to 10)")
    cluster_method: ClusterMethod = Field(
        "birch", description="birch (the paper's), spherical-kmeans, birch-pca or kmeans-pca"
    )
    cluster_threshold: float | None = Field(None, gt=0, description="BIRCH leaf radius; default: chosen from the data")
    cluster_sample: int = Field(5000, ge=10, description="rows the clustering is fitted on")
    normalise_features: bool = Field(True, description="scaling of features to unit length before clustering")


class SimilaritySettings(Settings):
    """Routing by similarity to what every expert was made for."""

    idle_with = {"centroids": ("centroids_by", ("performance",))}

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


class DomainTrainingSettings(TrainingSettings):
    """Training of one adapter per domain.

    The rate is the usual one for LoRA, since nothing continues from these adapters.
    """

    learning_rate: float = Field(2e-4, gt=0, description="its peak learning rate, decaying linearly to 0")


class ReroutingSettings(Settings):
    """Re-routing while an answer is written."""

    every: Every = Field("1", description="re-route at every N-th token of an answer; inf: never")
    cache: CacheUse = Field("keep", description="keep what earlier weights left in the KV cache, or recompute it")


class EndpointSettings(Settings):
    """Asking endpoints."""

    concurrency: int = Field(8, ge=1, description="requests that one endpoint gets at the same time")
    requests_per_minute: int | None = Field(None, ge=1, description="most requests a minute to one endpoint")
    retries: int = Field(4, ge=0, description="further tries of a request that an endpoint turned away or let wait")


class ExpertServingSettings(EndpointSettings, WorkerSettings):
    """Serving several models and endpoints side by side."""

    memory: float | None = Field(
        None, gt=0, description="GiB that loaded models may take together; default: what is free at the start"
    )
    timeout: float = Field(120.0, gt=0, description="seconds that an endpoint may take for one answer")


class RoutingSettings(Settings):
    """Another router, combiner or method for this call."""

    router: str | None = Field(
        None, description="another router: uniform, an expert's name, or a router's, such as loss or arrow"
    )
    combiner: str | None = Field(
        None, description="let experts meet elsewhere: logits, layers, weights, weights:svd:16 and others, or texts"
    )
    method: str | None = Field(None, description="answer as another method of the table does; see `coterie methods`")
    top_k_experts: int | None = Field(None, ge=1, description="keep only the K experts with the largest weights")
    every: Annotated[str | None, AfterValidator(_check_every)] = Field(
        None, description="re-route at every N-th token of an answer, or never (inf); default: as fitted"
    )
    cache: CacheUse | None = Field(None, description="with --every: keep or recompute what earlier weights have left")


JUDGE_FOLDS = 4
"""Copies that saw half of a few hundred rows were trained for half of the steps, and ranked unlike the experts."""
JudgeFolds = Annotated[
    int, Field(ge=2, description="parts of the rows: experts are judged on each by copies trained on the others")
]


class ExtrasSettings(Settings):
    """Training of what methods need beyond a fitted run.

    A record holds what was asked for alone: what is trained already may have been trained in another way.
    """

    encoder: str = Field(
        "minilm",
        description="sentence encoder of instruction-embedding: minilm, hidden (the base model's), a folder or hub id",
    )
    ensemble_size: int = Field(4, ge=2, description="adapters of lora-ensembles, the base adapter among them")
    gate_epochs: int = Field(1, ge=1, description="epochs of mole's gates")
    gate_learning_rate: float = Field(2e-5, gt=0, description="peak learning rate of mole's gates")
    lorahub_steps: int = Field(40, ge=1, description="weightings of adapters that lorahub tries on the shots")
    judge_folds: JudgeFolds = JUDGE_FOLDS
    unlike: str | None = Field(
        None, description="rows unlike the training data, by which routers learn to refuse; default: 56 that come along"
    )

    @model_serializer(mode="wrap")
    def _asked_for(self, plain: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in plain(self).items() if name in self.model_fields_set}


class FewShotSettings(Settings):
    """Few-shot prompting: solved examples before every question."""

    idle_with = {"few_shot_count": ("few_shot", ([],)), "longest_prompt": ("few_shot", ([],))}

    few_shot: list[str] = Field([], description="data to take solved examples from; may be repeated")
    few_shot_count: int = Field(
        3, ge=1, description="solved examples before a question, of its own source and category"
    )
    longest_prompt: int = Field(
        1200, ge=8, description="tokens of a prompt; solved examples are left out until it fits"
    )


class SkillSettings(Settings):
    """Finding the skills that a question needs."""

    idle_with = {
        "skill_list": ("skills", (None, "keywords", "category", "source")),
        "synonyms": ("skills", ("choice", "category", "source")),
    }

    skills: Literal["keywords", "choice", "category", "source"] | None = Field(
        None,
        description="keywords: a model names them, 5 samples a question; choice: it picks from a list, one prefill a "
        "question; category, source: the rows bring them; default: category or source where rows share them",
    )
    skill_expert: str | None = Field(None, description="expert that is asked for skills; default: the first")
    skill_list: str | None = Field(
        None, description="skills to choose from, separated by commas; default: the categories of the rows"
    )
    encoder: str = Field("minilm", description="what finds the nearest skill by meaning: minilm, a folder, or none")
    synonyms: float = Field(0.8, gt=0, description="cosine from which two skills count as one; above 1: none do")


class RecruitSettings(Settings):
    """Recruiting experts for a question."""

    recruits: int = Field(3, ge=1, description="experts drawn for every question")
    profile: Literal["counts", "shrunk"] = Field(
        "shrunk", description="counts: +1 and -1 for right and wrong (the paper's); shrunk: towards each expert's mean"
    )
    sampler: Literal["power", "softmax", "top"] = Field(
        "power", description="power (the published code's), softmax (the paper's), or top: the best, without chance"
    )
    replacement: bool = Field(
        True, description="drawing with replacement: an expert may answer a question several times"
    )
    min_share: float = Field(
        0.05, ge=0, le=1, description="experts recruited for a smaller share of the questions are replaced"
    )


class GatherRowsSettings(Settings):
    """Gathering rows of open data: similar to the shots, diverse among themselves."""

    idle_with = {"gamma": ("rule", ("max-cosine", "convex-hull"))}

    budget: int = Field(1000, ge=1, description="rows to choose")
    rule: SimilarityRule = Field(
        "max-cosine", description="similarity to one shot (max-cosine), to their hull (convex-hull), or density (kde)"
    )
    gamma: float = Field(2.0, gt=0, description="sharpness of kde")
    dedup: Literal["greedy", "published"] = Field(
        "greedy", description="greedy: pass over near-duplicates until the budget is full; published: drop them from it"
    )
    tau: float = Field(0.9, gt=0, le=1, description="chosen rows have at most this cosine among themselves")
    exclude_tau: float = Field(0.9, gt=0, le=1, description="largest cosine to an example or an excluded row")
    block_rows: int = Field(8192, ge=1, description="rows of open data held in memory at a time")


class RationaleSettings(Settings):
    """Rationales: the reasoning behind the shots' answers.

    Their perplexity tells how well an adapter follows it.
    """

    idle_with = {"rationale_order": ("rationales", ("data",)), "rationale_tokens": ("rationales", ("data",))}

    rationales: str = Field(
        "data",
        description="data: the shots' own responses; or who writes them, shown the answer: a base model, an adapter's "
        "folder, or an endpoint as URL#MODEL; what was written once is kept in the user's cache",
    )
    rationale_order: Literal["answer-first", "rationale-first"] = Field(
        "answer-first", description="what comes first in a written rationale: answer-first or rationale-first"
    )
    rationale_tokens: int = Field(96, ge=8, description="longest written rationale in tokens")


RankBy = Annotated[
    Literal["both", "accuracy", "perplexity"],
    Field(description="what adapters are ranked by on the shots; both adds the two ranks"),
]
Diversity = Annotated[
    Literal["updates", "factors", "none"],
    Field(description="compare adapters by their updates B A, by A and B as published, or not at all"),
]


class SelectAdaptersSettings(Settings):
    """Selecting adapters by the shots (arXiv 2408.15915, algorithm 1)."""

    idle_with = {"max_new_tokens": ("rank_by", ("perplexity",)), "candidates": ("diversity", ("none",))}

    keep: int = Field(4, ge=1, description="adapters to choose (the paper's N)")
    candidates: int | None = Field(
        None,
        ge=1,
        description="best adapters from which the most diverse group is taken (M); default: 8, of a bank of fewer than "
        "16 the better half",
    )
    rank_by: RankBy = "both"
    perplexity_of: Literal["mean", "sum"] = Field(
        "mean", description="a shot's NLL: mean over its tokens, or their sum, as the paper writes it"
    )
    diversity: Diversity = "updates"
    halving: int | None = Field(
        None, ge=1, description="score all adapters on so many shots only, then the better half on twice as many, ..."
    )
    exclude_leaks: bool = Field(False, description="leave out adapters that were trained on a shot or an excluded row")
    exclude: list[str] = Field([], description="rows that must not be known, such as a test set; may be repeated")
    max_new_tokens: int | None = Field(None, ge=1, description="longest answer to a shot; default: the task's")
    group_size: int = Field(4, ge=1, description="adapters that are held in memory and scored together")
    scoring_batch_size: int = Field(16, ge=1, description="answers that are decoded together")


class GateSettings(Settings):
    """Token gates of the mixture."""

    top_k_experts: int = Field(2, ge=1, description="experts that take part at every token of every layer")
    gate_start: Literal["random", "arrow"] = Field(
        "random", description="gates at the start: random, as published, or the experts' strongest directions (Arrow)"
    )
    train: Literal["all", "gates"] = Field("all", description="train experts and gates together, or gates only")
    balance: float = Field(0.0, ge=0, description="weight of a loss that spreads tokens evenly over the experts")
    expert_dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the experts' input while training")


class TaskTrainingSettings(TrainingSettings):
    """Training of the task's mixture, as published."""

    epochs: int = Field(5, ge=1, description="epochs over shots and gathered rows")
    batch_size: int = Field(32, ge=1, description="examples per optimiser step")
