"""Alive is not ready: llm-d's simulator has both, and so do Kubernetes' probes."""


def test_health_and_ready_answer_without_a_key_and_a_dead_worker_is_unhealthy(client):
    """llm-d-inference-sim."""
    assert client.get("/health").json() == {"status": "alive"}
