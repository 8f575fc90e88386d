"""A mixture of adapters that exist already, such as all of a bank: nothing is trained.

It is routed by similarity to the texts that each adapter was made for (Belofsky 2023, arXiv 2311.10847), or by the
adapters' own updates (Arrow, arXiv 2405.11157; SpectR, arXiv 2504.03454), which takes no texts.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coterie import ranks
from coterie.artifacts import as_path, check_output, read_json, run_folder, sha256_of
from coterie.backbone.aliases import named_model
from coterie.backbone.loading import Backbone, BaseModelIdentity, check_identity, load_backbone
from coterie.data.batching import PromptFormat, tokenise
from coterie.data.examples import Example
from coterie.errors import CoterieError
from coterie.experts.bank import CONFIG_FILE, WEIGHTS_FILE, load_bank
from coterie.experts.bank_folder import BankFolder, load_opened, open_bank
from coterie.features.embedding import load_encoder
from coterie.methods.common import copy_expert
from coterie.methods.token_level.centroids import check_centroids
from coterie.methods.token_level.domains import (
    DomainData,
    assemble,
    check_domain_names,
    domain_inputs,
    load_domains,
    named_values,
    sources_by_name,
)
from coterie.mixture import Mixture
from coterie.routers.centroid import SIMILARITY
from coterie.settings.commands import FromAdaptersSettings
from coterie.settings.groups import ModelSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import changed, from_flat

logger = logging.getLogger(__name__)


def from_adapters(
    adapters: str | Path | Mapping[str, str | Path],
    texts: DomainData | None = None,
    *,
    output: str | Path,
    **settings: Any,  # noqa: ANN401
) -> Mixture:
    """Make a mixture of adapters that exist already, routed by what each was made for or by the adapters themselves.

    Args:
        adapters: folder of a bank, or plain PEFT folders by name.
        texts: of adapters, by name: a JSONL file or `datasets` source, several of them, or examples; by default
            what an adapter of a bank was trained on, where its card tells.
        output: folder to write the mixture to.
        **settings: fields of `FromAdaptersSettings` and its groups by their plain names, such as router="arrow".

    Raises:
        CoterieError: as `fit_from_adapters`.
    """
    named, given = sources_by_name(texts or {})
    if isinstance(adapters, Mapping):
        own: dict[str, Any] = {"adapter": [f"{name}={folder}" for name, folder in adapters.items()]}
    else:
        own = {"bank": str(adapters)}
    flat = {**own, "centroid_data": named, "output": str(output), **settings}
    return fit_from_adapters(from_flat(FromAdaptersSettings, flat), given)


@takes_fields(FromAdaptersSettings)
@ranks.by_one(lambda settings: Mixture.from_pretrained(as_path(settings.output)))
def fit_from_adapters(settings: FromAdaptersSettings, given: Mapping[str, Sequence[Example]] | None = None) -> Mixture:
    """Make a mixture of adapters that exist already: check them, copy them, place the centroids of those with texts.

    Raises:
        CoterieError: for an adapter that does not fit or is not as the bank got it, an expert that needs texts and has
            none, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    if settings.bank and settings.revision and not settings.model:
        raise CoterieError("--revision goes with --model; the bank says which base model its adapters are on")
    shelf = _open_shelf(settings)
    backbone = load_backbone(_base_model(settings, shelf))
    _check_adapters(shelf, backbone)
    examples = _texts(settings, shelf, given or {})
    router = _router(settings, shelf, examples)
    if examples:
        load_encoder(settings.similarity.encoder, backbone)
    prompts = PromptFormat(backbone.tokenizer, settings.system_prompt, settings.reading)
    kept = {name: tokenise(prompts, own, settings.max_length, backbone.positions) for name, own in examples.items()}
    check_centroids(kept, settings.similarity)
    hashes = {f"adapter {name}": sha256_of(folder / WEIGHTS_FILE) for name, folder in shelf.folders.items()}
    with run_folder(output, settings, {**domain_inputs(examples, backbone), **hashes}) as run:
        folders = {name: copy_expert(run, name, folder) for name, folder in shelf.folders.items()}
        mixture = assemble(run, backbone, prompts, kept, folders, settings, router)
    return replace(mixture, folder=output)


@dataclass(frozen=True)
class _Shelf:
    """Adapters that are to be one mixture, by name: those of a bank, where one is given, then others."""

    bank: BankFolder | None
    folders: dict[str, Path]


def _open_shelf(settings: FromAdaptersSettings) -> _Shelf:
    """Find the adapters.

    Raises:
        CoterieError: when there is none, one is named twice or has a name that no expert can have.
    """
    names = settings.names and [name.strip() for name in settings.names.split(",")]
    bank = open_bank(settings.bank, names or None) if settings.bank else None
    adapters = {name: bank.folder_of(name) for name in bank.names} if bank else {}
    for name, folders in named_values(settings.adapter, "adapter").items():
        count = len(folders) + (name in adapters)
        if count > 1:
            raise CoterieError(f"the adapter {name} is given {count} times; give every adapter a name of its own")
        adapters[name] = Path(folders[0])
    if bank is None and not adapters:
        raise CoterieError("no adapter is given; add --bank FOLDER, or --adapter NAME=FOLDER for each")
    check_domain_names(adapters)
    return _Shelf(bank, adapters)


def _base_model(settings: FromAdaptersSettings, shelf: _Shelf) -> ModelSettings:
    """Say which base model the adapters are on: the given one, the bank's, or the one that they all name.

    Raises:
        CoterieError: when they name none, or several.
    """
    placement = settings.placement.model_dump()
    if settings.model:
        return ModelSettings(model=settings.model, revision=settings.revision, **placement)
    if shelf.bank:
        base = shelf.bank.base_model
        return ModelSettings(model=base["id"], revision=base["revision"], **placement)
    configs = [read_json(folder / CONFIG_FILE) for folder in shelf.folders.values()]
    written = (own.get("base_model_name_or_path") for own in configs)
    named = sorted({named_model(str(name)) for name in written if name})
    if len(named) != 1:
        raise CoterieError(f"the adapters name {' and '.join(named) or 'no'} base model; choose one with --model")
    return ModelSettings(model=named[0], revision=settings.revision, **placement)


def _check_adapters(shelf: _Shelf, backbone: Backbone) -> None:
    """Refuse adapters that do not fit the base model, before anything is written."""
    others = shelf.folders
    if shelf.bank:
        wanted = BaseModelIdentity(**shelf.bank.base_model)
        check_identity(wanted, backbone.identity, f"{shelf.bank.path} is a bank for")
        load_opened(shelf.bank, backbone.model)
        others = {name: folder for name, folder in others.items() if name not in shelf.bank.names}
    load_bank(others, backbone.model)


def _texts(
    settings: FromAdaptersSettings, shelf: _Shelf, given: Mapping[str, Sequence[Example]]
) -> dict[str, Sequence[Example]]:
    """Load the texts of every adapter that has any: those that were given, or else those that its card names.

    What a card names may have been moved since; that is told.

    Raises:
        CoterieError: for texts of an adapter that is not there, or given ones that are no data.
    """
    named = named_values(settings.centroid_data, "centroid-data")
    if strange := [name for name in named if name not in shelf.folders]:
        known = ", ".join(shelf.folders)
        raise CoterieError(f"--centroid-data names the expert {strange[0]!r}, but there are adapters for {known} only")
    found = load_domains(named, settings.limit, settings.reading, given)
    for card in shelf.bank.cards if shelf.bank else ():
        if card.trained_on and card.name not in found:
            try:
                found |= load_domains({card.name: card.trained_on}, settings.limit, settings.reading, {})
            except CoterieError as error:
                logger.warning("%s has no texts: its card names what cannot be read (%s)", card.name, error)
    return {name: found[name] for name in shelf.folders if name in found}


def _router(settings: FromAdaptersSettings, shelf: _Shelf, texts: Mapping[str, Sequence[Example]]) -> str:
    """Choose how the mixture routes: as asked for, or by similarity where every adapter has texts, or else by Arrow.

    Raises:
        CoterieError: when an adapter has no texts where it needs some, or a setting of centroids would not act.
    """
    lacking = [name for name in shelf.folders if name not in texts]
    if lacking and (settings.router == SIMILARITY or (settings.router == "auto" and settings.centroid_data)):
        raise CoterieError(
            f"the expert {lacking[0]!r} has no texts to place its centroid by; add --centroid-data {lacking[0]}=FILE, "
            "or route by the adapters alone with --router arrow"
        )
    given = [*changed(settings.similarity), *changed(settings.rerouting)]
    if not texts and given:
        advice = "add --centroid-data, or leave it out"
        raise CoterieError(f"{given[0]} acts on routing by centroids, but no adapter has texts; {advice}")
    if settings.router != "auto":
        return settings.router
    if not lacking:
        return SIMILARITY
    count = f"{len(lacking)} of {len(shelf.folders)} adapters"
    logger.info("%s have no texts (--centroid-data NAME=FILE), so all are routed by their updates, with arrow", count)
    return "arrow"
