"""What methods need beyond a fitted run is trained once, on the same rows, and says so when it cannot be."""

import json
import shutil

import pytest
import torch

import coterie
import tiny
from conftest import FIT, GRID
from coterie import methods
from coterie.artifacts import read_json, read_jsonl, write_text
from coterie.backbone.aliases import cache_folder
from coterie.backbone.linear_layers import linear_shapes
from coterie.data.examples import load_examples
from coterie.engine.scoring import score_votes
from coterie.errors import CoterieError
from coterie.experts import trainer
from coterie.experts.gated_model import GatedModel
from coterie.experts.gates_training import train_gates
from coterie.experts.trainer import TrainingCollator
from coterie.experts.training_plan import TrainingPlan
from coterie.lora import LoraPair
from coterie.methods import common
from coterie.methods.common import assign_folds
from coterie.methods.elrea import extras as elrea_extras
from coterie.methods.elrea import fitted_routers
from coterie.methods.elrea.cross_fit import even_pairs
from coterie.methods.elrea.extras import EXTRAS
from coterie.methods.elrea.methods import FAMILY
from coterie.methods.elrea.run import ElreaRun
from coterie.methods.extras import extra_folder, load_extra, prepare_extras
from coterie.methods.registry import load_grid, make_grid, train_extras
from coterie.mixture import Mixture
from coterie.routers.base import Gates, Routing
from coterie.routers.fixed import FixedRouter, uniform
from coterie.routers.gate import GateRouter
from coterie.settings.commands import TrainExtrasSettings
from coterie.settings.groups import ExtrasSettings
from coterie.settings.reading import from_flat
from test_artifacts import everything


@pytest.fixture
def copy(run_folder, tmp_path):
    """The fitted run, to be changed at will."""
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run"


def opened(folder, grid=GRID):
    return ElreaRun.open(Mixture.from_pretrained(folder, device="cpu"), grid)


# -------------------------------------------------------------------------------------------------- what is trained


def test_random_clusters_have_the_sizes_of_the_found_ones_and_other_members(grid_folder):
    found = read_jsonl(grid_folder / "clusters.jsonl")
    drawn = read_jsonl(grid_folder / "methods" / "random-clusters" / "clusters.jsonl")

    def sizes(rows):
        names = [row["cluster"].rpartition("-")[2] for row in rows]
        return {name: names.count(name) for name in names}

    assert [row["id"] for row in drawn] == [row["id"] for row in found]
    assert sizes(drawn) == sizes(found)
    sources = {row["source"] for row in drawn if row["cluster"] == "random-0"}
    assert len(sources) > 1, "the found clusters hold one source each; drawn ones must not"


def test_every_data_set_has_an_adapter_of_its_own_from_a_fresh_start(grid):
    assert grid.extras["datasets"].bank.names == ("dataset-pick", "dataset-spell", "dataset-sum")
    base = grid.own.bank.adapters[0]
    others = [grid.extras["datasets"].bank.adapters[i] for i in range(3)]
    path = next(iter(base))
    assert all(not torch.equal(base[path].down, other[path].down) for other in others)


def test_seeds_give_other_adapters_on_the_same_rows(grid):
    assert grid.extras["seeds"].bank.names == ("seed-1",)
    base, other = grid.own.bank.adapters[0], grid.extras["seeds"].bank.adapters[0]
    path = next(iter(base))
    assert not torch.allclose(other[path].down, base[path].down)


def test_the_judgement_is_what_scoring_the_folds_own_copies_gives(grid_folder):
    """All folds once more by hand: the copies are trained again with the same seeds, then scored one by one."""
    run = opened(grid_folder)
    found = run.losses
    folds = assign_folds(run.labels, run.extras.judge_folds, FIT.get("seed", 0))
    assert found.experts == run.mixture.bank.names
    assert found.tokens.tolist() == [float(sum(row.is_response)) for row in run.kept.rows]
    assert torch.equal(found.pairs, found.pairs.mT)
    assert torch.equal(found.pairs.diagonal(dim1=1, dim2=2), found.nll)
    layers, names = run.mixture.layers, run.mixture.bank.names
    alone = torch.eye(4)[:, None].expand(-1, len(folds), -1)
    seen = score_votes(run.mixture.backbone, layers, names, run.kept.rows, alone, "x").nll.T
    assert float((found.nll - seen).abs().min()) > 0  # nobody was judged by the adapter that was trained on the row
    assert float(found.nll[:, 0].mean()) > float(seen[:, 0].mean())  # and what was not seen is harder


def test_folds_are_even_over_all_and_within_every_cluster():
    labels = [0] * 7 + [1] * 4 + [2] * 2
    folds = assign_folds(labels, 3, seed=1)
    assert sorted(folds.bincount().tolist()) == [4, 4, 5]
    for label in range(3):
        counts = folds[torch.tensor(labels) == label].bincount(minlength=3)
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(folds, assign_folds(labels, 3, seed=1))
    with pytest.raises(CoterieError, match="2 training rows cannot be cut into 3 folds; lower --judge-folds"):
        assign_folds([0, 1], 3, seed=0)


def test_even_pairs_are_single_experts_and_halves():
    assert even_pairs(2).tolist() == [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]


def test_votes_of_one_pass_equal_a_pass_each(grid):
    rows = [grid.own.prompts.row(example) for example in load_examples(tiny.make_rows(5, seed=2))]
    routings = [uniform(grid.fitted).route(rows), grid.own.router.route([row.prompt() for row in rows])]
    votes = torch.stack([routing.aligned(grid.mixture.bank.names).weights for routing in routings])
    together = score_votes(grid.own.backbone, grid.mixture.layers, grid.mixture.bank.names, rows, votes, "both")
    for number, routing in enumerate(routings):
        alone = grid.mixture.score_rows(rows, routing, "one")
        torch.testing.assert_close(together.nll[number], alone.nll[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(together.tokens, alone.tokens)


# ------------------------------------------------------------------------------------------------------------ gates


def plan(**changes):
    values = {"epochs": 6, "learning_rate": 0.05, "batch_size": 4, "micro_batch_size": 4, "seed": 0}
    return TrainingPlan(**{**values, "report_to": "none", "label": "gates", **changes})


@pytest.fixture
def two_kinds(mixture):
    """Two clusters' experts, and rows of all kinds."""
    rows = [mixture.prompts.row(example) for example in load_examples(tiny.make_rows(24, seed=3))]
    experts = [mixture.bank.adapters[1], mixture.bank.adapters[2]]
    return experts, rows


def loss_of(mixture, experts, rows, gates):
    model = GatedModel(mixture.backbone, experts, Gates(("0", "1"), gates))
    collate = TrainingCollator(mixture.backbone.pad_id)
    batch = collate([{"input_ids": list(row.ids), "labels": row.labels()} for row in rows])
    batch.pop("shift_labels")
    return float(model(**batch)["loss"].detach())


def test_gates_start_as_the_even_mixture_and_learn_to_lower_the_loss(mixture, two_kinds, tmp_path):
    experts, rows = two_kinds
    before = {path: torch.zeros(2, width) for path, (width, _) in _widths(mixture, experts).items()}
    even = loss_of(mixture, experts, rows, before)
    weights = torch.zeros(len(rows), len(mixture.bank))
    weights[:, 1:3] = 0.5
    cell = mixture.replace(router="uniform", combiner="layers")
    routing = Routing(mixture.bank.names, weights)
    found = cell.score_rows(rows, routing, "even")
    assert even == pytest.approx(float((found.nll[0] * found.tokens).sum() / found.tokens.sum()), rel=1e-3)
    after = train_gates(mixture.backbone, experts, rows, plan(), tmp_path)
    assert loss_of(mixture, experts, rows, after) < even - 0.05


def test_gates_learn_to_avoid_an_expert_that_spoils_every_row(mixture, two_kinds, tmp_path):
    """The second expert is the first one's opposite: it raises the loss where that lowers it."""
    (good, _), rows = two_kinds
    bad = {path: LoraPair(pair.down, -pair.up) for path, pair in good.items()}
    layers = train_gates(mixture.backbone, [good, bad], rows, plan(), tmp_path)
    router = GateRouter(mixture.backbone, [good, bad], Gates(("good", "bad"), layers))
    fresh = [mixture.prompts.row(example) for example in load_examples(tiny.make_rows(12, seed=8))]
    assert float(router.route(fresh).weights[:, 0].min()) > 0.6


def _widths(mixture, experts):
    shapes = linear_shapes(mixture.backbone.model)
    return {path: shapes[path] for path in sorted({path for expert in experts for path in expert})}


def test_only_gates_are_trained(mixture, two_kinds, tmp_path):
    experts, rows = two_kinds
    zeros = {path: torch.zeros(2, width) for path, (width, _) in _widths(mixture, experts).items()}
    model = GatedModel(mixture.backbone, experts, Gates(("0", "1"), zeros))
    assert sum(p.numel() for p in model.parameters()) == sum(2 * w for w, _ in _widths(mixture, experts).values())
    before = {name: parameter.clone() for name, parameter in mixture.backbone.model.named_parameters()}
    factors = [{path: pair.down.clone() for path, pair in expert.items()} for expert in experts]
    train_gates(mixture.backbone, experts, rows[:4], plan(epochs=1), tmp_path)
    assert all(torch.equal(before[name], p) for name, p in mixture.backbone.model.named_parameters())
    for expert, kept in zip(experts, factors, strict=True):
        assert all(torch.equal(expert[path].down, kept[path]) for path in kept)


def test_an_interrupted_training_of_gates_ends_with_the_same_gates(mixture, two_kinds, tmp_path, monkeypatch):
    experts, rows = two_kinds
    whole = train_gates(mixture.backbone, experts, rows, plan(epochs=2), tmp_path / "whole")

    class StoppedError(BaseException):
        pass

    def stop(*args, **kwargs):
        raise StoppedError

    with monkeypatch.context() as patch:
        original = trainer.make_trainer

        def stopping(*args, **kwargs):
            trainer = original(*args, **kwargs)
            seen = []
            step = trainer.training_step

            def counted(*a, **k):
                seen.append(1)
                return stop() if len(seen) > 8 else step(*a, **k)

            trainer.training_step = counted
            return trainer

        patch.setattr(trainer, "make_trainer", stopping)
        with pytest.raises(StoppedError):
            train_gates(mixture.backbone, experts, rows, plan(epochs=2), tmp_path / "parts")
    assert (tmp_path / "parts" / "trainer").exists()
    again = train_gates(mixture.backbone, experts, rows, plan(epochs=2), tmp_path / "parts")
    assert all(torch.equal(again[path], whole[path]) for path in whole)


# ---------------------------------------------------------------------------------------------- once, and in pieces


def test_nothing_is_trained_twice(grid_folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(common, "train_expert", refuse)
    monkeypatch.setattr(elrea_extras, "train_clusters", refuse)
    monkeypatch.setattr(elrea_extras, "train_gates", refuse)
    monkeypatch.setattr(fitted_routers, "cross_fit", refuse)
    found = prepare_extras(opened(grid_folder), EXTRAS, EXTRAS)
    assert set(found) == set(EXTRAS)


def test_an_extra_killed_between_two_experts_goes_on_and_ends_the_same(copy, grid_folder, monkeypatch):
    class KilledError(BaseException):
        pass

    original = common.train_expert
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[1])
        if len(calls) > 1:
            raise KilledError
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(common, "train_expert", counted)
        with pytest.raises(KilledError):
            prepare_extras(opened(copy), ["datasets"], EXTRAS, in_run=True)
    assert not (copy / "methods" / "datasets").exists()
    prepare_extras(opened(copy), ["datasets"], EXTRAS, in_run=True)
    for name in ("dataset-pick", "dataset-spell", "dataset-sum"):
        file = f"methods/datasets/experts/{name}/adapter_model.safetensors"
        assert (copy / file).read_bytes() == (grid_folder / file).read_bytes()
    assert not (copy / "working").exists()
    assert sorted(p.name for p in (copy / "methods" / "datasets").iterdir()) == ["experts", "ingredient.json"]


def test_another_setting_than_it_was_trained_with_is_told(grid_folder):
    with pytest.raises(CoterieError, match="seeds was trained with --ensemble-size 2, not 3; ask for that value, or"):
        prepare_extras(opened(grid_folder, GRID.model_copy(update={"ensemble_size": 3})), ["seeds"], EXTRAS)


def test_a_setting_that_nobody_gave_is_taken_as_it_was_trained(grid_folder):
    assert ExtrasSettings().ensemble_size != GRID.ensemble_size == 2
    found = prepare_extras(opened(grid_folder, ExtrasSettings()), ["seeds"], EXTRAS)
    assert found["seeds"].bank.names == ("seed-1",)


def test_extras_are_trained_ahead_for_the_methods_that_need_them(copy):
    wanted = {"mixture": str(copy), "methods": "base, per-dataset", "device": "cpu"}
    found = train_extras(from_flat(TrainExtrasSettings, wanted))
    assert {name: extra.folder for name, extra in found.items()} == {"datasets": copy / "methods" / "datasets"}
    assert [path.name for path in (copy / "methods").iterdir()] == ["datasets"]


def test_what_is_made_from_something_comes_after_it():
    assert FAMILY.needs(["loss-routing", "performance-centroids", "base"]) == ["loss", "performance"]
    assert EXTRAS["loss"].needs == ("judged", "unlike")


# ---------------------------------------------------------------------------------------------- a stranger's mixture


@pytest.fixture
def strangers(copy, tmp_path, monkeypatch):
    """A mixture from elsewhere that leads work into somebody's project, and a cache that knows nothing of it."""
    write_text(tmp_path / "project" / "thesis.tex", "years of work")
    for place in ("working/methods/datasets", "methods/datasets"):
        (copy / place).parent.mkdir(parents=True, exist_ok=True)
        (copy / place).symlink_to(tmp_path / "project" if place.startswith("working") else tmp_path / "nothing")
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    yield copy
    assert everything(tmp_path / "project") == ["thesis.tex"] and not (tmp_path / "nothing").exists()


def test_what_is_derived_from_a_strangers_mixture_goes_into_the_users_cache_once(strangers, grid_folder, monkeypatch):
    before = everything(strangers)
    mixture = Mixture.from_pretrained(strangers, device="cpu")
    found = make_grid(mixture, ["per-dataset"], GRID).extras["datasets"]
    assert everything(strangers) == before
    assert found.folder.is_relative_to(cache_folder()) and found.folder == extra_folder(mixture, "datasets")
    trained = read_json(grid_folder / "methods" / "datasets" / "ingredient.json")["experts"]
    assert sorted(found.bank.names) == sorted(trained)
    moved = strangers.rename(strangers.with_name("moved"))
    monkeypatch.setattr(common, "train_expert", None)  # it would be called to train again
    assert load_grid(Mixture.from_pretrained(moved, device="cpu"), ["per-dataset"]).extras["datasets"].bank.names
    moved.rename(strangers)


def test_extras_are_not_trained_through_a_link_in_the_run_itself(strangers):
    wanted = {"mixture": str(strangers), "methods": "per-dataset", "device": "cpu"}
    with pytest.raises(CoterieError, match="working/methods/datasets is a link or a file where a folder is needed"):
        train_extras(from_flat(TrainExtrasSettings, wanted))


def test_extras_of_a_run_that_is_named_by_a_link_are_trained(copy, tmp_path, monkeypatch):
    (tmp_path / "best").symlink_to(copy)
    wanted = {"mixture": str(tmp_path / "best"), "methods": "per-dataset", "device": "cpu"}
    assert set(train_extras(from_flat(TrainExtrasSettings, wanted))) == {"datasets"}
    assert (copy / "methods" / "datasets" / "ingredient.json").is_file()


# ----------------------------------------------------------------------------------------------------- what is wrong


def test_training_data_that_changed_is_told(copy, train_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(train_file.read_text().replace("add", "sum", 1))
    text = (copy / "run.yaml").read_text().replace(str(train_file), str(other))
    (copy / "run.yaml").write_text(text)
    with pytest.raises(CoterieError, match=r"other.jsonl is not what .*run was fitted on; restore the file"):
        prepare_extras(opened(copy), ["datasets"], EXTRAS, in_run=True)


def test_rows_in_memory_cannot_be_trained_on_again(model_folder, tmp_path):
    examples = load_examples(tiny.make_rows(9))
    small = {**FIT, "clusters": 2, "epochs": 1}
    mixture = methods.elrea(str(model_folder), examples, output=tmp_path / "run", device="cpu", **small)
    with pytest.raises(CoterieError, match="was fitted on rows in memory, so nothing more can be trained on them"):
        make_grid(mixture, ["per-dataset"], GRID)


@pytest.mark.parametrize(
    "start",
    [
        lambda data, output: methods.elrea("model", data, output=output),
        lambda data, output: coterie.auto("model", data, output=output),
        lambda data, output: methods.token_level("model", {"own": data}, output=output),
        lambda data, output: coterie.gather(data, "pool.jsonl", output=output),
        lambda data, output: coterie.influence("run", data, "pool.jsonl", output=output),
    ],
    ids=["elrea", "auto", "token-level", "gather", "influence"],
)
def test_files_among_examples_are_not_dropped(start, tmp_path):
    mixed = [*load_examples(tiny.make_rows(2)), "rows.jsonl"]
    with pytest.raises(CoterieError, match="2 of 3 parts of the data are examples; give all or none as examples"):
        start(mixed, tmp_path / "run")


def test_a_folder_that_no_fit_has_made_is_told(copy):
    record = (copy / "run.yaml").read_text().replace("command: fit elrea", "command: eval")
    (copy / "run.yaml").write_text(record)
    with pytest.raises(CoterieError, match="was made by 'eval'; give a folder made by coterie fit elrea"):
        opened(copy)
    (copy / "run.yaml").unlink()
    with pytest.raises(CoterieError, match="has no run.yaml beside it"):
        opened(copy)


def test_a_method_that_lacks_its_training_is_told_what_to_type(run_folder, mixture):
    with pytest.raises(
        CoterieError, match="mole needs gates, which was not trained yet; type: coterie train-extras .* mole"
    ):
        load_grid(mixture, ["mole"])


def test_a_broken_extra_is_told(copy, grid_folder):
    shutil.copytree(grid_folder / "methods" / "seeds", copy / "methods" / "seeds")
    record = read_json(copy / "methods" / "seeds" / "ingredient.json")
    del record["experts"]
    (copy / "methods" / "seeds" / "ingredient.json").write_text(json.dumps(record))
    with pytest.raises(CoterieError, match=r"ingredient.json, 'experts': is missing, got nothing; delete"):
        load_extra(Mixture.from_pretrained(copy, device="cpu"), "seeds")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("elrae", "no method is called 'elrae'. Did you mean 'elrea'"),
        (
            "elrea:top=2",
            "'elrea:top=2' is no variant of elrea; write elrea:top_k=K, elrea:d_proj=D, elrea:ddof=1, "
            "elrea:every=N or elrea:caution=C",
        ),
        ("elrea:top_k=0", "is no variant"),
        ("elrea:top_k=many", "is no variant"),
        ("elrea:", "is no variant"),
    ],
)
def test_a_variant_that_does_not_exist_is_told(name, message):
    with pytest.raises(CoterieError, match=message):
        FAMILY.method(name)


def test_one_expert_that_stays_acts_in_the_layers_as_it_does_alone(grid):
    prompts = ["add 3 4", "SPELL WORD NOW"]
    cell = grid.cell("moe-routing:top_k=1")
    routing = cell.route(prompts)
    leads = [max(routing.row(place), key=routing.row(place).get) for place in range(len(prompts))]
    assert cell.combiner.kind == "layers" and not set(leads) <= {"base"}
    for place, prompt in enumerate(prompts):
        alone = grid.mixture.replace(router=FixedRouter({leads[place]: 1.0}), combiner="layers")
        found = (mixture.score(prompt, "7").logprobs for mixture in (cell, alone))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_variants_of_a_method_change_its_router_alone(grid):
    prompts = grid.own.tokens(["add 3 4", "SPELL WORD NOW"])
    plain = grid.own.router.route(prompts)
    best = grid.cell("elrea:top_k=1").router.route(prompts)
    assert torch.equal(best.weights, plain.top(1).weights)
    both = grid.cell("elrea:top_k=2+d_proj=64").router.route(prompts)
    assert torch.equal(both.weights, grid.own.router.folded(64).route(prompts).top(2).weights)
    sharp, soft = (grid.cell(f"elrea:ddof={ddof}").router.route(prompts) for ddof in (0, 1))
    assert torch.equal(sharp.weights, plain.weights)
    cosines = torch.stack([plain.similarities[name] for name in plain.experts[1:]], dim=1)
    expected = ((cosines - cosines.mean(dim=1, keepdim=True)) / cosines.std(dim=1, keepdim=True)).softmax(dim=1)
    torch.testing.assert_close(soft.weights[:, 1:], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(soft.weights[:, :1], plain.weights[:, :1])
    with pytest.raises(CoterieError, match="only standardised cosines have a deviation, but router 'fixed' has none"):
        grid.cell("uniform-weights:ddof=1")
    with pytest.raises(CoterieError, match="only centroids can be compared in fewer dimensions"):
        grid.cell("uniform-weights:d_proj=64")
    with pytest.raises(CoterieError, match="does not act on gates"):
        grid.cell("mole:top_k=1").router.route(prompts)


def test_a_method_keeps_the_combiner_that_follows_its_router_and_what_reads_no_text_is_not_asked_again(grid):
    assert grid.own.combiner.kind == "logits"
    assert [grid.cell(name).combiner.kind for name in ("elrea", "router:arrow")] == ["logits", "layers"]
    with pytest.raises(CoterieError, match="'oracle:every=2': only what is routed by its text can be routed again"):
        grid.cell("oracle:every=2")
    with pytest.raises(CoterieError, match="combiner 'texts' takes weights once a prompt"):
        grid.cell("self-consistency:every=2")


# ------------------------------------------------------------------------------------------------------------ controls


def test_random_experts_lie_as_far_from_the_base_adapter_as_the_fitted_ones_tensor_by_tensor(grid):
    base = grid.own.bank.adapters[grid.own.bank.index("base")]
    noise = grid.extras["random-weights"].bank
    assert noise.names == ("noise-0", "noise-1", "noise-2")
    for number, adapter in enumerate(noise.adapters):
        fitted = grid.own.bank.adapters[grid.own.bank.index(f"cluster-{number}")]
        assert set(adapter) == set(fitted)
        for path, own in adapter.items():
            for half in ("down", "up"):
                start, trained, drawn = (getattr(pair, half) for pair in (base[path], fitted[path], own))
                assert drawn.shape == trained.shape
                torch.testing.assert_close((drawn - start).norm(), (trained - start).norm(), rtol=1e-3, atol=1e-6)
    steps = [
        torch.cat([(a[p].down - base[p].down).flatten() for p in base])
        for a in (noise.adapters[0], grid.own.bank.adapters[1])
    ]
    assert abs(float(torch.cosine_similarity(*steps, dim=0))) < 0.1


def test_one_adapter_is_trained_on_as_many_tokens_as_all_experts_together(grid):
    """It goes on from the base adapter like them, on all rows, for their epochs: 36 rows in batches of 8, one epoch."""
    settings = grid.own.folder / "methods" / "one-lora" / "experts" / "one-lora" / "adapter_config.json"
    assert settings.exists()
    base, own = (
        bank.adapters[bank.index(name)]
        for bank, name in ((grid.own.bank, "base"), (grid.extras["one-lora"].bank, "one-lora"))
    )
    assert set(own) == set(base) and all(own[path].down.shape == base[path].down.shape for path in base)
    assert any(not torch.equal(own[path].up, base[path].up) for path in base)
