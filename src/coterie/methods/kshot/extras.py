"""What the rivals of kshot-moe need beyond the fitted run: other experts, other data, one adapter alone."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from coterie.artifacts import RunFolder
from coterie.combiners.logits import LogitCombiner
from coterie.data.batching import TokenRow
from coterie.data.examples import Example
from coterie.data.streaming import FRESH, index_pools
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank, load_bank, write_adapter
from coterie.experts.lorahub import SearchPlan, compose, search_weights
from coterie.experts.training import train_adapter
from coterie.lora import Adapter
from coterie.methods.common import adapter_copier, base_plan
from coterie.methods.extras import Kind, Made
from coterie.methods.kshot.choose_adapters import best_by_shots
from coterie.methods.kshot.run import TaskRecipe
from coterie.methods.kshot.train import tune
from coterie.mixture import Mixture
from coterie.mixture.scoring import score
from coterie.routers.fixed import one_hot
from coterie.routers.gate import GateRouter

UNTUNED = "untuned-"
BEST_TUNED = "best-tuned"
LORAHUB = "lorahub"


def _untuned(recipe: TaskRecipe, run: RunFolder) -> Made:
    """Take the chosen adapters, and the best single one, as the bank has them."""
    names = dict.fromkeys([*recipe.selection["chosen"], best_by_shots(recipe.selection)])
    bank = recipe.task.bank
    folders = {
        f"{UNTUNED}{name}": run.stage(f"experts/{UNTUNED}{name}", adapter_copier(bank.folder_of(name)))
        for name in names
    }
    return Made(folders)


def _best_tuned(recipe: TaskRecipe, run: RunFolder) -> Made:
    """Fine-tune the single best adapter on the mixture's own rows."""
    plan = base_plan(recipe.settings, BEST_TUNED, keep_epochs=False)
    start = recipe.task.bank.folder_of(best_by_shots(recipe.selection))
    backbone = recipe.task.backbone
    trained = run.stage("training/best", lambda folder: train_adapter(backbone, recipe.rows, plan, folder, start))
    return Made({BEST_TUNED: run.stage(f"experts/{BEST_TUNED}", adapter_copier(trained))})


def _lorahub(recipe: TaskRecipe, run: RunFolder) -> Made:
    """Search weights of the candidates' factors without gradients (LoraHub, arXiv 2307.13269)."""
    task = recipe.task
    names = [row["name"] for row in recipe.ranking if row["candidate"]]
    adapters = load_bank({name: task.bank.folder_of(name) for name in names}, task.backbone.model).adapters
    rows = task.rows(task.shots, recipe.settings.training.max_length)
    search = SearchPlan(recipe.grid.lorahub_steps, seed=recipe.settings.seed)
    weights = search_weights(lambda own: _shots_nll(recipe, rows, compose(adapters, own)), len(names), search)
    folder = run.path / "experts" / LORAHUB
    _write_composed(recipe, folder.name, run, compose(adapters, weights))
    return Made({LORAHUB: folder}, None, {"weights": dict(zip(names, weights, strict=True))})


def _shots_nll(recipe: TaskRecipe, rows: Sequence[TokenRow], adapter: Adapter) -> float:
    task = recipe.task
    bank = ExpertBank((LORAHUB,), (adapter,))
    mixture = Mixture(task.backbone, bank, one_hot(LORAHUB, bank.names), LogitCombiner(), task.prompts, LORAHUB)
    return float(score(mixture, rows, mixture.router.route(list(rows)), "").nll.mean())


def _write_composed(recipe: TaskRecipe, name: str, run: RunFolder, adapter: Adapter) -> None:
    ranks = {path: len(pair.down) for path, pair in adapter.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": recipe.task.backbone.identity.id,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,  # so that every layer's scaling is 1
        "target_modules": sorted(ranks),
    }
    write_adapter(run.path / "experts" / name, config, adapter)


def _ablation(
    prefix: str,
    experts: Callable[[TaskRecipe], list[str]] = lambda recipe: list(recipe.selection["chosen"]),
    data: Callable[[TaskRecipe], list[Example]] = lambda recipe: recipe.gathered,
) -> Kind:
    """Train a mixture as the run did, but from other experts or on other rows beside the shots."""

    def make(recipe: TaskRecipe, run: RunFolder) -> Made:
        names = experts(recipe)
        added = data(recipe)
        if set(names) == set(recipe.selection["chosen"]) and added == recipe.gathered:
            return _copied(recipe, run, prefix)  # the same mixture: training it again would give it again
        origins = {f"{prefix}-{name}": name for name in names}
        tuned = tune(run.path, recipe.task, origins, recipe.tokenised(added), recipe.settings)
        return Made(tuned.experts, tuned.router, {"gates": tuned.record})

    return Kind(make)


def _copied(recipe: TaskRecipe, run: RunFolder, prefix: str) -> Made:
    mixture = recipe.mixture
    router = mixture.router
    assert isinstance(router, GateRouter)  # kshot-moe has gates
    names = {name: f"{prefix}-{name}" for name in router.gates.experts}
    folders = {
        own: run.stage(f"experts/{own}", adapter_copier(recipe.folder / "experts" / name))
        for name, own in names.items()
    }
    adapters = [mixture.bank.adapters[mixture.bank.index(name)] for name in names]
    gates = replace(router.gates, experts=tuple(names.values()))
    return Made(folders, GateRouter(mixture.backbone, adapters, gates))


def _first(recipe: TaskRecipe, *signals: str) -> list[str]:
    """Return as many adapters as were chosen, best by these numbers alone."""
    order = sorted(recipe.ranking, key=lambda row: (*(row[signal] for signal in signals), row["name"]))
    return [row["name"] for row in order[: len(recipe.selection["chosen"])]]


def _random_experts(recipe: TaskRecipe) -> list[str]:
    names = sorted(row["name"] for row in recipe.selection["adapters"] if row["dropped"] != "leak")
    return random.Random(recipe.settings.seed).sample(names, len(recipe.selection["chosen"]))


def _random_rows(recipe: TaskRecipe) -> list[Example]:
    """Draw as many rows of the pools as were gathered; shots and excluded rows are not among them."""
    settings = recipe.settings
    if not settings.pool:
        raise CoterieError(f"{recipe.folder} was fitted without open data, so there is none to draw at random")
    pools = {source: source for source in settings.pool}
    index = index_pools(pools, None, recipe.task.shots, recipe.task.excluded)
    fresh = np.flatnonzero(index.kinds == FRESH)
    drawn = np.random.default_rng(settings.seed).choice(fresh, min(len(recipe.gathered), len(fresh)), replace=False)
    return [replace(example, id=f"random-{number}") for number, example in index.read(np.sort(drawn))]


TASK_KINDS: Mapping[str, Kind] = {
    "untuned": Kind(_untuned),
    BEST_TUNED: Kind(_best_tuned),
    LORAHUB: Kind(_lorahub, ("lorahub_steps",)),
    "kshot-only": _ablation("shots", data=lambda recipe: []),
    "random-experts": _ablation("random", experts=_random_experts),
    "random-data": _ablation("randomdata", data=_random_rows),
    "by-accuracy": _ablation("accuracy", experts=lambda recipe: _first(recipe, "rank_accuracy", "rank_perplexity")),
    "by-perplexity": _ablation("perplexity", experts=lambda recipe: _first(recipe, "rank_perplexity")),
    "no-diversity": _ablation("ranks", experts=lambda recipe: _first(recipe, "rank_sum", "perplexity")),
}
"""By name of the ingredient's folder."""
