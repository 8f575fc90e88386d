"""What requests are taken, and how those that are not are answered."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from coterie.errors import CoterieError
from coterie.serve.errors import ApiError, as_api_error, install
from coterie.serve.schemas import ChatRequest, CompletionRequest
from coterie.settings.reading import from_flat
from coterie.settings.sampling import SamplingSettings

ASKED = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    install(app)

    @app.post("/chat")
    def chat(asked: ChatRequest) -> list[str]:
        return asked.ignored()

    @app.post("/text")
    def text(asked: CompletionRequest) -> list[str]:
        return asked.ignored()

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("secret of /home/me/model")

    @app.get("/wrong")
    def wrong() -> None:
        raise CoterieError("/home/me/runs/elrea: no router is called 'x' at https://host/a/b")

    return TestClient(app, raise_server_exceptions=False)


def told(answer, status=400):
    assert answer.status_code == status
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"] and error["message"]
    return error


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": "hi"}]}, "messages"),
        ({"messages": [*ASKED["messages"], {"role": "assistant", "content": "a"}]}, "messages"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{}], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required"}}}, "tool_choice"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"coterie": {"weight": {"a": 1}}}, "coterie.weight"),
        ({"coterie": {"weights": {"a": -1}}}, "coterie.weights.a"),
        ({"coterie": {"weights": {"a": 0}}}, "coterie.weights"),
        ({"coterie": {"weights": {"a": 1}, "router": "uniform"}}, "coterie.weights"),
        ({"coterie": {"every": 0}}, "coterie.every"),
        ({"coterie": {"top_k": 0}}, "coterie.top_k"),
        ({"coterie": {"weights": {"a": 1}}, "lora": [{"id": 0}]}, "lora"),
        ({"lora": [{"id": 0, "scale": -1}]}, "lora[0].scale"),
    ],
)
def test_a_wrong_field_of_a_chat_is_refused_by_name(client, given, param):
    assert told(client.post("/chat", json=ASKED | given))["param"] == param


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, -2]}, "prompt[0][1]"),
        ({"prompt": [2**31]}, "prompt[0][0]"),
        ({"prompt": ["a", 3]}, "prompt[1]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["a"] * 17, "n": 128}, "n"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_wrong_field_of_a_completion_is_refused_by_name(client, given, param):
    assert told(client.post("/text", json=TEXT | given))["param"] == param


@pytest.mark.parametrize(
    "raw",
    [b"", b"[1]", b'"a"', b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b'{"seed":' + b"1" * 5000 + b"}", b"null"],
)
def test_a_body_that_is_no_object_is_refused_in_openais_form(client, raw):
    told(client.post("/chat", content=raw, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("raw", [b'"\\ud800"', b'["\\udfff"]', b'"\\u0000"', b'"\\ud83d\\ude42"'])
def test_half_a_character_is_refused_and_a_whole_one_is_not(client, raw):
    content = b'{"model": "m", "prompt": ' + raw + b"}"
    answer = client.post("/text", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == (400 if b"\\ud800" in raw or b"\\udfff" in raw else 200)


@pytest.mark.parametrize(
    "given",
    [
        {"tools": None, "stop": None, "n": None, "stream_options": None, "coterie": None, "temperature": None},
        {"tool_choice": "auto", "function_call": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        {"stop": "x", "seed": -5, "logit_bias": {"5": -100}, "top_k": -1, "max_tokens": 5, "max_completion_tokens": 7},
        {"stream": True, "stream_options": {"include_usage": True}, "coterie": {"every": "inf", "weights": {"a": 2}}},
        {"messages": [{"role": "developer", "content": None}, {"role": "guest", "content": "a"}, *ASKED["messages"]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    ],
)
def test_what_clients_send_is_taken(client, given):
    assert (answer := client.post("/chat", json=ASKED | given)).status_code == 200, answer.text
    assert answer.json() == []


def test_what_does_not_act_is_named(client):
    given = {"tools": [{"type": "function"}], "user": "u", "guided_json": None, "stream_options": {"strange": 1}}
    messages = [{"role": "user", "content": "hi", "name": "me", "extra": ""}]
    answer = client.post("/chat", json=ASKED | given | {"messages": messages, "stream": True})
    assert answer.json() == ["messages.name", "stream_options.strange", "tools", "user"]


def test_names_that_a_header_cannot_hold_are_shown_otherwise(client):
    given = {"a\r\nSet-Cookie: x": 1, "é": 1, "": 1, "x" * 100: 1} | {f"n{number:03}": 1 for number in range(60)}
    names = client.post("/chat", json=ASKED | given).json()
    assert len(names) == 32 and names[:3] == ["", "?", "a??Set-Cookie??x"] and max(map(len, names)) <= 64


def test_the_newer_name_of_a_limit_wins_and_null_has_none():
    assert ChatRequest.model_validate(ASKED | {"max_tokens": 5, "max_completion_tokens": 7}).limit == 7
    assert ChatRequest.model_validate(ASKED | {"max_tokens": 5}).limit == 5
    assert ChatRequest.model_validate(ASKED).limit is None
    assert CompletionRequest.model_validate(TEXT).limit == 16
    assert CompletionRequest.model_validate(TEXT | {"max_tokens": None}).limit is None


def test_log_probabilities_are_shown_where_they_were_asked_for():
    assert ChatRequest.model_validate(ASKED).alternatives is None
    assert ChatRequest.model_validate(ASKED | {"logprobs": True}).alternatives == 0
    assert ChatRequest.model_validate(ASKED | {"logprobs": True, "top_logprobs": 3}).alternatives == 3
    assert CompletionRequest.model_validate(TEXT | {"logprobs": 0}).alternatives == 0
    assert CompletionRequest.model_validate(TEXT).alternatives is None


def test_sampling_is_what_the_engine_understands_by_it():
    given = {"temperature": 0.5, "top_k": -1, "logit_bias": {"7": 1e-5}, "stop": "x", "seed": -1, "logprobs": True}
    made = from_flat(SamplingSettings, ChatRequest.model_validate(ASKED | given | {"top_logprobs": 2}).sampling())
    assert (made.temperature, made.top_k, made.stop, made.seed) == (0.5, 0, ["x"], 2**63 - 1)
    assert made.biases() == {7: 1e-5} and made.top_logprobs == 2
    plain = from_flat(SamplingSettings, ChatRequest.model_validate(ASKED).sampling())
    assert plain == SamplingSettings(temperature=1.0, seed=plain.seed)


def test_requests_without_a_seed_have_different_ones():
    assert len({ChatRequest.model_validate(ASKED).sampling()["seed"] for _ in range(5)}) == 5


def test_one_prompt_or_several_of_texts_or_tokens_are_a_list():
    prompts = ["a", ["a", "b"], [1, 2], [[1, 2], [3]]]
    taken = [CompletionRequest.model_validate(TEXT | {"prompt": prompt}).prompt for prompt in prompts]
    assert taken == [["a"], ["a", "b"], [[1, 2]], [[1, 2], [3]]]


def test_parts_of_a_message_are_parted_by_line_ends():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = ChatRequest.model_validate(ASKED | {"messages": [{"role": "user", "content": parts}]})
    assert asked.messages[0].text == "a\nb"


def test_a_bug_of_ours_tells_nothing_of_itself(client):
    error = told(client.get("/broken"), 500)
    assert error["type"] == "server_error" and "secret" not in str(error)


def test_an_error_names_no_folder_of_the_machine(client):
    assert told(client.get("/wrong"))["message"] == "elrea: no router is called 'x' at https://host/a/b"


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/chat", 405)])
def test_paths_and_methods_that_are_not_served(client, path, status):
    told(client.get(path), status)


def test_a_deadline_is_told_as_one():
    assert as_api_error(TimeoutError()).status == 504


def test_headers_of_an_error_are_sent(client):
    app = FastAPI()
    install(app)

    @app.get("/full")
    def full() -> None:
        raise ApiError("the queue is full", 429, code="queue_full", headers={"Retry-After": "1"})

    answer = TestClient(app).get("/full")
    assert answer.headers["retry-after"] == "1" and told(answer, 429)["type"] == "rate_limit_error"
