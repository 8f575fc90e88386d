"""Routers that are fitted to what experts are good at find it where it is there to be found."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import GRID
from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor
from coterie.methods.elrea import fitted_routers
from coterie.methods.elrea.cross_fit import assign_folds
from coterie.methods.elrea.run import ElreaRun
from coterie.routers import loss
from coterie.routers.base import RouterParts
from coterie.routers.centroid import CentroidRouter, centroids_by_best, centroids_of, fold
from coterie.routers.derived import DerivedRouter
from coterie.routers.fixed import FixedRouter, OracleRouter, SourceRouter
from coterie.routers.gate import read_gates
from coterie.routers.loss import CrossFitLosses, LossRouter, Mlp, Ridge, fit_loss_router, fit_mlps, predict, weigh
from coterie.routers.table import load_router
from helpers import normal, pairs_that_gain_nothing

EXPERTS = ("base", "law", "maths")


def described(features: torch.Tensor) -> FeatureExtractor:
    return FeatureExtractor("gradient", lambda rows: features[: len(rows)], {})


def judgement(nll: torch.Tensor, gap: float = 0.0, tokens: torch.Tensor | None = None) -> CrossFitLosses:
    """Losses of single experts, and even pairs that lie `gap` below the mean of the two."""
    pairs = pairs_that_gain_nothing(nll) - gap * (1 - torch.eye(nll.shape[1]))
    return CrossFitLosses(EXPERTS, nll, pairs, torch.ones(len(nll)) if tokens is None else tokens)


# --------------------------------------------------------------------------------------------------- the judgement


def log_linear(logits: torch.Tensor, weights: torch.Tensor, target: int) -> float:
    """The loss of one token under summed logits, (expert, vocabulary)."""
    return float(-(weights @ logits).log_softmax(-1)[target])


def test_the_estimated_loss_is_exact_for_one_expert_and_for_an_even_pair():
    logits = normal(3, 11, seed=1)
    eye = torch.eye(3)
    pairs = torch.tensor([[[log_linear(logits, (a + b) / 2, 4) for b in eye] for a in eye]])
    found = CrossFitLosses(EXPERTS, pairs.diagonal(dim1=1, dim2=2), pairs, torch.ones(1))
    for weights in [*eye, (eye[0] + eye[1]) / 2, (eye[1] + eye[2]) / 2]:
        assert float(found.mixture_nll(weights[None])) == pytest.approx(log_linear(logits, weights, 4), abs=1e-5)


def test_the_estimated_loss_of_other_mixtures_errs_in_the_third_order_only():
    """Experts that lie ten times closer together make the error of the estimate about a thousand times smaller."""
    weights, eye = torch.tensor([[0.5, 0.2, 0.3]]), torch.eye(3, dtype=torch.float64)
    errors = []
    for distance in (0.5, 0.05):
        logits = (normal(1, 11, seed=2) + distance * normal(3, 11, seed=3)).double()
        pairs = torch.tensor([[[log_linear(logits, (a + b) / 2, 4) for b in eye] for a in eye]], dtype=torch.float64)
        found = CrossFitLosses(EXPERTS, pairs.diagonal(dim1=1, dim2=2), pairs, torch.ones(1))
        errors.append(abs(float(found.mixture_nll(weights.double())) - log_linear(logits, weights[0].double(), 4)))
    assert errors[1] < errors[0] / 300


def test_the_best_single_expert_is_best_per_token_not_per_row():
    nll = torch.tensor([[1.0, 0.0, 5.0], [1.0, 2.0, 5.0]])
    assert judgement(nll, tokens=torch.tensor([3.0, 1.0])).best_single() == "law"
    assert judgement(nll, tokens=torch.tensor([1.0, 3.0])).best_single() == "base"


# ------------------------------------------------------------------------------------------------ predicted losses


def separable(count: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose first element says which of two experts is better by half a nat; the base is in between."""
    features = normal(count, 16, seed=seed)
    side = features[:, 0].sign()
    nll = 2.0 + normal(count, 1, seed=seed + 1).abs() + torch.stack([0 * side, 0.25 * side, -0.25 * side], dim=1)
    return features, nll


def test_a_loss_router_learns_which_expert_is_good_at_what():
    features, nll = separable()
    fitted = fit_loss_router([features], judgement(nll))
    router = LossRouter(described(features), fitted.chosen.head, EXPERTS, fitted.chosen.sharpness)
    fresh, wanted = separable(200, seed=7)
    found = router.weigh(fresh)
    right = found.weights.argmax(dim=1) == wanted.argmin(dim=1)
    assert float(right.float().mean()) > 0.8  # 0.5 by chance between the two
    expected = judgement(wanted).mixture_nll(found.weights).mean()
    uniform = wanted.mean()
    oracle = wanted.min(dim=1).values.mean()
    assert float((uniform - expected) / (uniform - oracle)) > 0.5


def test_where_nothing_can_be_predicted_the_best_fixed_weights_are_found():
    """One expert is better everywhere by 0.3, whatever the prompt: noise must not move the weights off it."""
    features = normal(80, 16, seed=3)
    nll = 2.0 + normal(80, 1, seed=4).abs() + 0.05 * normal(80, 3, seed=5) + torch.tensor([0.3, 0.0, 0.3])
    fitted = fit_loss_router([features], judgement(nll))
    weights = weigh(predict(fitted.chosen.head, normal(50, 16, seed=6)), fitted.chosen.sharpness)
    assert float(weights[:, 1].min()) > 0.9


def test_experts_that_gain_by_being_mixed_are_mixed():
    """All equally good, and every even pair 0.2 better than its halves: the uniform mixture is the best there is."""
    fitted = fit_loss_router([normal(40, 8)], judgement(torch.full((40, 3), 2.0), gap=0.2))
    weights = weigh(predict(fitted.chosen.head, normal(10, 8, seed=1)), fitted.chosen.sharpness)
    torch.testing.assert_close(weights, torch.full((10, 3), 1 / 3), atol=1e-3, rtol=0)


def test_what_is_expected_is_not_what_the_choice_was_made_by():
    """Of eight kinds of noise the best promises a gain, by the very estimate that it was chosen for; there is none."""
    kinds = [normal(60, 16, seed=seed) for seed in range(8)]
    losses = judgement(2 + normal(60, 3, seed=30))
    fitted, target = fit_loss_router(kinds, losses), losses.nll.double() - losses.nll.double().mean(dim=1, keepdim=True)
    place, _, penalty, sharpness = fitted.chosen
    predicted = loss.out_of_fold(kinds[place], target, losses.tokens, [penalty])[penalty]
    promised = losses.mean(losses.mixture_nll(weigh(predicted, sharpness).float()))
    even = losses.mean(losses.nll.mean(dim=1))
    assert promised < even - 0.1 and fitted.expected_nll > even - 0.05


def test_no_row_has_a_part_in_the_regression_that_it_is_weighed_by():
    """A row whose losses are turned round keeps its weights, and changes those of rows of other folds."""
    features, nll = separable()
    before, other = fit_loss_router([features], judgement(nll)).weights, nll.clone()
    other[0] = nll[0].flip(0) + torch.tensor([0.0, 3.0, 0.0])
    after, fold = fit_loss_router([features], judgement(other)).weights, loss.folds_of(60, 0)
    assert torch.equal(before[fold == fold[0]], after[fold == fold[0]]) and not torch.equal(before, after)


@pytest.mark.parametrize("dimensions", [5, 50], ids=["fewer dimensions", "fewer rows"])
def test_the_regression_is_the_one_that_minimises_the_penalised_squares(dimensions):
    """Against the normal equations with an intercept, in float64."""
    unit = torch.nn.functional.normalize(normal(30, dimensions).double(), dim=-1)
    target, tokens, penalty = normal(30, 3, seed=1).double(), normal(30, seed=2).double().abs() + 0.5, 0.7
    shares = (tokens / tokens.mean())[:, None]
    centre, level = (shares * unit).mean(0), (shares * target).mean(0)
    rows, wanted = shares.sqrt() * (unit - centre), shares.sqrt() * (target - level)
    weight = torch.linalg.solve(rows.T @ rows + penalty * torch.eye(dimensions).double(), rows.T @ wanted).T
    found = loss._ridges(unit, target, tokens, [penalty])[0]
    torch.testing.assert_close(found.weight, weight.float())
    torch.testing.assert_close(found.bias, (level - weight @ centre).float())


def test_permuting_experts_permutes_their_predicted_losses():
    features, nll = separable()
    order = [2, 0, 1]
    one = fit_loss_router([features], judgement(nll))
    other = fit_loss_router([features], judgement(nll[:, order]))
    torch.testing.assert_close(other.chosen.head.weight, one.chosen.head.weight[order])
    assert other.chosen.sharpness == one.chosen.sharpness


def test_predictions_and_names_must_match():
    with pytest.raises(CoterieError, match="3 predictions do not fit the 2 experts"):
        LossRouter(described(normal(1, 2)), Ridge(torch.zeros(3, 2), torch.zeros(3)), ["a", "b"], 1.0)


# --------------------------------------------------------------------------- weights of routers that did not see a row


def made_run(rows: int = 60) -> ElreaRun:
    """What routers are made from: random gradients, of which every fifth row is of a third cluster of its own kind."""
    features, labels = normal(rows, 64), [number % 2 if number % 5 else 2 for number in range(rows)]
    features += 2 * torch.eye(64)[labels]
    router = CentroidRouter.by_cluster(
        described(features), centroids_of(features, labels, 3), ["cluster-0", "cluster-1", "cluster-2"]
    )
    run = object.__new__(ElreaRun)  # without a folder
    known = {"features": features, "labels": labels, "sources": [None] * rows, "router": router}
    run.__dict__.update(known, settings=SimpleNamespace(seed=0))
    return run


def noise(rows: int = 60) -> CrossFitLosses:
    """Losses of experts of which none is better than another but by chance, whatever the row."""
    nll = 2 + normal(rows, 4, seed=8)
    names = ("base", "cluster-0", "cluster-1", "cluster-2")
    return CrossFitLosses(names, nll, pairs_that_gain_nothing(nll), torch.ones(rows))


def test_a_router_that_saw_a_rows_losses_gains_by_noise_and_its_unseen_weights_do_not():
    run, losses = made_run(), noise()
    build = partial(fitted_routers.performance_of, losses)
    seen = fitted_routers.weights_of(build(run, torch.arange(60)), run.features, losses)
    unseen = fitted_routers.unseen_weights(run, build, losses)
    gains = [float((losses.nll.mean(dim=1) - losses.mixture_nll(weights)).mean()) for weights in (seen, unseen)]
    assert gains[0] > 0.4 and gains[1] < 0.15  # the mean of sixty such differences errs by 0.1


@pytest.mark.parametrize("build", [fitted_routers.elrea_of, fitted_routers.membership_of])
def test_no_row_has_a_part_in_the_weights_that_it_is_judged_by(build):
    """A row that is turned round turns its own weights as the router of the others says, and moves no centroid."""
    run, losses, folds = made_run(), noise(), assign_folds(made_run().labels, 5, 0)
    before = fitted_routers.unseen_weights(run, build, losses)
    own = folds == folds[0]
    others = (~own).nonzero().flatten()
    torch.testing.assert_close(before[own], fitted_routers.weights_of(build(run, others), run.features[own], losses))
    run.features[0] *= -7
    after = fitted_routers.unseen_weights(run, build, losses)
    assert torch.equal(before[own][1:], after[own][1:]) and not torch.equal(before[~own], after[~own])


def test_an_expert_whose_rows_are_all_left_out_has_no_weight():
    run, losses = made_run(), noise()
    run.labels[:] = [int(number == 7) for number in range(60)]
    found = fitted_routers.unseen_weights(run, fitted_routers.elrea_of, losses)
    folds = assign_folds(run.labels, 5, 0)
    assert torch.equal(found[:, 2] > 0, folds != folds[7]) and bool((found[:, 3] == 0).all())
    torch.testing.assert_close(found.sum(dim=1), torch.ones(60))


# ------------------------------------------------------------------------------------------- performance centroids


def test_performance_centroids_are_the_mean_unit_features_of_one_source_and_one_best_expert():
    features = torch.tensor([[3.0, 0.0], [0.0, 2.0], [5.0, 0.0], [0.0, 1.0]])
    nll = torch.tensor([[2.0, 1.0, 3.0], [2.0, 1.0, 3.0], [0.5, 1.0, 3.0], [2.0, 1.0, 3.0]])
    centroids = centroids_by_best(features, judgement(nll).best_of_rows(), ["a", "a", "a", "b"])
    assert set(centroids) == {"base", "law"}
    assert centroids["base"].tolist() == [[1.0, 0.0]]
    assert centroids["law"].tolist() == [[0.5, 0.5], [0.0, 1.0]]


def test_a_prompt_goes_to_the_expert_whose_centroids_are_nearest_on_average():
    """Mean cosines of (1, 0): a has (1 + 0) / 2, b has 0.6; standardised over both -1 and 1, softmax 1 / (1 + e^2)."""
    centroids = {"a": torch.tensor([[2.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([[3.0, 4.0]])}
    found = CentroidRouter.by_performance(described(normal(1, 2)), centroids).weigh(torch.tensor([[1.0, 0.0]]))
    assert found.row(0) == pytest.approx({"a": 0.11920292, "b": 0.88079708})
    assert [float(found.similarities[name][0]) for name in "ab"] == pytest.approx([0.5, 0.6])


def test_the_centre_is_taken_off_before_features_are_compared():
    centre = torch.tensor([5.0, -1.0])
    centroids = {"a": torch.eye(2)[:1], "b": torch.eye(2)[1:]}
    plain = CentroidRouter.by_performance(described(normal(1, 2)), centroids)
    centred = CentroidRouter.by_performance(described(normal(1, 2)), centroids, centre)
    features = normal(4, 2)
    assert torch.allclose(centred.weigh(features + centre).weights, plain.weigh(features).weights)


def test_no_centroids_are_refused():
    with pytest.raises(CoterieError, match="at least one expert with rows it is best on"):
        CentroidRouter.by_performance(described(normal(1, 2)), {})


# ------------------------------------------------------------------------------------------------- smaller routers


def test_folded_features_keep_inner_products_on_average_and_folding_is_linear():
    signs = normal(400, 4096, seed=9).sign()
    x, y = normal(4096, seed=1), normal(4096, seed=2)
    x, y = x / x.norm(), 0.6 * x / x.norm() + 0.8 * y / y.norm()
    found = (fold(signs * x, 64) * fold(signs * y, 64)).sum(dim=1)
    assert float(found.mean()) == pytest.approx(float(x @ y), abs=3 * float(found.std()) / 20)
    assert 0.5 / 8 < float(found.std()) < 2 / 8  # the error grows as 1 / sqrt(64)
    torch.testing.assert_close(fold(x + 2 * y, 64), fold(x, 64) + 2 * fold(y, 64))
    with pytest.raises(CoterieError, match="d_proj=100 must divide the 4096 dimensions"):
        fold(x, 100)


def test_a_folded_router_compares_folded_features_with_folded_centroids():
    centroids, features = normal(3, 64), normal(5, 64, seed=1)
    whole = CentroidRouter.by_cluster(described(features), centroids, ["a", "b", "c"])
    small = CentroidRouter.by_cluster(described(features), fold(centroids, 8), ["a", "b", "c"])
    found = whole.folded(8).weigh(features)
    torch.testing.assert_close(found.weights, small.weigh(fold(features, 8)).weights)
    torch.testing.assert_close(whole.folded(64).weigh(features).weights, whole.weigh(features).weights)


def test_derived_weights_are_the_largest_scaled_to_one():
    router = DerivedRouter(FixedRouter({"a": 1.0, "b": 3.0, "c": 2.0}), top_k=2, normalised=True)
    prompt = TokenRow((1,), 1, (False,), (True,))
    assert router.route([prompt]).row(0) == pytest.approx({"a": 0.0, "b": 0.6, "c": 0.4})


def test_the_oracle_takes_the_smallest_loss_and_answers_no_prompt():
    oracle = OracleRouter(["a", "b"])
    assert oracle.weigh(torch.tensor([[1.0, 2.0], [3.0, 0.5]])).weights.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(CoterieError, match="exists in `coterie eval` only"):
        oracle.route([])


def test_a_prompt_goes_to_the_expert_of_its_own_data_set():
    router = SourceRouter({"gsm8k": "dataset-gsm8k", "law/uk": "dataset-law-uk"})
    rows = [TokenRow((1,), 1, (False,), (True,), source) for source in ("law/uk", "gsm8k")]
    assert router.route(rows).row(0) == {"dataset-gsm8k": 0.0, "dataset-law-uk": 1.0}
    assert router.route(rows).row(1) == {"dataset-gsm8k": 1.0, "dataset-law-uk": 0.0}
    with pytest.raises(CoterieError, match="at least one source"):
        SourceRouter({})


@pytest.mark.parametrize("gate", [torch.zeros(3, 4), torch.zeros(4), torch.full((2, 4), torch.nan)], ids=str)
def test_a_broken_gate_is_told_by_its_layer(gate):
    with pytest.raises(
        CoterieError, match="the gate of model.x is .* for 2 experts or holds NaN; train the gates again"
    ):
        read_gates({"model.x": gate}, ["a", "b"])


def test_a_router_of_an_unknown_kind_is_told(mixture, tmp_path):
    with pytest.raises(CoterieError, match="no router is called 'los'. Did you mean 'loss'"):
        load_router({"kind": "los"}, RouterParts(tmp_path, tmp_path, mixture.backbone, mixture.bank))


# --------------------------------------------------------------------------------------------- a network beside lines


def two_signs(seed: int, count: int = 400) -> tuple[torch.Tensor, CrossFitLosses]:
    """`law` is good where the first two numbers have one sign, `maths` where they have two: no line tells that."""
    features = normal(count, 4, seed=seed)
    alike = (features[:, 0] * features[:, 1] > 0).float()
    nll = 2 + 0.02 * normal(count, 3, seed=seed + 1)
    return features, judgement(nll - 0.5 * torch.stack([torch.zeros(count), alike, 1 - alike], dim=1))


def test_a_network_is_kept_where_no_line_predicts_losses_and_a_line_where_one_does():
    features, losses = two_signs(0)
    lines, networks = (fit_loss_router([features], losses, with_mlp=with_mlp) for with_mlp in (False, True))
    assert isinstance(lines.chosen.head, Ridge) and isinstance(networks.chosen.head, Mlp)
    assert lines.expected_nll > 1.70 and networks.expected_nll < 1.60  # 1.83 for even weights, 1.5 for the right ones
    new, judged = two_signs(5)
    weights = weigh(predict(networks.chosen.head, new), networks.chosen.sharpness)
    assert float(judged.mixture_nll(weights).mean()) < 1.60
    straight = judgement(2 + torch.stack([torch.zeros(400), features[:, 0], -features[:, 0]], dim=1) / 4)
    assert isinstance(fit_loss_router([features], straight, with_mlp=True).chosen.head, Ridge)


def test_networks_fitted_side_by_side_are_those_that_are_fitted_alone_on_the_rows_that_they_see():
    features, target, tokens = normal(40, 6, seed=1), normal(40, 3, seed=2).double(), 1.0 + torch.arange(40) % 7
    seen = torch.arange(40) % 3 != torch.arange(3)[:, None]
    for own, rows in zip(fit_mlps(features, target, tokens, seen, decay=0.5, seed=4), seen, strict=True):
        all_of_it = torch.ones(1, int(rows.sum()), dtype=torch.bool)
        (alone,) = fit_mlps(features[rows], target[rows], tokens[rows], all_of_it, decay=0.5, seed=4)
        torch.testing.assert_close(predict(own, features), predict(alone, features), rtol=1e-3, atol=1e-3)


def test_a_network_is_kept_in_a_folder_and_one_whose_parts_do_not_fit_is_told(tmp_path, mixture):
    extractor = mixture.router.extractor
    width = extractor.dimensions
    head = Mlp(normal(6, width, seed=1), normal(6, seed=2), normal(3, 6, seed=3), normal(3, seed=4))
    parts = RouterParts(tmp_path, mixture.folder, mixture.backbone, mixture.bank)
    record = LossRouter(extractor, head, EXPERTS, 8.0, torch.ones(width)).save(tmp_path)
    loaded = load_router(record, parts)
    features = normal(5, width, seed=5)
    slow = ((features - 1) / (features - 1).norm(dim=1, keepdim=True)) @ head.inner.T + head.inner_bias
    wanted = (-8.0 * (slow.clamp(min=0) @ head.weight.T + head.bias)).softmax(dim=1)
    torch.testing.assert_close(loaded.weigh(features).weights, wanted, rtol=1e-4, atol=1e-5)
    LossRouter(extractor, head._replace(weight=normal(3, 5, seed=3)), EXPERTS, 8.0).save(tmp_path)
    with pytest.raises(CoterieError, match="the entry of the router 'loss' is broken .*weights of 5 inputs"):
        load_router(record, parts)


# ------------------------------------------------------------------------------------- routers that measure no losses


def test_ariadne_gives_a_prompt_to_the_expert_whose_rows_have_the_nearest_centroid(grid):
    router, run = grid.router("ariadne"), ElreaRun.open(grid.own, GRID)
    assert 3 <= len(router.table) <= 15 and (router.table.sum(dim=1) == 1).all()
    features = router.features([row.prompt() for row in run.kept.rows])
    near = [[float(torch.cosine_similarity(row, centre, 0)) for centre in router.pieces.centroids] for row in features]
    owner = router.table.argmax(dim=1)[torch.tensor(near).argmax(dim=1)]
    assert torch.equal(router.weigh(features).weights, torch.nn.functional.one_hot(owner).float())
    assert float((owner == torch.tensor(run.labels)).float().mean()) > 0.9  # kinds of rows that are clearly different


def test_gradientspace_trains_an_expert_for_each_of_its_clusters_and_asks_one(grid):
    extra, run = grid.extras["gradient-space"], ElreaRun.open(grid.own, GRID)
    assert extra.bank.names == ("space-0", "space-1", "space-2")
    weights = extra.router.route([row.prompt() for row in run.kept.rows]).weights
    assert set(weights.unique().tolist()) == {0.0, 1.0} and (weights.sum(dim=1) == 1).all()
    file = grid.own.folder / "methods" / "gradient-space" / "clusters.jsonl"
    own = [int(json.loads(line)["cluster"].rpartition("-")[2]) for line in file.read_text().splitlines()]
    assert float((weights.argmax(dim=1) == torch.tensor(own)).float().mean()) > 0.9
