"""Adapters on the model hub that fit a base model: looked at by their heads, before anything is downloaded."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.utils import cached_file

from coterie.artifacts import Claim, hub_errors, may_be_on_hub
from coterie.backbone.aliases import ALIASES, fetch_alias, hub_name
from coterie.backbone.memory import twin
from coterie.errors import CoterieError
from coterie.experts.bank import CONFIG_FILE, WEIGHTS_FILE, claimed_layers, rank_and_alpha, read_config
from coterie.experts.cards import ADAPTER_FILES, labels, short
from coterie.records.wording import printable
from coterie.settings.hub import BankFindSettings
from coterie.settings.keywords import takes_fields

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

LONGEST_REASON = 300


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter on the hub that names the base model as its own.

    Attributes:
        name: OWNER/NAME.
        revision: the commit that was looked at.
        licence: as its card states it.
        datasets: from its card too.
        downloads: within a month.
        rank: the largest of its layers; 0 where it was refused before its file was looked at.
        layers: that it changes.
        parameters: numbers in all its factors.
        refusal: why it does not fit; None where it does.
    """

    name: str
    revision: str
    licence: str | None
    datasets: tuple[str, ...]
    downloads: int
    rank: int = 0
    layers: int = 0
    parameters: int = 0
    refusal: str | None = None

    def __str__(self) -> str:
        """Tell it in one line."""
        name = printable(self.name, 200)
        if self.refusal:
            return f"left out {name}: {self.refusal}"
        size = f"rank {self.rank}, {self.layers} layers, {short(self.parameters)} parameters"
        stated = f"licence {self.licence or 'not stated'}, data {', '.join(self.datasets) or 'not stated'}"
        return f"{name}: {size}; {stated}; {self.downloads:,} downloads"


@takes_fields(BankFindSettings)
def find_adapters(settings: BankFindSettings) -> Iterator[FoundAdapter]:
    """Yield the adapters of the hub that name a base model, the most downloaded first: those that fit it and others.

    Of each its card, its configuration and the head of its weights are read. No tensor is downloaded.

    Raises:
        CoterieError: when the base model is not known by a name of the hub, or the hub cannot be asked.
    """
    from huggingface_hub import HfApi

    hub, model = HfApi(library_name="coterie"), _shapes_of(settings.base)
    own = f"base_model:adapter:{hub_name(settings.base)}"
    asked = {"search": settings.search, "limit": settings.limit}
    with hub_errors("the hub cannot be asked for adapters"):
        listing = list(hub.list_models(filter=own, sort="downloads", full=True, cardData=True, **asked))
    for info in listing:
        facts = info.card_data.to_dict() if info.card_data else {}
        found = FoundAdapter(
            name=info.id,
            revision=info.sha or "main",
            licence=", ".join(labels(facts.get("license"))) or None,
            datasets=labels(facts.get("datasets")),
            downloads=info.downloads or 0,
        )
        try:
            _check_offer(info, found, settings)
            with hub_errors("it cannot be looked at"):
                measured = _look_at(hub, found, model)
            if settings.max_rank and measured.rank > settings.max_rank:
                raise CoterieError(f"it has rank {measured.rank}, more than {settings.max_rank}")
            yield measured
        except CoterieError as error:
            yield replace(found, refusal=printable(str(error), LONGEST_REASON))


def _shapes_of(base: str) -> nn.Module:
    """Return the base model without numbers: of the hub's, the configuration alone is read."""
    if base in ALIASES:
        return twin(fetch_alias(base), torch.float32).model
    if not may_be_on_hub(base):
        raise CoterieError(
            f"--base {base} is no name of the hub, by which adapters name their base model; give OWNER/NAME, or one of "
            f"{', '.join(sorted(ALIASES))}"
        )
    with hub_errors(f"{base} cannot be had from the hub", "check the name"):
        return twin(Path(str(cached_file(base, "config.json"))).parent, torch.float32).model


def _check_offer(info: "ModelInfo", found: FoundAdapter, settings: BankFindSettings) -> None:
    """Refuse by what the listing says: licence, and files."""
    wanted = [one.strip().casefold() for one in (settings.licence or "").split(",") if one.strip()]
    if wanted and (found.licence or "").casefold() not in wanted:
        raise CoterieError(f"its licence is {found.licence or 'not stated'}, which is not among {', '.join(wanted)}")
    names = {file.rfilename for file in info.siblings or ()}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in names:
            raise CoterieError(f"it holds no {name}; only plain adapters in safetensors are read")


def _look_at(hub: "HfApi", found: FoundAdapter, model: nn.Module) -> FoundAdapter:
    """Check an adapter's configuration and the head of its weights against the base model, and note its sizes."""
    for file in hub.get_paths_info(found.name, [CONFIG_FILE, WEIGHTS_FILE], revision=found.revision):
        if (size := getattr(file, "size", 0)) > (limit := ADAPTER_FILES[file.path]):
            raise CoterieError(f"{file.path} has {size:,} bytes, more than the {limit:,} that are accepted")
    local = Path(hub.hf_hub_download(found.name, CONFIG_FILE, revision=found.revision))
    config, place = read_config(local.parent), Path(WEIGHTS_FILE)
    head = hub.parse_safetensors_file_metadata(found.name, WEIGHTS_FILE, revision=found.revision)
    claims = {name: Claim(tensor.dtype, tuple(tensor.shape)) for name, tensor in head.tensors.items()}
    layers = claimed_layers(claims, model, place)
    for path, (rank, _, _) in layers.items():
        if rank_and_alpha(config, path, place)[0] != rank:
            raise CoterieError(f"{CONFIG_FILE} gives {path} another rank than the {rank} of its weights")
    return replace(
        found,
        rank=max(rank for rank, _, _ in layers.values()),
        layers=len(layers),
        parameters=sum(rank * (width_in + width_out) for rank, width_in, width_out in layers.values()),
    )
