"""OpenTelemetry's names for generative models are still in development, so that none is sent or measured."""


def test_no_name_of_opentelemetry_is_measured(client):
    """semantic-conventions-genai: status Development."""
    assert "gen_ai" not in client.get("/metrics").text
