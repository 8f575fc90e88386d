"""Embeddings of plain texts, kept by content: a text that was embedded once is never embedded again."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coterie.artifacts import hash_text, open_regular, real_folder, sha256_of, write_tensors
from coterie.backbone.aliases import cache_folder
from coterie.backbone.loading import Backbone, load_backbone
from coterie.data.streaming import KEY_BYTES, as_keys, text_key
from coterie.errors import CoterieError
from coterie.features.embedding import HIDDEN, Encoder, HiddenStateEncoder, SentenceEncoder, encoder_folder
from coterie.settings.groups import ModelSettings, PlacementSettings

ENCODER_FILES = (".json", ".safetensors", ".txt", ".model")

Keys = Shaped[np.ndarray, " text"]
"""One key of `KEY_BYTES` bytes a text, of the dtype S16."""


@dataclass(frozen=True)
class TextEncoder:
    """An encoder of plain texts.

    Attributes:
        encode: what embeds.
        identity: hash of everything that its embeddings depend on.
    """

    encode: Encoder
    identity: str


def load_text_encoder(name: str, model: str | None, placement: PlacementSettings) -> TextEncoder:
    """Load an encoder for texts that belong to no base model's prompts.

    Args:
        name: `minilm`, a local folder in the form of sentence-transformers, or `hidden`.
        model: the base model whose hidden states `hidden` averages; None for the others, which need none.
        placement: how the base model is held, and the device of any encoder.

    Raises:
        CoterieError: when there is no such encoder, it cannot be loaded, or a base model is lacking or too much.
    """
    if (name == HIDDEN) != (model is not None):
        raise CoterieError("--encoder hidden and --model belong together: give both or neither")
    if model is not None:
        return hidden_encoder(load_backbone(ModelSettings(model=model, **placement.model_dump())), placement)
    folder, device = encoder_folder(name, HIDDEN), placement.device
    if device == "auto":
        device = str((torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or "cpu")
    encoder = SentenceEncoder(folder, name=name, device=device)
    files = sorted(file for file in folder.rglob("*") if file.suffix in ENCODER_FILES)
    return TextEncoder(encoder, hash_text(*(str(file.relative_to(folder)) for file in files), sha256_of(*files)))


def hidden_encoder(backbone: Backbone, placement: PlacementSettings) -> TextEncoder:
    """Embed texts by the hidden states of a base model that is loaded already."""
    held = f"{backbone.model.get_input_embeddings().weight.dtype} {placement.load_in_4bit}"
    held += f" {placement.quantize}" if placement.quantize else ""
    return TextEncoder(HiddenStateEncoder(backbone), hash_text(HIDDEN, backbone.identity.sha256, held))


def text_keys(texts: Sequence[str]) -> Keys:
    """Return the keys of texts."""
    return as_keys(b"".join(map(text_key, texts)))


class EmbeddingStore:
    """Embeddings of one encoder on disk, in safetensors shards of keys and vectors."""

    def __init__(self, encoder: TextEncoder, folder: Path | None = None) -> None:
        """Open the encoder's own part of a folder.

        Args:
            encoder: what embeds texts that are not there yet.
            folder: where embeddings are kept, by default in the user's cache.
        """
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(encoder.encode.name).name)
        self.folder = (folder or cache_folder() / "embeddings") / f"{name}-{encoder.identity[:KEY_BYTES]}"
        self._encode = encoder.encode

    def missing(self, keys: Keys) -> Bool[np.ndarray, " text"]:
        """Tell which of these texts were never embedded."""
        return StoredRows(self.folder, keys, self._encode.dimensions).places < 0

    def add(self, texts: Sequence[str]) -> None:
        """Embed texts and keep the embeddings as one shard.

        Raises:
            CoterieError: when an embedding is not finite, or the folder's part of this encoder is a link.
        """
        keys, embeddings = text_keys(texts), self._encode(texts)
        broken = (~embeddings.isfinite().all(dim=1)).nonzero()
        if len(broken):
            raise CoterieError(f"the encoder makes no numbers of the text {texts[int(broken[0])][:40]!r}; use another")
        name = hashlib.sha256(keys.tobytes()).hexdigest()[: 2 * KEY_BYTES]
        columns = torch.from_numpy(np.frombuffer(keys.tobytes(), np.uint8).reshape(-1, KEY_BYTES).copy())
        folder = real_folder(self.folder.parent.resolve(), self.folder.name)
        write_tensors(folder / f"{name}.safetensors", {"keys": columns, "embeddings": embeddings})

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "text dimension"]:
        """Return the embeddings of a few texts, making those that are missing."""
        by_key = {text_key(text): text for text in texts}
        missing = self.missing(as_keys(b"".join(by_key)))
        if missing.any():
            self.add([text for text, new in zip(by_key.values(), missing, strict=True) if new])
        return self.rows(text_keys(texts))[:]

    def rows(self, keys: Keys) -> "StoredRows":
        """Return the embeddings of texts that were all added before, as rows that are read when they are asked for.

        Raises:
            CoterieError: when one of them is not there.
        """
        rows = StoredRows(self.folder, keys, self._encode.dimensions)
        if (rows.places < 0).any():
            raise CoterieError(f"{self.folder} lost embeddings while they were needed; start again")
        return rows


class StoredRows:
    """Embeddings that stay on disk; `rows[numbers]` and `rows[start:stop]` read them.

    Attributes:
        places: where every row stands, counted through all shards, one after the other; -1 where it is nowhere.
        dimensions: of an embedding.
    """

    def __init__(self, folder: Path, keys: Keys, dimensions: int) -> None:
        """Find the places of these keys in the shards of a folder.

        Raises:
            CoterieError: when a shard is broken or of another encoder.
        """
        self.dimensions = dimensions
        self._files = sorted(folder.glob("*.safetensors"))
        found = [as_keys(b"")]
        for file in self._files:
            open_regular(file).close()  # a pipe would be waited for
            with _shard_errors(file), safe_open(file, "pt") as shard:
                own = shard.get_tensor("keys")
                shape = shard.get_slice("embeddings").get_shape()
            if shape != [len(own), dimensions] or own.shape[1:] != (KEY_BYTES,):
                raise CoterieError(f"{file} holds no embeddings of this encoder; delete the file, it is made again")
            found.append(as_keys(own.numpy().tobytes()))
        self._starts = np.cumsum(list(map(len, found)))
        known = np.concatenate(found)
        self.places: Int[np.ndarray, " row"] = np.full(len(keys), -1)
        if len(known):
            order = np.argsort(known, kind="stable")
            spot = np.searchsorted(known, keys, sorter=order).clip(max=len(known) - 1)
            self.places = np.where(known[order[spot]] == keys, order[spot], -1)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.places)

    def __getitem__(self, rows: slice | Int[np.ndarray, " row"]) -> Float[Tensor, "row dimension"]:
        """Read some rows: neighbours on disk together, every shard once."""
        places = self.places[rows]
        result = torch.empty(len(places), self.dimensions)
        order = np.argsort(places, kind="stable")
        shards = np.searchsorted(self._starts, places[order], side="right") - 1
        for shard in np.unique(shards):
            wanted = order[shards == shard]
            inside = places[wanted] - self._starts[shard]
            cuts = np.flatnonzero(np.diff(inside) != 1) + 1  # between runs of neighbours, each read in one piece
            file = self._files[shard]
            with _shard_errors(file), safe_open(file, "pt") as held:
                vectors = held.get_slice("embeddings")
                for run, targets in zip(np.split(inside, cuts), np.split(wanted, cuts), strict=True):
                    result[torch.from_numpy(targets)] = vectors[int(run[0]) : int(run[-1]) + 1]
        return result


@contextmanager
def _shard_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CoterieError(f"{file} is broken ({error}); delete the file, it is made again") from error
