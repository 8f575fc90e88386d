"""What somebody meets who looks around in a session of Python: names, and objects that print in a few lines."""

import pydoc

import torch

import coterie
from coterie.methods import load_grid
from coterie.mixture import Completion
from coterie.records.evaluation import Trace
from coterie.routers.base import Routing


def test_what_a_session_prints_is_a_few_lines(mixture, run_folder):
    routing = mixture.route(["add 3 4"] * 9)
    pairs = next(adapter for adapter in mixture.bank.adapters if adapter)
    grid = load_grid(mixture, ["elrea"])
    for shown in (mixture, grid, mixture.bank, mixture.backbone, routing, mixture.router, next(iter(pairs.values()))):
        text = repr(shown)
        assert len(text.splitlines()) <= 20 and len(text) < 2000, type(shown)
    text = repr(mixture)
    assert text.startswith(f"Mixture({run_folder})\n") and len(text.splitlines()) == 4
    assert all(name in text for name in mixture.bank.names) and "router=" in text and "combiner=logits" in text
    assert mixture.backbone.identity.id in text and "float32, cpu" in text


def test_a_routing_prints_its_largest_weights_and_how_many_it_has():
    weights = torch.tensor([[0.25, 0.75]]).repeat(7, 1)
    lines = repr(Routing(("a", "b"), weights)).splitlines()
    assert lines == ["Routing(requests=7, experts=2)", *["  b 0.750, a 0.250"] * 5, "  and 2 more"]


def test_a_completion_prints_its_words_not_its_numbers():
    trace = Trace(experts=("a",), pieces=("x",) * 4000, weights=((1.0,),) * 4000)
    answer = Completion("p", "text", (1,) * 4000, (-0.5,) * 4000, "stop", {"a": 1.0}, trace)
    assert repr(answer) == "Completion(prompt='p', text='text', finish_reason='stop', weights={'a': 1.0})"


def test_a_mixture_has_the_names_that_users_of_transformers_look_for(mixture):
    assert mixture.tokenizer is mixture.backbone.tokenizer
    assert mixture.device == torch.device("cpu")


def test_every_public_name_is_listed_and_explained():
    assert set(coterie.__all__) <= set(dir(coterie)) and "__version__" in dir(coterie)
    page = pydoc.plain(pydoc.render_doc(coterie))
    assert [name for name in coterie.__all__ if name not in page] == []
