"""Reading the parts of a mixture's folder, which may come from a stranger."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.artifacts import FORMAT, hub_folder, read_json, read_tensors
from coterie.backbone.loading import Backbone
from coterie.errors import CoterieError, unknown_name
from coterie.experts.bank import ExpertBank, check_names
from coterie.experts.training import load_checkpoint
from coterie.features.embedding import Encoder, load_encoder
from coterie.features.gradient import GradientFeatures
from coterie.features.growing_text import follow
from coterie.routers.base import Router
from coterie.routers.centroid import CentroidRouter, read_centroids
from coterie.routers.derived import DerivedRouter
from coterie.routers.feature import Description
from coterie.routers.fixed import FixedRouter
from coterie.routers.gate import GateRouter, read_gates
from coterie.routers.loss import LossRouter, Ridge
from coterie.routers.performance import PerformanceRouter, read_pilots
from coterie.routers.similarity import check_dimensions, read_similarity
from coterie.routers.source import SourceRouter
from coterie.routers.spectral import spectral_router
from coterie.routers.token import TokenLevel
from coterie.settings.groups import FeatureSettings


def local_folder(source: str) -> Path:
    """Return a mixture's folder, from the hub if it is no local one.

    Raises:
        CoterieError: when it is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    advice = f"there is no mixture folder {source}; make one with: coterie fit elrea --output {source} ..."
    return hub_folder(source, ["*.json", "*.jsonl", "*.safetensors", "*.yaml", "*.md"], advice)


def read_mixture_record(folder: Path) -> dict[str, Any]:
    """Read and check `mixture.json`.

    Raises:
        CoterieError: when it is missing, of another format, or lacks a field.
    """
    record = read_json(folder / "mixture.json")
    if record.get("format") != FORMAT:
        raise CoterieError(
            f"{folder / 'mixture.json'} has format {record.get('format')!r}, not {FORMAT}; upgrade coterie or fit again"
        )
    if "pool" in record:
        raise CoterieError(
            f"{folder} holds a {record.get('method')} method, whose experts need not share a base model; "
            "coterie generate, plan and eval take it"
        )
    shapes = {"method": str, "base_model": dict, "experts": list, "router": dict, "combiner": dict}
    wrong = [name for name, kind in shapes.items() if not isinstance(record.get(name), kind)]
    if wrong or "kind" not in record["combiner"]:
        raise CoterieError(
            f"{folder / 'mixture.json'} lacks a proper {(wrong or ['combiner kind'])[0]!r}; get the folder again"
        )
    check_names(record["experts"])
    return record


@dataclass(frozen=True)
class RouterParts:
    """What routers are built from.

    Attributes:
        folder: where its tensors lie.
        run: the mixture's folder, where the checkpoints of gradients lie.
        backbone: the base model.
        bank: experts that gates may weigh.
    """

    folder: Path
    run: Path
    backbone: Backbone
    bank: ExpertBank

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one of the router's tensor files."""
        return read_tensors(self.folder / f"{name}.safetensors")


def load_router(record: Mapping[str, Any], parts: RouterParts) -> Router:
    """Build a router from its entry in `mixture.json`.

    Raises:
        CoterieError: for an unknown kind, or missing or broken parts.
    """
    kind = str(record.get("kind"))
    if kind not in ROUTERS:
        raise unknown_name("router", kind, ROUTERS)
    try:
        return ROUTERS[kind](record, parts)
    except (KeyError, TypeError, ValueError) as error:
        raise CoterieError(
            f"{parts.folder}: the entry of the router {kind!r} is broken ({error}); fit again"
        ) from error


def describe_by_gradient(record: Mapping[str, Any], run: Path, backbone: Backbone) -> Description:
    """Describe prompts by their gradients at a run's checkpoints.

    Raises:
        CoterieError: for a bad name, or a checkpoint that is missing or broken.
    """
    kept = {key: record[key] for key in ("checkpoints", "features", "seed")}
    check_names(kept["checkpoints"])
    checkpoints = [load_checkpoint(run / "checkpoints" / name, backbone.model) for name in kept["checkpoints"]]
    features = GradientFeatures(backbone, checkpoints, FeatureSettings(**kept["features"]), kept["seed"])
    return Description("gradient", features, kept)


def describe_by_embedding(name: str, backbone: Backbone) -> Description:
    """Describe prompts by a sentence encoder.

    Raises:
        CoterieError: when there is no such encoder.
    """
    encoder = load_encoder(name, backbone)
    return Description("embedding", encoder.rows, {"encoder": name}, partial(follow, encoder))


def describe_growing_text(name: str, window: int | None, backbone: Backbone) -> tuple[Description, Encoder]:
    """Describe texts by the last tokens that an encoder can read, so that what is written last keeps counting.

    Raises:
        CoterieError: when there is no such encoder.
    """
    encoder = load_encoder(name, backbone, tail=True, window=window)
    record = {"encoder": name, "window": window}
    return Description("growing-text", encoder.rows, record, partial(follow, encoder)), encoder


def _description(record: Mapping[str, Any], parts: RouterParts) -> Description:
    if record.get("description", "gradient") == "embedding":
        return describe_by_embedding(record["encoder"], parts.backbone)
    return describe_by_gradient(record, parts.run, parts.backbone)


def _fixed(record: Mapping[str, Any], parts: RouterParts) -> Router:
    return FixedRouter({str(name): float(weight) for name, weight in record["weights"].items()})


def _centroids(record: Mapping[str, Any], parts: RouterParts) -> Router:
    centroids, centre = read_centroids(parts.tensors("centroids"), record["experts"])
    description = _description(record, parts)
    return CentroidRouter(description, centroids, record["experts"], base=record["base"], centre=centre)


def _performance(record: Mapping[str, Any], parts: RouterParts) -> Router:
    tensors = parts.tensors("pilots")
    pilots = read_pilots(tensors, record["experts"])
    return PerformanceRouter(_description(record, parts), pilots, tensors.get("centre"))


def _loss(record: Mapping[str, Any], parts: RouterParts) -> Router:
    tensors = parts.tensors("loss")
    ridge = Ridge(tensors["weight"].float(), tensors["bias"].float())
    sharpness = float(record["sharpness"])
    return LossRouter(_description(record, parts), ridge, record["experts"], sharpness, tensors.get("centre"))


def _similarity(record: Mapping[str, Any], parts: RouterParts) -> Router:
    description, encoder = describe_growing_text(record["encoder"], record["window"], parts.backbone)
    router = read_similarity(record, parts.tensors("centroids"), description)
    check_dimensions(encoder.name, encoder.dimensions, router.centroids)
    return router


def _token_level(record: Mapping[str, Any], parts: RouterParts) -> Router:
    every = None if record["every"] is None else int(record["every"])
    return TokenLevel(load_router(record["of"], parts), every, record["cache"])


def _gate(record: Mapping[str, Any], parts: RouterParts) -> Router:
    names = record["experts"]
    adapters = [parts.bank.adapters[parts.bank.index(name)] for name in names]
    score = str(record.get("score", "linear"))
    return GateRouter(parts.backbone, adapters, read_gates(parts.tensors("gates"), names, score, **_choosing(record)))


def _spectral(record: Mapping[str, Any], parts: RouterParts) -> Router:
    null = record["null"]
    named = {"null": str(null["name"]), "null_cosine": float(null["cosine"])} if null else {}
    options: dict[str, Any] = {**_choosing(record), **named}
    return spectral_router(record["kind"], parts.backbone, parts.bank, record["experts"], **options)


def _choosing(record: Mapping[str, Any]) -> dict[str, Any]:
    """Read how gates turn scores into weights."""
    top_k, temperature = record.get("top_k"), record.get("temperature", 1.0)
    return {"top_k": None if top_k is None else int(top_k), "temperature": float(temperature)}


def _source(record: Mapping[str, Any], parts: RouterParts) -> Router:
    return SourceRouter({str(source): str(name) for source, name in record["experts"].items()})


def _derived(record: Mapping[str, Any], parts: RouterParts) -> Router:
    top_k = None if record["top_k"] is None else int(record["top_k"])
    return DerivedRouter(load_router(record["of"], parts), top_k=top_k, normalised=bool(record["normalised"]))


ROUTERS: dict[str, Callable[[Mapping[str, Any], RouterParts], Router]] = {
    "fixed": _fixed,
    "gradient-centroids": _centroids,
    "embedding-centroids": _centroids,
    "performance-centroids": _performance,
    "loss": _loss,
    "similarity": _similarity,
    "token-level": _token_level,
    "gate": _gate,
    "arrow": _spectral,
    "spectr": _spectral,
    "source": _source,
    "derived": _derived,
}
"""How every kind of router is read."""
