"""What gateways scrape to choose a replica (Kubernetes' Gateway API Inference Extension, llm-d), under vLLM's names."""

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from served import started


def test_a_gateway_that_knows_vllm_finds_queue_cache_and_adapters(run_folder):
    with started(f"elrea={run_folder}", metrics_names="vllm") as server:
        body = {"model": "cluster-0", "prompt": "add", "max_tokens": 400, "stream": True, "logit_bias": {"257": -100}}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            chunks = response.iter_bytes()
            next(chunks)
            page = httpx2.get(f"{server.url}/metrics").text
    found = {sample.name: sample for family in text_string_to_metric_families(page) for sample in family.samples}
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert found[f"vllm:{name}"].labels == {"model_name": "elrea"}
    adapters = found["vllm:lora_requests_info"]
    assert adapters.labels.keys() == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert adapters.labels["running_lora_adapters"] == "cluster-0" and adapters.value > 1.7e9


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_both_routes_that_a_gateway_requires_are_there(client, path):
    """Their protocol says MUST."""
    assert client.post(path, json={}).status_code == 400
