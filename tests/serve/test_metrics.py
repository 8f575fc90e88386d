"""Metrics: what passes a server is counted exactly, under the names that dashboards know."""

import asyncio
import math
import time
from dataclasses import replace

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from coterie.combiners.table import make_combiner
from coterie.data.batching import TokenRow
from coterie.engine.request import Begun, Load, Request, Token
from coterie.routers.base import Routing
from coterie.serve.metrics import MEASURES, Metrics, entropy
from coterie.settings.sampling import SamplingSettings

ROUTING = Routing(("one", "two"), torch.tensor([[3.0, 1.0]]))
CLOCK = 100.0


def request(length=3, draws=1, limit=7, routing=ROUTING):
    row = TokenRow(tuple(range(length)), length, (False,) * length, (True,) * length)
    return Request(row, routing, make_combiner("layers"), limit, (SamplingSettings(),) * draws)


def token(finish=None, place=0, draw=0, **fields):
    return Token(place, 1, -0.5, "x", finish, draw=draw, **fields)


def values(metrics):
    """Every sample of the page by its name and labels, the model's first."""
    text = metrics.page()[0].decode()
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels, key="model_name".__ne__))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def passed(metrics, requests, steps, monkeypatch, model="elrea", closes=False, facts=None):
    """Let tokens pass; each step is the seconds before it, and a token or an error."""
    now = [CLOCK]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    async def tokens():
        for seconds, found in steps:
            now[0] += seconds
            if isinstance(found, Exception):
                raise found
            yield found

    async def scene():
        stream = metrics.watched(model, requests, tokens(), {} if facts is None else facts)
        seen = []
        async for found in stream:
            seen.append(found)
            if closes and len(seen) == len(steps):
                await stream.aclose()
        return seen

    return asyncio.run(scene())


@pytest.fixture
def metrics():
    return Metrics(lambda: {"elrea": Load(4, 2, 0.25, 9)})


def test_tokens_pass_unchanged_and_everything_about_them_is_measured(metrics, monkeypatch):
    steps = [
        (3.0, token(begun=Begun(CLOCK + 1, 2), speculated=(4, 1))),
        (0.5, token()),
        (0.25, token("stop", speculated=(2, 2))),
    ]
    assert passed(metrics, [request()], steps, monkeypatch) == [found for _, found in steps]
    found = values(metrics)
    for name, value in {
        "prompt_tokens_total": 3,
        "generation_tokens_total": 3,
        "prefix_cache_queries_total": 3,
        "prefix_cache_hits_total": 2,
        "num_preemptions_total": 0,
        "spec_decode_num_draft_tokens_total": 6,
        "spec_decode_num_accepted_tokens_total": 3,
        "time_to_first_token_seconds_sum": 3.0,
        "request_queue_time_seconds_sum": 1.0,
        "request_prefill_time_seconds_sum": 2.0,
        "request_decode_time_seconds_sum": 0.75,
        "request_inference_time_seconds_sum": 2.75,
        "e2e_request_latency_seconds_sum": 3.75,
        "inter_token_latency_seconds_sum": 0.75,
        "inter_token_latency_seconds_count": 2,
        "request_prompt_tokens_sum": 3,
        "request_generation_tokens_sum": 3,
        "request_params_n_sum": 1,
        "request_params_max_tokens_sum": 7,
        "routing_entropy_nats_sum": -0.75 * math.log(0.75) - 0.25 * math.log(0.25),
    }.items():
        assert found[f"coterie_{name}", "elrea"] == pytest.approx(value), name
    assert found["coterie_request_success_total", "elrea", "stop"] == 1
    assert found["coterie_expert_weight_total", "elrea", "one"] == 2.25
    assert found["coterie_expert_weight_total", "elrea", "two"] == 0.75


def test_answers_to_one_prompt_are_told_apart(metrics, monkeypatch):
    steps = [(1, token(draw=0)), (0, token(draw=1)), (2, token("length", draw=0)), (1, token("stop", draw=1))]
    passed(metrics, [request(draws=2)], steps, monkeypatch)
    found = values(metrics)
    assert found["coterie_inter_token_latency_seconds_sum", "elrea"] == 5
    assert found["coterie_inter_token_latency_seconds_count", "elrea"] == 2
    assert found["coterie_request_generation_tokens_count", "elrea"] == 2
    assert found["coterie_time_to_first_token_seconds_count", "elrea"] == 1
    assert found["coterie_e2e_request_latency_seconds_sum", "elrea"] == 4
    assert [found["coterie_request_success_total", "elrea", why] for why in ("length", "stop")] == [1, 1]


def test_requests_that_come_together_are_measured_one_by_one(metrics, monkeypatch):
    steps, facts = [(1, token("stop", place=1)), (1, token(place=0)), (1, token("length", place=0))], {}
    passed(metrics, [request(5), request(2)], steps, monkeypatch, facts=facts)
    found = values(metrics)
    assert found["coterie_prompt_tokens_total", "elrea"] == 7
    assert found["coterie_e2e_request_latency_seconds_sum", "elrea"] == 1 + 3
    assert [found["coterie_request_success_total", "elrea", why] for why in ("length", "stop")] == [1, 1]
    assert facts == {
        "model": "elrea",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "finish_reasons": ["length", "stop"],
    }


@pytest.mark.parametrize(("error", "reason"), [(ValueError("x"), "error"), (TimeoutError(), "error"), (None, "abort")])
def test_what_does_not_end_by_itself_is_counted_by_why(metrics, monkeypatch, error, reason):
    steps = [(1, token(draw=0)), (1, token("stop", draw=0)), *([(1, error)] if error else [])]
    if error:
        with pytest.raises(type(error)):
            passed(metrics, [request(draws=3)], steps, monkeypatch)
    else:
        passed(metrics, [request(draws=3)], steps, monkeypatch, closes=True)
    found = values(metrics)
    assert found["coterie_request_success_total", "elrea", reason] == 2
    assert found["coterie_request_success_total", "elrea", "stop"] == 1
    assert found["coterie_expert_weight_total", "elrea", "one"] == 1.5
    assert not metrics.open


def test_shares_that_change_are_counted_as_they_are_at_each_token(metrics, monkeypatch):
    gates = replace(ROUTING, weights=torch.tensor([[1.0, 1.0]]))
    steps = [(1, token(weights=(1.0, 0.0))), (1, token(weights=None)), (1, token("stop", weights=(0.5, 0.5)))]
    passed(metrics, [request(routing=gates)], steps, monkeypatch)
    found = values(metrics)
    assert found["coterie_expert_weight_total", "elrea", "one"] == 2.5
    assert found["coterie_expert_weight_total", "elrea", "two"] == 0.5
    assert found["coterie_routing_entropy_nats_sum", "elrea"] == 0


def test_gauges_are_what_the_engines_have_to_do_when_they_are_read(metrics):
    found = values(metrics)
    for name, value in {"num_requests_running": 2, "num_requests_waiting": 4, "kv_cache_usage_perc": 0.25}.items():
        assert found[f"coterie_{name}", "elrea"] == value


def test_who_is_asked_is_listed_while_it_is(metrics, monkeypatch):
    async def never():
        await asyncio.Event().wait()
        yield token()

    async def written():
        yield token()
        await asyncio.Event().wait()

    async def scene():
        before = time.time()
        streams = [metrics.watched(model, [request()], own, {}) for model, own in (("b", never()), ("a", written()))]
        await anext(streams[1])
        task = asyncio.create_task(anext(streams[0]))
        await asyncio.sleep(0)
        found = values(metrics)
        await streams[1].aclose()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return before, found, values(metrics)

    before, found, after = asyncio.run(scene())
    assert before <= found["coterie_lora_requests_info", "1", "a", "b"] <= time.time()
    assert ("coterie_lora_requests_info", "1", "", "") in after
    assert after["coterie_request_success_total", "a", "abort"] == 1


def test_vllm_names_are_used_for_what_vllm_has_and_no_others(monkeypatch):
    both = [Metrics(lambda: {"elrea": Load(0, 0, 0.0, 0)}, names) for names in ("coterie", "vllm")]
    for metrics in both:
        metrics.set_up({"places": "8"})
        passed(metrics, [request()], [(1, token("stop"))], monkeypatch)
    ours, theirs = ({name for name, *_ in values(metrics)} for metrics in both)
    own = {f"coterie_{one.name}" for one in MEASURES if one.is_own}
    assert {name for name in theirs if name.startswith("coterie_")} == {
        name for name in ours if any(name.startswith(one) for one in own)
    }
    assert {name.replace("vllm:", "coterie_") for name in theirs} == ours
    assert {"vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:lora_requests_info"} <= theirs


def test_a_model_that_is_gone_leaves_nothing_behind(metrics, monkeypatch):
    for model in ("elrea", "other"):
        passed(metrics, [request()], [(1, token("stop"))], monkeypatch, model=model)
    metrics.forget("other")
    left = values(metrics)
    assert not [key for key in left if "other" in key] and ("coterie_prompt_tokens_total", "elrea") in left


@pytest.mark.parametrize(("shares", "nats"), [((1.0, 0.0), 0), ((0.25,) * 4, math.log(4)), ((), 0)])
def test_entropy_is_zero_for_one_expert_and_log_of_how_many_for_equal_ones(shares, nats):
    assert entropy(shares) == pytest.approx(nats)
