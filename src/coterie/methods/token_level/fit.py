"""Token-level adaptation (Belofsky 2023, arXiv 2311.10847): one adapter per domain, and centroids to route by."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.artifacts import as_path, check_output, run_folder
from coterie.backbone.loading import load_backbone
from coterie.data.batching import PromptFormat, tokenise
from coterie.data.examples import Example
from coterie.experts.fresh_adapter import check_fresh_adapter
from coterie.experts.training import check_one_process
from coterie.features.embedding import load_encoder
from coterie.methods.common import base_plan, close_training, train_expert
from coterie.methods.token_level.centroids import check_centroids
from coterie.methods.token_level.domains import (
    DomainData,
    assemble,
    domain_inputs,
    load_domains,
    named_values,
    sources_by_name,
)
from coterie.mixture import Mixture
from coterie.progress import EMBEDDING, TRAINING, part, whole
from coterie.settings.commands import TokenLevelSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import from_flat

CENTROIDS = ""
"""The part of the work after the domains' own, whose names are their own."""


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
    named, given = sources_by_name(data)
    flat = {"model": model, "data": named, "output": str(output), **settings}
    return fit_token_level(from_flat(TokenLevelSettings, flat), given)


@takes_fields(TokenLevelSettings)
def fit_token_level(settings: TokenLevelSettings, given: Mapping[str, list[Example]] | None = None) -> Mixture:
    """Train every domain's adapter, then place centroids; an interrupted run goes on where it stopped.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    check_one_process()
    examples = load_domains(named_values(settings.data, "data"), settings.limit, settings.reading, given or {})
    backbone = load_backbone(settings.model)
    load_encoder(settings.similarity.encoder, backbone)  # one that cannot be had is told before anything is trained
    check_fresh_adapter(backbone, settings.lora)
    prompts = PromptFormat(backbone.tokenizer, settings.training.system_prompt, settings.reading)
    longest = settings.training.max_length
    kept = {name: tokenise(prompts, own, longest, backbone.positions) for name, own in examples.items()}
    check_centroids(kept, settings.similarity)
    count = {name: len(rows.rows) for name, rows in kept.items()}
    work = {name: TRAINING * own * settings.training.epochs for name, own in count.items()}
    work[CENTROIDS] = EMBEDDING * sum(count.values())
    with run_folder(output, settings, domain_inputs(examples, backbone)) as run, whole(settings.command, work):
        folders = {}
        for number, (name, rows) in enumerate(kept.items(), start=1):
            plan = base_plan(settings, f"{name} ({number} of {len(kept)})")
            with part(name):
                folders[name] = train_expert(run, name, rows.rows, backbone, plan, settings.lora)
        with part(CENTROIDS):
            mixture = assemble(run, backbone, prompts, kept, folders, settings)
        close_training(run, kept)
    return replace(mixture, folder=output)
