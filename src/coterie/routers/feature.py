"""Routers that look at a prompt through a feature: a gradient, an embedding."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import write_tensors
from coterie.backbone.loading import Backbone
from coterie.data.batching import TokenRow
from coterie.experts.bank import check_names
from coterie.experts.checkpoint import load_checkpoint
from coterie.features.embedding import Encoder, HiddenStateEncoder, load_encoder
from coterie.features.gradient import GradientFeatures
from coterie.features.growing_text import AveragedStates, FeatureExtractor, GrowingFeatures
from coterie.features.prefill import MiddleStates, Pooling, PrefillStates
from coterie.routers.base import Router, RouterParts
from coterie.settings.groups import FeatureSettings
from coterie.settings.reading import checked


class FeatureRouter(Router):
    """Weighs experts by a prompt's feature; prompts whose features are known can be routed by several of these."""

    def __init__(self, extractor: FeatureExtractor, centre: Float[Tensor, " dimension"] | None = None) -> None:
        """Store what extracts features, and the training mean that is subtracted from every feature (None: none)."""
        self.extractor = extractor
        self.centre = centre

    @property
    def features(self) -> FeatureExtractor:
        """What extracts features."""
        return self.extractor

    def read(self, prompts: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        """Extract the prompts' features."""
        return self.extractor(prompts)

    @property
    def readings(self) -> Mapping[Hashable, Callable[[Sequence[TokenRow]], Any]]:
        """The features, by what they are made from."""
        return {self.extractor.key: self.extractor}

    @property
    def growing(self) -> GrowingFeatures:
        """The states that the base model computes anyway, where those are what is embedded."""
        encoder = self.extractor.encoder
        return AveragedStates(encoder) if isinstance(encoder, HiddenStateEncoder) else super().growing

    def _centred(self, features: Float[Tensor, "row dimension"]) -> Float[Tensor, "row dimension"]:
        return features if self.centre is None else features - self.centre

    def _save(self, path: Path, tensors: Mapping[str, Tensor], **fields: Any) -> dict[str, Any]:
        """Write tensors and the centre; return the entry with these fields and what the features are made from."""
        write_tensors(path, tensors if self.centre is None else {**tensors, "centre": self.centre})
        return {"kind": self.kind, "description": self.extractor.name, **fields, **self.extractor.record}


def load_extractor(record: Mapping[str, Any], parts: RouterParts) -> FeatureExtractor:
    """Build what extracts a saved router's features from the router's entry in mixture.json.

    Raises:
        CoterieError: for a bad name, a checkpoint that is missing or broken, or an encoder that cannot be had.
    """
    if record.get("description", "gradient") == "embedding":
        return embedding_extractor(record["encoder"], parts.backbone)
    if record.get("description") == PrefillStates.name:
        return prefill_extractor(parts.backbone, int(record["layer"]), record["pooling"])
    if record.get("description") == MiddleStates.name:
        return middle_extractor(parts.backbone, record["layers"])
    kept = {key: record[key] for key in ("checkpoints", "features", "seed")}
    check_names(kept["checkpoints"])
    folder = parts.run / "checkpoints"
    checkpoints = [load_checkpoint(folder / name, parts.backbone.model) for name in kept["checkpoints"]]
    settings = checked(FeatureSettings, kept["features"])
    kept["features"] = settings.model_dump()
    features = GradientFeatures(parts.backbone, checkpoints, settings, kept["seed"])
    return FeatureExtractor("gradient", features, kept)


def embedding_extractor(name: str, backbone: Backbone) -> FeatureExtractor:
    """Embed prompts by a sentence encoder.

    Raises:
        CoterieError: when there is no such encoder.
    """
    encoder = load_encoder(name, backbone)
    return FeatureExtractor("embedding", encoder.rows, {"encoder": name}, encoder)


def prefill_extractor(backbone: Backbone, layer: int, pooling: Pooling) -> FeatureExtractor:
    """Describe prompts by the base model's states behind a block.

    Raises:
        CoterieError: when there is no such block.
    """
    states = PrefillStates(backbone, layer, pooling)
    return FeatureExtractor(states.name, states.rows, {"layer": layer, "pooling": pooling}, states)


def middle_extractor(backbone: Backbone, layers: Sequence[int]) -> FeatureExtractor:
    """Describe prompts by the kind of text that they are.

    Raises:
        CoterieError: when there is no such block.
    """
    states = MiddleStates(backbone, [int(layer) for layer in layers])
    return FeatureExtractor(states.name, states.rows, {"layers": list(layers)}, states)


def growing_text_extractor(
    name: str, window: int | None, backbone: Backbone, *, tail: bool = True
) -> tuple[FeatureExtractor, Encoder]:
    """Embed the last tokens of texts that an encoder can read, so that what is written last keeps counting.

    Without `tail` it is the first ones, as published: of a text that fills the window, nothing that follows counts.

    Raises:
        CoterieError: when there is no such encoder.
    """
    encoder = load_encoder(name, backbone, tail=tail, window=window)
    record = {"encoder": name, "window": window, **({} if tail else {"tail": False})}
    return FeatureExtractor("growing-text", encoder.rows, record, encoder), encoder
