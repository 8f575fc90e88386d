"""Mixtures and banks on the hub: what of a folder goes there, under which names, with which card."""

import tempfile
from dataclasses import asdict
from pathlib import Path

from coterie.artifacts import as_path, check_kind, publish, read_json, write_json, write_text
from coterie.backbone.aliases import hub_name
from coterie.backbone.loading import BaseModelIdentity
from coterie.errors import CoterieError
from coterie.experts.bank_folder import BANK_FILE, EXPERTS, open_bank
from coterie.experts.cards import CARD_FILE, hash_adapter, read_card
from coterie.experts.hub_card import bank_card
from coterie.experts.portable import copy_portable, name_base_model, without_places
from coterie.mixture.card import mixture_card
from coterie.records.files import read_summary
from coterie.records.mixture import MIXTURE_FILE, ExtraRecord, MixtureRecord, RouterRecord
from coterie.records.schema import read
from coterie.settings.hub import PushSettings
from coterie.settings.keywords import takes_fields

ANSWERING = ("experts", "router", "checkpoints", "methods", "auto.json", "auto.md", MIXTURE_FILE)
"""What of a mixture's folder answers hang on. Rows, features, logs and the run's record stay at home."""


@takes_fields(PushSettings)
def push(settings: PushSettings) -> str:
    """Publish a mixture or a bank on the hub with a card, and return its address; it is private unless said otherwise.

    Raises:
        CoterieError: when the folder is neither, cannot be loaded elsewhere, or the hub refuses it.
    """
    folder = as_path(settings.folder)
    with tempfile.TemporaryDirectory(prefix="coterie-push-") as place:
        made = Path(place) / folder.resolve().name
        made.mkdir()
        if (folder / BANK_FILE).is_file():
            _lay_out_bank(folder, made, settings)
            mark, owned = BANK_FILE, (EXPERTS,)
        else:
            _lay_out_mixture(folder, made, settings)
            mark, owned = MIXTURE_FILE, ANSWERING
        return publish(made, settings.repository, owned, mark, public=settings.public)


def _lay_out_mixture(folder: Path, made: Path, settings: PushSettings) -> None:
    """Make the mixture's folder as strangers can load it."""
    check_kind(folder, MIXTURE_FILE)
    if "pool" in read_json(folder / MIXTURE_FILE):
        raise CoterieError(f"{folder} recruits experts that lie elsewhere, so it is not published; publish each one")
    record = read(MixtureRecord, folder / MIXTURE_FILE, "give the folder of a mixture or of a bank")
    evaluation = read_summary(as_path(settings.evaluation)) if settings.evaluation else None
    if evaluation and not set(record.experts) <= set(evaluation.experts):
        raise CoterieError(
            f"{settings.evaluation} is of experts {', '.join(evaluation.experts)}, and {folder} has "
            f"{', '.join(record.experts)}; give an evaluation of this mixture"
        )
    base = name_base_model(BaseModelIdentity(**dict(record.base_model)), settings.base_model)
    copy_portable(folder, made, ANSWERING, base)
    _check_encoders(record.router, folder)
    write_json(made / MIXTURE_FILE, read_json(made / MIXTURE_FILE) | {"base_model": asdict(base)})
    for file in made.glob("methods/*/ingredient.json"):
        _check_encoders(read(ExtraRecord, file, "train it again").router, file.parent)
        fields = read_json(file)
        write_json(file, fields | {"settings": without_places(fields.get("settings", {}))})
    card = mixture_card(record, folder, base, settings.repository, settings.licence, evaluation)
    write_text(made / "README.md", card)


def _lay_out_bank(folder: Path, made: Path, settings: PushSettings) -> None:
    """Make the bank's folder as strangers can load it; an adapter's card has the hash of what it is there."""
    if settings.evaluation:
        raise CoterieError("--evaluation is of a mixture, and a bank has none; leave it out")
    bank = open_bank(folder)
    if not bank.cards:
        raise CoterieError(f"{folder} holds no adapters; add some with: coterie bank add {folder} ADAPTER ...")
    base = name_base_model(BaseModelIdentity(**bank.base_model), settings.base_model)
    copy_portable(folder, made, (EXPERTS,), base)
    for name in bank.names:
        own = made / EXPERTS / name
        card = read_card(own)
        places = {"source": without_places(card.source), "trained_on": without_places(card.trained_on)}
        write_json(own / CARD_FILE, vars(card) | places | {"sha256": hash_adapter(own), "base": hub_name(base.id)})
    cards = [read_card(made / EXPERTS / name) for name in bank.names]
    write_json(made / BANK_FILE, read_json(folder / BANK_FILE) | {"base_model": asdict(base)})
    write_text(made / "README.md", bank_card(base, cards, settings.repository, settings.licence))


def _check_encoders(router: RouterRecord | None, place: Path) -> None:
    """Refuse a router that reads texts by an encoder in a folder of this machine."""
    while router is not None:
        if router.encoder and Path(router.encoder).is_dir():
            raise CoterieError(
                f"{place} routes by the text encoder in {router.encoder}, which nobody else has; publish the encoder, "
                "and fit again with its hub id as --encoder"
            )
        router = router.of
