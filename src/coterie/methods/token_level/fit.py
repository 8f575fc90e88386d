"""Token-level adaptation (Belofsky 2023, arXiv 2311.10847): one adapter per domain, and centroids to route by.

The adapters are trained here, or exist already; nothing else is trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.artifacts import RunFolder, as_path, check_output, read_json, run_folder, sha256_of, write_jsonl
from coterie.backbone.loading import Backbone, load_backbone
from coterie.combiners.layers import LayerCombiner
from coterie.data.batching import PromptFormat, Tokenised, tokenise
from coterie.data.examples import Example, load_all
from coterie.errors import CoterieError
from coterie.experts.bank import CONFIG_FILE, WEIGHTS_FILE, check_names, load_bank
from coterie.experts.bank_folder import open_bank
from coterie.experts.fresh_adapter import check_fresh_adapter
from coterie.experts.names import BACKBONE, NULL
from coterie.experts.training import check_one_process, write_null_adapter
from coterie.features.embedding import load_encoder
from coterie.methods.common import (
    DOMAINS_FILE,
    base_plan,
    close_training,
    copy_expert,
    hash_examples,
    named_sources,
    origin,
    train_expert,
)
from coterie.methods.family import SINGLE_EXPERT
from coterie.methods.token_level.centroids import check_centroids, similarity_router
from coterie.mixture import Mixture
from coterie.routers.fixed import uniform
from coterie.routers.token import TokenLevel
from coterie.settings.commands import FromAdaptersSettings, TokenLevelSettings
from coterie.settings.groups import ModelSettings, rerouting_interval
from coterie.settings.reading import from_flat
from coterie.settings.rows import ReadingSettings

METHOD = "token-level"
RESERVED_NAMES = (BACKBONE, NULL, SINGLE_EXPERT, "uniform")

DomainData = Mapping[str, str | Sequence[str] | Sequence[Example]]
"""Every expert's training data: a source, several of them, or examples."""


def token_level(model: str, data: DomainData, *, output: str | Path, **settings: Any) -> Mixture:  # noqa: ANN401
    """Train an adapter per domain and route by the text so far, at every n-th token (Belofsky 2023).

    Args:
        model: base model: hub id, local folder, .gguf file, or an alias.
        data: training data of every expert, by name.
        output: folder to write the mixture to.
        **settings: fields of `TokenLevelSettings` and its groups by their plain names, such as every="2" or rank=16.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    named, given = _named_sources(data)
    flat = {"model": model, "data": named, "output": str(output), **settings}
    return fit_token_level(from_flat(TokenLevelSettings, flat), given)


def _named_sources(data: DomainData) -> tuple[list[str], dict[str, list[Example]]]:
    """Return data as NAME=SOURCE, and by name what came from memory."""
    parts = {name: named_sources(source) for name, source in data.items()}
    named = [f"{name}={source}" for name, (sources, _) in parts.items() for source in sources]
    return named, {name: examples for name, (_, examples) in parts.items() if examples}


def fit_token_level(settings: TokenLevelSettings, given: Mapping[str, list[Example]] | None = None) -> Mixture:
    """Train every domain's adapter, then place centroids; an interrupted run goes on where it stopped.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    check_one_process()
    examples = _load_domains(named_values(settings.data, "data"), settings.limit, settings.reading, given or {})
    backbone = load_backbone(settings.model)
    load_encoder(settings.similarity.encoder, backbone)  # one that cannot be had is told before anything is trained
    check_fresh_adapter(backbone, settings.lora)
    prompts = PromptFormat(backbone.tokenizer, settings.training.system_prompt, settings.reading)
    longest = settings.training.max_length
    kept = {name: tokenise(prompts, own, longest, backbone.positions) for name, own in examples.items()}
    check_centroids(kept, settings.similarity)
    with run_folder(output, settings, _inputs(examples, backbone)) as run:
        folders = {}
        for number, (name, rows) in enumerate(kept.items(), start=1):
            plan = base_plan(settings, f"{name} ({number} of {len(kept)})")
            folders[name] = train_expert(run, name, rows.rows, backbone, plan, settings.lora)
        mixture = _assemble(run, backbone, prompts, kept, folders, settings)
        close_training(run, kept)
    return replace(mixture, folder=output)


def from_adapters(
    adapters: str | Path | Mapping[str, str | Path],
    texts: DomainData | None = None,
    *,
    output: str | Path,
    **settings: Any,  # noqa: ANN401
) -> Mixture:
    """Make a mixture of adapters that exist already, routed by similarity to the texts that each was made for.

    Args:
        adapters: folder of a bank, or plain PEFT folders by name.
        texts: of every adapter, by name: a JSONL file or `datasets` source, several of them, or examples; by default
            what an adapter of a bank was trained on, where its card tells.
        output: folder to write the mixture to.
        **settings: fields of `FromAdaptersSettings` and its groups by their plain names, such as model="smollm2-135m".

    Raises:
        CoterieError: for an adapter that does not fit, an expert without texts, or an output folder that exists.
    """
    named, given = _named_sources(texts or {})
    if isinstance(adapters, Mapping):
        own: dict[str, Any] = {"adapter": [f"{name}={folder}" for name, folder in adapters.items()]}
    else:
        own = {"bank": str(adapters)}
    flat = {**own, "centroid_data": named, "output": str(output), **settings}
    return fit_from_adapters(from_flat(FromAdaptersSettings, flat), given)


def fit_from_adapters(settings: FromAdaptersSettings, given: Mapping[str, list[Example]] | None = None) -> Mixture:
    """Make a mixture of adapters that exist already: check them, copy them, place centroids.

    Raises:
        CoterieError: for an adapter that does not fit, an expert without texts, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    if settings.bank and settings.revision and not settings.model:
        raise CoterieError("--revision goes with --model; the bank says which base model its adapters are on")
    adapters, sources, (model, revision) = _adapters_to_join(settings)
    placement = settings.placement.model_dump()
    backbone = load_backbone(ModelSettings(model=model, revision=revision, **placement))
    load_bank(adapters, backbone.model)  # checks them before anything is written
    load_encoder(settings.similarity.encoder, backbone)
    examples = _load_domains(sources, settings.limit, settings.reading, given or {})
    prompts = PromptFormat(backbone.tokenizer, settings.system_prompt, settings.reading)
    kept = {name: tokenise(prompts, examples[name], settings.max_length, backbone.positions) for name in adapters}
    check_centroids(kept, settings.similarity)
    hashes = {f"adapter {name}": sha256_of(folder / WEIGHTS_FILE) for name, folder in adapters.items()}
    inputs = {**_inputs(examples, backbone), **hashes}
    with run_folder(output, settings, inputs) as run:
        folders = {name: copy_expert(run, name, folder) for name, folder in adapters.items()}
        mixture = _assemble(run, backbone, prompts, kept, folders, settings)
    return replace(mixture, folder=output)


def _adapters_to_join(
    settings: FromAdaptersSettings,
) -> tuple[dict[str, Path], dict[str, list[str]], tuple[str, str | None]]:
    """Return the adapters' folders and the sources of their texts, by name, and the base model with its revision.

    Raises:
        CoterieError: for names that do not fit together, or where adapters name no base model, or several.
    """
    given = named_values(settings.adapter, "adapter")
    sources = named_values(settings.centroid_data, "centroid-data")
    adapters: dict[str, Path] = {}
    base = None
    if settings.bank is not None:
        bank = open_bank(Path(settings.bank))
        adapters = {name: bank.folder_of(name) for name in bank.names}
        base = (str(bank.base_model["id"]), bank.base_model.get("revision"))
        sources = {card.name: list(card.trained_on) for card in bank.cards if card.trained_on} | sources
    for name, folders in given.items():
        if len(folders) > 1 or name in adapters:
            count = len(folders) + (name in adapters)
            raise CoterieError(f"the adapter {name} is given {count} times; give every adapter a name of its own")
        adapters[name] = Path(folders[0])
    if not adapters:
        raise CoterieError("no adapter is given; add --bank FOLDER, or --adapter NAME=FOLDER for each")
    check_domain_names(adapters)
    lacking = [name for name in adapters if name not in sources]
    if lacking:
        raise CoterieError(
            f"the expert {lacking[0]!r} has no texts to place its centroid by; add --centroid-data {lacking[0]}=FILE"
        )
    strange = [name for name in sources if name not in adapters]
    if strange:
        raise CoterieError(
            f"--centroid-data names the expert {strange[0]!r}, but there are adapters for {', '.join(adapters)} only"
        )
    if settings.model:
        base = (settings.model, settings.revision)
    if base is None:
        configs = [read_json(folder / CONFIG_FILE) for folder in adapters.values()]
        named = sorted({str(own["base_model_name_or_path"]) for own in configs if own.get("base_model_name_or_path")})
        if len(named) != 1:
            raise CoterieError(f"the adapters name {' and '.join(named) or 'no'} base model; choose one with --model")
        base = (named[0], settings.revision)
    return adapters, sources, base


def _assemble(
    run: RunFolder,
    backbone: Backbone,
    prompts: PromptFormat,
    kept: Mapping[str, Tokenised],
    folders: Mapping[str, Path],
    settings: TokenLevelSettings | FromAdaptersSettings,
) -> Mixture:
    """Place the centroids and write what makes a folder of experts a mixture."""
    if settings.similarity.null_share is not None:
        null = run.stage(f"experts/{NULL}", lambda folder: write_null_adapter(backbone, folder))
        folders = {**folders, NULL: null}
    bank = load_bank(folders, backbone.model)
    start = Mixture(backbone, bank, uniform(bank.names), LayerCombiner(), prompts, METHOD, run.path)
    router = similarity_router(start, kept, settings.similarity, settings.seed)
    rerouting = settings.rerouting
    mixture = start.replace(router=TokenLevel(router, rerouting_interval(rerouting.every), rerouting.cache))
    records = [{**origin(example), "expert": name} for name, own in kept.items() for example in own.examples]
    write_jsonl(run.path / DOMAINS_FILE, records)
    mixture.write_description(run.path)
    return mixture


def _load_domains(
    sources: Mapping[str, Sequence[str]],
    limit: int | None,
    reading: ReadingSettings,
    given: Mapping[str, list[Example]],
) -> dict[str, list[Example]]:
    check_domain_names(sources)
    return {
        name: given[name] if name in given else load_all(list(own), limit, reading.shared)
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


def _inputs(examples: Mapping[str, list[Example]], backbone: Backbone) -> dict[str, str]:
    hashes = {f"data {name}": hash_examples(own) for name, own in examples.items()}
    return {"base_model": backbone.identity.sha256, **hashes}
