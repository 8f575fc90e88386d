"""The metrics of vLLM, with exact counts (its tests/entrypoints test_metrics.py)."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

NAMES = """
num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries prefix_cache_hits num_preemptions
prompt_tokens generation_tokens iteration_tokens_total cache_config_info request_success time_to_first_token_seconds
inter_token_latency_seconds e2e_request_latency_seconds request_queue_time_seconds request_inference_time_seconds
request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens request_generation_tokens
request_params_n request_params_max_tokens lora_requests_info
""".split()


def families(client):
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def sampled(client, name, **labels):
    """The sum of the samples of that name that have these labels; 0 where there is none yet."""
    samples = [sample for family in families(client).values() for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name and sample.labels.items() >= labels.items())


def test_every_name_that_dashboards_know_is_there(client):
    """vLLM test_metrics.py; `gpu_cache_usage_perc` is the dead old name."""
    found = families(client)
    assert {f"coterie_{name}" for name in NAMES} <= found.keys()
    assert "coterie_gpu_cache_usage_perc" not in found


def test_counts_are_exact(client):
    """vLLM test_metrics.py: inter_token_latency counts tokens minus one."""
    names = {
        "prompt_tokens_total": 0, "generation_tokens_total": 0, "request_success_total": 3,
        "time_to_first_token_seconds_count": 3, "e2e_request_latency_seconds_count": 3,
        "request_queue_time_seconds_count": 3, "request_inference_time_seconds_count": 3,
        "request_prefill_time_seconds_count": 3, "request_decode_time_seconds_count": 3,
        "request_prompt_tokens_count": 3, "request_generation_tokens_count": 3, "request_params_n_count": 3,
        "request_params_max_tokens_sum": 3 * 9, "inter_token_latency_seconds_count": 0, "prefix_cache_queries_total": 0,
    }  # fmt: skip
    before = {name: sampled(client, f"coterie_{name}") for name in names}
    usages = []
    for number in range(3):
        body = {"model": "elrea", "prompt": f"add {number}", "max_tokens": 9, "temperature": 0}
        usages.append(client.post("/v1/completions", json=body).json()["usage"])
    written = sum(usage["completion_tokens"] for usage in usages)
    read = sum(usage["prompt_tokens"] for usage in usages)
    wanted = names | {
        "prompt_tokens_total": read, "prefix_cache_queries_total": read, "generation_tokens_total": written,
        "inter_token_latency_seconds_count": written - 3,
    }  # fmt: skip
    assert {name: sampled(client, f"coterie_{name}") - before[name] for name in names} == wanted


def test_gauges_return_to_zero(client):
    """vLLM waits for its gauges of running, waiting and cached after a client has gone."""
    with client.stream("POST", "/v1/completions", json={"model": "elrea", "prompt": "add", "max_tokens": 400}) as one:
        next(one.iter_bytes())
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while any(sampled(client, f"coterie_{name}") for name in gauges):
        pass  # a step or two


def test_a_step_reads_a_prompt_and_then_token_by_token(client):
    """vLLM's iteration_tokens_total: a histogram over steps."""
    body = {"model": "elrea", "prompt": list(range(65, 85)), "max_tokens": 6, "temperature": 0}
    names = [f"coterie_iteration_tokens_total_{kind}" for kind in ("count", "sum")]
    before = [sampled(client, name) for name in names]
    tokens = client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"]
    assert [sampled(client, name) - was for name, was in zip(names, before, strict=True)] == [tokens, 20 + tokens - 1]


def test_weights_of_experts_sum_to_tokens(client):
    before = [sampled(client, f"coterie_{name}_total") for name in ("expert_weight", "generation_tokens")]
    client.post("/v1/completions", json={"model": "elrea", "prompt": "spell", "max_tokens": 5})
    mass, tokens = (
        sampled(client, f"coterie_{name}_total") - was
        for name, was in zip(("expert_weight", "generation_tokens"), before, strict=True)
    )
    assert mass == pytest.approx(tokens) and tokens


def test_requests_of_any_kind_are_counted_by_route_and_status(client):
    for path, label, status in (("/health", "/health", 200), ("/none/of/mine", "none", 404)):
        before = sampled(client, "coterie_http_requests_total", path=label, status=str(status))
        assert client.get(path).status_code == status
        assert sampled(client, "coterie_http_requests_total", path=label, status=str(status)) == before + 1
