"""A request chooses its experts: whatever it asks for is what the same mixture does in Python."""

import json
from typing import Any

import httpx2
import pytest

from coterie.methods import load_grid
from coterie.mixture import Mixture
from coterie.routers.fixed import FixedRouter
from served import QUESTION, chat, chat_body, chat_stream

WEIGHTS = {"cluster-0": 0.7, "base": 0.3}


def python(mixture: Mixture, **options: Any) -> str:
    return mixture.generate(QUESTION, max_new_tokens=10, **options)[0].text


def http(client: httpx2.Client, **fields: Any) -> str:
    return chat(client, max_tokens=10, temperature=0, **fields)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("wanted", "same"),
    [
        ({}, lambda own: own),
        ({"weights": WEIGHTS}, lambda own: own.replace(router=FixedRouter(WEIGHTS))),
        (
            {"weights": WEIGHTS, "combiner": "layers"},
            lambda own: own.replace(router=FixedRouter(WEIGHTS), combiner="layers"),
        ),
        (
            {"router": "uniform", "combiner": "weights:svd:2"},
            lambda own: own.replace(router="uniform", combiner="weights:svd:2"),
        ),
        ({"router": "arrow"}, lambda own: own.replace(router="arrow")),
        ({"every": 2, "combiner": "layers"}, lambda own: own.rerouted(2, combiner="layers")),
        ({"every": "inf"}, lambda own: own.rerouted(None)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_the_field_coterie_chooses_router_combiner_and_weights(client, mixture, wanted, same):
    assert http(client, coterie=wanted) == python(same(mixture))


def test_only_the_largest_weights_may_be_kept(client, mixture):
    assert http(client, coterie={"top_k": 1}) == python(mixture, top_k_experts=1)
    told = chat(client, coterie={"top_k": 1, "detail": True})["choices"][0]["coterie"]["weights"]
    assert list(told.values()) == [1.0]


def test_llama_cpps_list_of_scales_is_weights_in_the_layers(client, mixture):
    names = mixture.bank.names
    weights = {names[1]: 0.7, names[0]: 1.3}
    lora = [{"id": 1, "scale": 0.7}, {"id": names[0], "scale": 1.3}]
    wanted = python(mixture.replace(router=FixedRouter(weights), combiner="layers"))
    assert http(client, lora=lora) == wanted == http(client, coterie={"weights": weights, "combiner": "layers"})
    assert http(client, lora=[]) == http(client, lora=[{"id": 0, "scale": 0}]) == http(client, model="elrea:backbone")


def test_routing_is_told_where_it_is_asked_for_and_nowhere_else(client, mixture):
    weights = mixture.route(QUESTION).normalized().row(0)
    plain = client.post(
        "/v1/chat/completions",
        json={"model": "elrea", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2},
    )
    assert "coterie" not in plain.text and "x-coterie-weights" not in plain.headers
    assert chat(client, coterie={"detail": True})["choices"][0]["coterie"]["weights"] == pytest.approx(weights)
    frames = chat_stream(client, coterie={"detail": True})
    assert frames[0]["choices"][0]["coterie"]["weights"] == pytest.approx(weights)
    body = {"model": "elrea", "prompt": QUESTION, "max_tokens": 2}
    asked = client.post("/v1/completions", json=body, headers={"X-Coterie-Weights": "1"})
    told = json.loads(asked.headers["x-coterie-weights"])
    assert told == asked.json()["choices"][0]["coterie"]["weights"] and sum(told.values()) == pytest.approx(1)


def test_weights_that_change_are_told_token_by_token(client):
    wanted = {"every": 1, "combiner": "layers", "detail": True}
    told = chat(client, max_tokens=4, logit_bias={257: -100}, coterie=wanted)["choices"][0]["coterie"]
    assert len(told["tokens"]) == 4 and told["weights"] == told["tokens"][0]["weights"]
    assert all(sum(token["weights"].values()) == pytest.approx(1) for token in told["tokens"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"coterie": {"weights": {"nobody": 1}}}, "no expert is called 'nobody'"),
        ({"coterie": {"router": "nothing"}}, "no router or expert is called 'nothing'"),
        ({"coterie": {"combiner": "mixer"}}, "no combiner is called 'mixer'"),
        ({"coterie": {"router": "arrow", "combiner": "logits"}}, "use layers"),
        ({"coterie": {"top_k": 99}}, "must be between 1 and"),
        ({"coterie": {"every": 1}}, "use layers"),
        ({"lora": [{"id": 99}]}, "no expert is called '99'"),
        ({"model": "nobody"}, "no model is called 'nobody'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_what_a_mixture_cannot_do_is_refused_in_one_line(client, fields, words):
    body = chat_body(**fields)
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == (404 if "model" in fields else 400)
    assert words in answer.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json={**body, "stream": True}).json() == answer.json()


@pytest.mark.parametrize(
    "method", ["moe-routing", "moe-merging", "uniform-weights", "self-consistency", "elrea", "base"]
)
def test_a_mixture_answers_as_each_method_that_needs_no_training(client, mixture, method):
    wanted = python(load_grid(mixture, [method]).cell(method), seed=5)
    assert http(client, model=f"elrea:{method}", seed=5) == wanted
    frames = chat_stream(client, model=f"elrea:{method}", max_tokens=10, temperature=0, seed=5)
    assert "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames) == wanted


def test_answers_that_vote_go_on_with_no_text_and_are_one_answer(client):
    body = {"model": "elrea:self-consistency", "prompt": "add"}
    assert "ask a chat" in client.post("/v1/completions", json=body).json()["error"]["message"]
    several = client.post("/v1/chat/completions", json=chat_body(model="elrea:self-consistency", n=2))
    assert several.status_code == 400 and "leave n out" in several.json()["error"]["message"]
