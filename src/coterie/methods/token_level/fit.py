"""Token-level adaptation (Belofsky 2023, arXiv 2311.10847): one adapter per domain, and centroids to route by."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie import ranks
from coterie.artifacts import as_path, check_output, run_folder
from coterie.backbone.loading import Backbone, load_backbone
from coterie.data.batching import PromptFormat, Tokenised, tokenise
from coterie.data.devices import tell_idle
from coterie.data.examples import Example
from coterie.experts.fresh_adapter import check_fresh_adapter
from coterie.features.embedding import load_encoder
from coterie.methods.common import ExpertJob, base_plan, join_logs, train_experts
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
@ranks.joined()
def fit_token_level(settings: TokenLevelSettings, given: Mapping[str, Sequence[Example]] | None = None) -> Mixture:
    """Train every domain's adapter, then place centroids, by all processes that were launched.

    An interrupted run goes on where it stopped.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    output = as_path(settings.output)
    backbone, prompts, kept, inputs = ranks.each(lambda: _prepare(settings, given or {}))
    count = {name: len(rows.rows) for name, rows in kept.items()}
    work = {"experts": TRAINING * sum(count.values()) * settings.training.epochs}
    work["centroids"] = EMBEDDING * sum(count.values())
    with run_folder(output, settings, inputs) as run, whole(settings.command, work):
        jobs = {}
        for number, (name, rows) in enumerate(kept.items(), start=1):
            plan = base_plan(settings, f"{name} ({number} of {len(kept)})")
            jobs[name] = ExpertJob(rows.rows, plan, settings.lora, ("base_model", f"data {name}"))
        with part("experts"):
            folders = train_experts(run, jobs, backbone, "experts of domains")
        with part("centroids"):
            mixture = assemble(run, backbone, prompts, kept, folders, settings)
        join_logs(run, folders.values())
    return replace(mixture, folder=output)


def _prepare(
    settings: TokenLevelSettings, given: Mapping[str, Sequence[Example]]
) -> tuple[Backbone, PromptFormat, dict[str, Tokenised], dict[str, str]]:
    """Return the base model, every domain's rows as it reads them, and the hashes of both."""
    check_output(as_path(settings.output), settings)
    examples = load_domains(named_values(settings.data, "data"), settings.limit, settings.reading, given)
    backbone = load_backbone(settings.model)
    tell_idle(backbone.device)
    load_encoder(settings.similarity.encoder, backbone)  # one that cannot be had is told before anything is trained
    check_fresh_adapter(backbone, settings.lora)
    prompts = PromptFormat(backbone.tokenizer, settings.training.system_prompt, settings.reading)
    longest = settings.training.max_length
    kept = {name: tokenise(prompts, own, longest, backbone.positions) for name, own in examples.items()}
    check_centroids(kept, settings.similarity)
    return backbone, prompts, kept, domain_inputs(examples, backbone)
