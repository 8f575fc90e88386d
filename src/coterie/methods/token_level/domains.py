"""Experts of domains: their names and texts, and what makes a folder of them a mixture that is routed by similarity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.artifacts import FORMAT, RunFolder, write_json, write_jsonl
from coterie.backbone.loading import Backbone
from coterie.combiners.layers import LayerCombiner
from coterie.data.batching import PromptFormat, Tokenised
from coterie.data.examples import Example, spool_all
from coterie.errors import CoterieError
from coterie.experts.bank import check_names, load_bank
from coterie.experts.names import BACKBONE, NULL
from coterie.experts.plain_adapter import write_null_adapter
from coterie.methods.common import DOMAINS_FILE, Data, backbone_key, hash_examples, named_parts, origin
from coterie.methods.extras import RECORD
from coterie.methods.family import SINGLE_EXPERT
from coterie.methods.token_level.centroids import similarity_router
from coterie.mixture import Mixture
from coterie.routers.base import Router
from coterie.routers.centroid import SIMILARITY
from coterie.routers.fixed import uniform
from coterie.routers.logo import BY_UPDATES
from coterie.routers.token import TokenLevel
from coterie.settings.commands import FromAdaptersSettings, TokenLevelSettings
from coterie.settings.groups import rerouting_interval
from coterie.settings.reading import values_of
from coterie.settings.rows import ReadingSettings

METHOD = "token-level"
RESERVED_NAMES = (BACKBONE, NULL, SINGLE_EXPERT, "uniform", *BY_UPDATES)

DomainData = Mapping[str, Data]
"""Every expert's training data: a source, several of them, or examples."""


def sources_by_name(data: DomainData) -> tuple[list[str], dict[str, Sequence[Example]]]:
    """Return data as NAME=SOURCE, and by name what came from memory."""
    named, given = named_parts(data)
    return [f"{name}={source}" for name, sources in named.items() for source in sources], given


def assemble(
    run: RunFolder,
    backbone: Backbone,
    prompts: PromptFormat,
    kept: Mapping[str, Tokenised],
    folders: Mapping[str, Path],
    settings: TokenLevelSettings | FromAdaptersSettings,
    router: str = SIMILARITY,
) -> Mixture:
    """Write what makes a folder of experts a mixture, with centroids for those that have texts.

    Where the mixture routes in another way, the centroids lie beside it, so that a router by similarity is had by name.
    """
    if settings.similarity.null_share is not None:
        null = run.stage(f"experts/{NULL}", lambda folder: write_null_adapter(backbone, folder), {})
        folders = {**folders, NULL: null}
    bank = load_bank(folders, backbone.model)
    method = METHOD if router == SIMILARITY else router
    mixture = Mixture(backbone, bank, uniform(bank.names), LayerCombiner(), prompts, method, run.path)
    similar: Router | None = None
    if kept:
        centroids = similarity_router(mixture, kept, settings.similarity, settings.seed)
        similar = TokenLevel(centroids, rerouting_interval(settings.rerouting.every), settings.rerouting.cache)
        records = [{**origin(example), "expert": name} for name, own in kept.items() for example in own.examples]
        write_jsonl(run.path / DOMAINS_FILE, records)
    if router != SIMILARITY:
        if similar:
            place, how = f"methods/{SIMILARITY}", {**values_of(settings), **backbone_key(backbone)}
            run.stage(place, lambda folder: _write_router(similar, folder), how)
        similar = mixture.by_updates(router)
    mixture = mixture.replace(router=similar)
    mixture.write_description(run.path)
    return mixture


def _write_router(router: Router, folder: Path) -> None:
    """Write a router that was fitted beside the mixture's own, as a router that was trained later would be."""
    record = {"format": FORMAT, "settings": {}, "experts": [], "router": router.save(folder / "router"), "seconds": 0.0}
    write_json(folder / RECORD, record)


def load_domains(
    sources: Mapping[str, Sequence[str]],
    limit: int | None,
    reading: ReadingSettings,
    given: Mapping[str, Sequence[Example]],
) -> dict[str, Sequence[Example]]:
    """Load every expert's texts, by name; `given` has those that are in memory already.

    Raises:
        CoterieError: for a name that no expert can have, or bad data.
    """
    check_domain_names(sources)
    return {
        name: given[name] if name in given else spool_all(list(own), limit, reading.shared)
        for name, own in sources.items()
    }


def check_domain_names(names: Sequence[str] | Mapping[str, Any]) -> None:
    """Refuse experts' names that are no folder names, or stand for something else.

    Raises:
        CoterieError: naming the first of them.
    """
    check_names(list(names))
    taken = [name for name in names if name in RESERVED_NAMES]
    if taken:
        raise CoterieError(f"an expert cannot be called {taken[0]!r}, which has a meaning here; give it another name")


def named_values(values: Sequence[str], flag: str) -> dict[str, list[str]]:
    """Read NAME=VALUE; a name may stand several times.

    Raises:
        CoterieError: for a value without a name, or nothing behind it.
    """
    found: dict[str, list[str]] = {}
    for value in values:
        name, equals, given = value.partition("=")
        if not (name and equals and given):
            raise CoterieError(f"--{flag} takes NAME=VALUE, such as maths=gsm8k.jsonl, got {value!r}")
        found.setdefault(name, []).append(given)
    return found


def domain_inputs(examples: Mapping[str, Sequence[Example]], backbone: Backbone) -> dict[str, str]:
    """Hash what a mixture of domains depends on, by name."""
    hashes = {f"data {name}": hash_examples(own) for name, own in examples.items()}
    return {"base_model": backbone.identity.sha256, **hashes}
