"""A2 line 18: whatever the app's own document allows, no request gets a 5xx.

vLLM runs schemathesis on its document and still finds some: vllm-project/vllm#54116 (a free dictionary).
"""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from coterie.serve.app import create_app
from coterie.serve.catalogue import Catalogue
from coterie.serve.worker import Worker
from coterie.settings.serving import ServeSettings

DOCUMENT = create_app(Catalogue(s := ServeSettings(mixtures=["none"])), Worker(), s).openapi()
ROUTES = [(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods]
MODELS = ("elrea", "cluster-0", "elrea:uniform-weights", None)


def sent(body: Any, number: int) -> Any:
    """Mostly ask models that there are, and for answers of a few tokens; all else is as it was made."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if "model" in body and (name := MODELS[number % len(MODELS)]):
        body["model"] = name
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if not isinstance(body.get(name), int) or body[name] > 3:
            body[name] = 2
    return body


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_request_that_the_document_allows_is_a_fault_of_the_server(server, client, method, path):
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    numbers = iter(range(10_000))

    @settings(
        max_examples=25, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=schema[path][method].as_strategy())
    def ask(case: schemathesis.Case) -> None:
        case.body = sent(case.body, next(numbers))
        answer = case.call(base_url=server.url)
        assert answer.status_code < 500, (case.body, answer.text)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    ask()
    assert server.worker.is_alive
