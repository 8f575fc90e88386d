"""A task expert from a handful of verified examples: select, gather, train a token-gated mixture (arXiv 2408.15915)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from coterie import ranks
from coterie.artifacts import (
    RunFolder,
    as_path,
    check_output,
    read_json,
    read_tensors,
    run_folder,
    sha256_of,
    write_json,
    write_jsonl,
)
from coterie.combiners.layers import LayerCombiner
from coterie.data.batching import TokenRow, tokenise
from coterie.data.examples import Example, load_examples
from coterie.errors import CoterieError
from coterie.experts.bank import load_bank
from coterie.experts.training_plan import read_log
from coterie.features.embedding import HIDDEN
from coterie.features.embedding_store import hidden_encoder, load_text_encoder
from coterie.methods.common import backbone_key, copy_expert, hash_adapter, hash_rows, named_sources
from coterie.methods.kshot.choose_adapters import SCORES_FILE, SELECTION_FILE, choose, read_selection, scoring_work
from coterie.methods.kshot.gather_rows import GATHERED_FILE, SUMMARY_FILE, OpenData, load_open_data, write_gathered
from coterie.methods.kshot.reuse import check_reused, copy_files, reused_inputs
from coterie.methods.kshot.task import KshotTask, choosing_values, open_task, scores_cache
from coterie.methods.kshot.train import GATES_FILE, gate_options, tune
from coterie.mixture import Mixture
from coterie.progress import EMBEDDING, TRAINING, part, whole
from coterie.routers.gate import GateRouter, read_gates
from coterie.settings.commands import GatherSettings, KshotSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import from_flat, values_of

METHOD, AUTO = "kshot-moe", "kshot-auto"
SHOTS_ALONE, AND_GATHERED = "kshot-only", "kshot-gathered"
SELECTION = "selection"
GATHERED = "gathered"
TUNED = "working/tuned"


def kshot(bank: str | Path, shots: str | Sequence[str], *, output: str | Path, **settings: Any) -> Mixture:  # noqa: ANN401
    """Make a task's mixture from a few examples, a bank of adapters and open data (arXiv 2408.15915).

    Args:
        bank: folder of a bank, as `bank_add` makes it.
        shots: the task's examples: a JSONL file or `datasets` source, or several.
        output: folder to write the mixture to.
        **settings: fields of `KshotSettings` and its groups by their plain names, such as pool or keep=4.

    Raises:
        CoterieError: for bad data or settings, a bank without enough adapters, or an output folder that exists.
    """
    flat = {"bank": str(bank), "shots": named_sources(shots)[0], "output": str(output), **settings}
    return fit_kshot(from_flat(KshotSettings, flat))


@takes_fields(KshotSettings)
@ranks.joined()
def fit_kshot(settings: KshotSettings) -> Mixture:
    """Choose experts by the shots, gather open data near them, and train gates and experts on both.

    Of several processes that were launched the first one chooses and gathers, and all train. An interrupted run goes on
    where it stopped.

    Raises:
        CoterieError: for bad data, a bank without enough adapters, a choice or rows that were made for another task,
            or an output folder that exists.
    """
    output = as_path(settings.output)
    task, data, inputs = ranks.each(lambda: prepare(settings))
    with run_folder(output, settings, inputs) as run, whole(settings.command, work_of(settings, task, data)):
        given = choose_and_gather(run, task, data, settings)
        with part("training"):
            mixture = trained_mixture(run, task, given.chosen, given.gathered, settings)
            mixture.write_description(run.path)
    return replace(mixture, folder=output)


class Prepared(NamedTuple):
    """What the fit begins with: the task, the open data that rows are gathered from, and the hashes of both."""

    task: KshotTask
    data: OpenData | None
    inputs: dict[str, str]


class Given(NamedTuple):
    """What a mixture is made of: the chosen adapters of the bank, and the rows that were gathered beside the shots."""

    chosen: list[str]
    gathered: list[Example]


def prepare(settings: KshotSettings) -> Prepared:
    """Load a task's shots, its bank and its base model, and index the open data; refuse what cannot work.

    Raises:
        CoterieError: as `fit_kshot` does.
    """
    check_output(as_path(settings.output), settings)
    check_reused(settings)
    task = open_task(settings.bank, settings, settings.training.system_prompt)
    if ranks.is_sharded() and not settings.selected:
        raise CoterieError(
            "experts are chosen by one process, and sharding leaves it a part of the base model; type: coterie select "
            f"{settings.bank} without accelerate launch, then give its folder to --selected here"
        )
    pools = {f"pool {name}": sha256_of(Path(name)) for name in settings.pool if Path(name).is_file()}
    inputs = {**task.inputs(), **pools, **reused_inputs(settings, task)}
    data = load_open_data(_wanted(settings), {"shots": task.shots, "exclude": task.excluded}) if settings.pool else None
    return Prepared(task, data, inputs)


def choose_and_gather(run: RunFolder, task: KshotTask, data: OpenData | None, settings: KshotSettings) -> Given:
    """Choose adapters and gather open data, in the parts `selection` and `open data`, each once."""
    with part("selection"):
        chosen = list(read_selection(_selection(run, task, settings)).chosen)
    with part("open data"):
        return Given(chosen, _gathered(run, task, settings, data))


def trained_mixture(
    run: RunFolder, task: KshotTask, chosen: list[str], added: list[Example], settings: KshotSettings
) -> Mixture:
    """Train gates and adapters on the shots and on rows beside them, and return the mixture of both."""
    rows = tokenise(task.prompts, [*task.shots, *added], settings.training.max_length, task.backbone.positions).rows
    tuned = _trained(run, task, chosen, rows, settings)
    folders = {name: copy_expert(run, name, tuned / "experts" / name) for name in chosen}
    experts = load_bank(folders, task.backbone.model)
    gates = read_gates(read_tensors(tuned / "gates.safetensors"), experts.names, **gate_options(settings, len(experts)))
    router = GateRouter(task.backbone, experts.adapters, gates)
    write_jsonl(run.path / "metrics.jsonl", read_log(tuned))
    write_json(run.path / GATES_FILE, read_json(tuned / GATES_FILE))
    return Mixture(task.backbone, experts, router, LayerCombiner(), task.prompts, METHOD, run.path)


def _trained(
    run: RunFolder, task: KshotTask, chosen: list[str], rows: Sequence[TokenRow], settings: KshotSettings
) -> Path:
    """Train gates and experts, once."""
    run.renamed("tuned", TUNED)
    experts = dict(zip(chosen, chosen, strict=True))
    how = {**values_of(settings.gates), **values_of(settings.training, ("report_to",)), "seed": settings.seed}
    made_from = {
        **how,
        **backbone_key(task.backbone),
        "rows": hash_rows(rows),
        "experts": {name: hash_adapter(task.bank.folder_of(name)) for name in chosen},
    }
    return run.stage(
        TUNED,
        lambda folder: tune(folder, task, experts, rows, settings).router.save(folder),
        made_from,
        inputs=(),
        together=True,
    )


def work_of(settings: KshotSettings, task: KshotTask, data: OpenData | None) -> dict[str, float]:
    """Weigh the parts of a fit (see `coterie.progress`)."""
    rows = len(task.shots) + (min(settings.rows.budget, len(data.fresh)) if data else 0)
    if settings.gathered:
        rows += len(load_examples(as_path(settings.gathered) / GATHERED_FILE))
    return {
        "selection": 0.0 if settings.selected else scoring_work(task, settings.adapters),
        "open data": EMBEDDING * len(data.index) if data else 0.0,
        "training": TRAINING * rows * settings.training.epochs * settings.adapters.keep,
    }


def _selection(run: RunFolder, task: KshotTask, settings: KshotSettings) -> Path:
    """Choose adapters, once, or take the choice that was made before."""
    selected = settings.selected
    if selected:
        files = (SELECTION_FILE, SCORES_FILE)
        return run.stage(SELECTION, lambda folder: copy_files(selected, folder, files), {}, inputs=("selected",))
    how = choosing_values(settings, settings.training.system_prompt, task)
    cache = scores_cache(run, how)
    return run.stage(SELECTION, lambda folder: choose(task, settings, cache).write(folder), how, inputs=task.inputs())


def _wanted(settings: KshotSettings) -> GatherSettings:
    """Return how open data is gathered."""
    return GatherSettings(
        shots=settings.shots,
        pool=settings.pool,
        output=settings.output,
        exclude=settings.adapters.exclude,
        encoder=settings.encoder,
        embeddings=settings.embeddings,
        rows=settings.rows,
        reading=settings.reading,
        placement=settings.placement,
    )


def _gathered(run: RunFolder, task: KshotTask, settings: KshotSettings, data: OpenData | None) -> list[Example]:
    """Gather rows of open data, once, or take those that were gathered before; none where there is no such data."""
    if gathered := settings.gathered:
        files, own = (GATHERED_FILE, SUMMARY_FILE), ("gathered",)
        folder = run.stage(GATHERED, lambda folder: copy_files(gathered, folder, files), {}, inputs=own)
        return load_examples(folder / GATHERED_FILE)
    if data is None:
        return []

    def make(folder: Path) -> None:
        if settings.encoder == HIDDEN:
            encoder = hidden_encoder(task.backbone, settings.placement)
        else:
            encoder = load_text_encoder(settings.encoder, None, settings.placement)
        write_gathered(folder, data, encoder, _wanted(settings))

    how = {**values_of(settings.rows), **values_of(settings.reading), "encoder": settings.encoder}
    own = ("base_model", "shots", "exclude", *(name for name in run.inputs if name.startswith("pool ")))
    return load_examples(run.stage(GATHERED, make, {**how, "pool": settings.pool}, inputs=own) / GATHERED_FILE)
