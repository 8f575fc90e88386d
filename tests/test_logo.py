"""LoGo weighs experts by how long what they add to one layer is, at the end of the prompt."""

import pytest
import torch

from coterie.data.examples import load_examples
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank
from coterie.mixture import Mixture
from coterie.routers.logo import LogoRouter
from tiny import make_rows


@pytest.fixture(scope="module")
def prompts(mixture):
    return mixture.tokens(load_examples(make_rows(5, seed=3)))


def test_scores_are_the_lengths_that_dense_updates_give_the_last_token(mixture, prompts):
    """The slow way: one prompt at a time, experts added to the weights, the input of the query caught by a hook."""
    router = LogoRouter(mixture.backbone, mixture.bank)
    model, path = mixture.backbone.model, "model.layers.1.self_attn.q_proj"
    modules = dict(model.named_modules())
    dense = [{own: pair.up.T @ pair.down for own, pair in adapter.items()} for adapter in mixture.bank.adapters]
    before = {own: modules[own].weight.detach().clone() for own in mixture.bank.adapters[0]}
    caught = []
    handle = modules[path].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0][0, -1]))
    with torch.no_grad():
        for own in before:
            modules[own].weight += sum(updates[own] for updates in dense) / len(dense)
        for prompt in prompts:
            model(torch.tensor([prompt.ids]))
        for own, weight in before.items():
            modules[own].weight.copy_(weight)
    handle.remove()
    wanted = torch.stack([torch.stack([(updates[path] @ x).norm() for updates in dense]) for x in caught])
    torch.testing.assert_close(router.read(prompts), wanted, rtol=1e-3, atol=1e-5)
    shares = wanted / wanted.sum(dim=1, keepdim=True)
    torch.testing.assert_close(router.route(prompts).weights, shares, rtol=1e-3, atol=1e-5)


def test_an_expert_that_changes_nothing_gets_no_weight_and_a_bank_of_them_no_router(mixture, prompts):
    bank = ExpertBank((*mixture.bank.names, "null"), (*mixture.bank.adapters, {}))
    assert (LogoRouter(mixture.backbone, bank).route(prompts).weights[:, -1] == 0).all()
    with pytest.raises(CoterieError, match="none of them changes any layer"):
        LogoRouter(mixture.backbone, ExpertBank(("null",), ({},)))


def test_where_the_probe_says_nothing_weights_are_even(mixture):
    count = len(mixture.bank)
    weights = LogoRouter(mixture.backbone, mixture.bank).weigh(torch.zeros(1, count)).weights
    torch.testing.assert_close(weights[0], torch.full((count,), 1 / count))


def test_a_mixture_keeps_it_and_has_it_by_name(mixture, prompts, tmp_path):
    cell = mixture.replace(router="logo", combiner="layers")
    cell.save_pretrained(tmp_path / "kept")
    loaded = Mixture.from_pretrained(tmp_path / "kept", device="cpu")
    assert loaded.router.kind == "logo"
    torch.testing.assert_close(loaded.router.route(prompts).weights, cell.router.route(prompts).weights)
