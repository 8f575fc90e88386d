"""`/v1/responses`: OpenAI's newer form of an answer tells what `/v1/chat/completions` tells, whole and streamed."""

import json
from typing import Any

import openai
import pytest

from coterie.errors import CoterieError
from served import QUESTION, chat

TIMES = ("id", "created_at", "completed_at")
TURNS = [
    {"role": "user", "content": QUESTION},
    {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "7"}]},
    {"role": "user", "content": [{"type": "input_text", "text": "add 1 2"}]},
]


@pytest.fixture(scope="module")
def asking(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "elrea", "input": QUESTION, "max_output_tokens": 8, "temperature": 0, **fields}


def events_of(client, **fields: Any) -> list[dict[str, Any]]:
    """Ask for a stream, and return its events."""
    answer = client.post("/v1/responses", json=asked(stream=True, **fields))
    assert answer.status_code == 200, answer.text
    *frames, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def timeless(response: dict[str, Any]) -> dict[str, Any]:
    """Return a response without what no two have in common."""
    output = [{**item, "id": None} for item in response["output"]]
    usage = {**response["usage"], "input_tokens_details": None}  # what was cached is another matter
    return {**response, **dict.fromkeys(TIMES), "output": output, "usage": usage}


def test_openai_gets_the_text_and_the_counts_of_a_chat(asking, client):
    wanted = chat(client, temperature=0)
    response = asking.responses.create(**asked(metadata={"a": "b"}))
    assert response.output_text == wanted["choices"][0]["message"]["content"] != ""
    counts = (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens)
    assert counts == tuple(wanted["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total"))
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.metadata == {"a": "b"} and response.max_output_tokens == 8 and response.temperature == 0


def test_instructions_and_turns_are_the_conversation(asking, client):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "add 1 2"},
    ]
    wanted = chat(client, messages=turns, temperature=0)
    response = asking.responses.create(**asked(input=TURNS, instructions="Be kind."))
    assert response.output_text == wanted["choices"][0]["message"]["content"]
    assert response.usage.input_tokens == wanted["usage"]["prompt_tokens"]
    assert response.instructions == "Be kind."


def test_openai_streams_the_response_that_it_gets_whole(asking, client):
    text = asking.responses.create(**asked()).output_text
    asks = asked(extra_body={"stop": [text[2:]]})
    whole = asking.responses.create(**asks)
    with asking.responses.stream(**asks) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text == text.partition(text[2:])[0]
    assert whole.status == final.status == "completed" and whole.completed_at
    told = client.post("/v1/responses", json=asked(stop=[text[2:]])).json()
    assert timeless(events_of(client, stop=[text[2:]])[-1]["response"]) == timeless(told)


def test_a_stream_is_a_message_that_grows(client):
    events = events_of(client)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    text = "".join(event["delta"] for event in events[4:-4])
    (item,) = events[-1]["response"]["output"]
    assert events[-4]["text"] == events[-3]["part"]["text"] == item["content"][0]["text"] == text
    assert events[-2]["item"] == item and events[2]["item"]["id"] == events[5]["item_id"] == item["id"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []


def test_log_probabilities_are_those_of_a_chat(client):
    wanted = chat(client, temperature=0, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    events = events_of(client, include=["message.output_text.logprobs"], top_logprobs=2)
    streamed = [log for event in events if event["type"].endswith(".delta") for log in event["logprobs"]]
    assert streamed == events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert [log["token"] for log in streamed] == [log["token"] for log in wanted]
    assert [log["logprob"] for log in streamed] == pytest.approx([log["logprob"] for log in wanted], abs=1e-5)
    assert all(len(log["top_logprobs"]) == 2 for log in streamed)


@pytest.mark.parametrize("field", [{"combiner": "layers", "weights": {"cluster-0": 3, "base": 1}}, {"router": "arrow"}])
def test_the_weights_are_told_on_demand_and_once(client, field):
    field = {**field, "detail": True}
    whole = client.post("/v1/responses", json=asked(coterie=field)).json()["output"][0]["coterie"]
    plain = chat(client, temperature=0, coterie=field)["choices"][0]["coterie"]
    assert whole["weights"] == pytest.approx(plain["weights"], abs=1e-5)
    events = events_of(client, coterie=field)
    assert events[-1]["response"]["output"][0]["coterie"]["weights"] == pytest.approx(whole["weights"], abs=1e-5)
    told = [
        part for event in events[:-2] for part in (event, event.get("item", {})) if "weights" in part.get("coterie", {})
    ]
    assert len(told) == 1
    assert "coterie" not in client.post("/v1/responses", json=asked()).json()["output"][0]


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is kept here"),
        ({"conversation": {"id": "c"}}, "conversation", "nothing is kept here"),
        ({"background": True}, "background", "nothing is kept here"),
        ({"prompt": {"id": "p"}}, "prompt", "nothing is kept here"),
        ({"n": 2}, "n", "one answer"),
        ({"top_logprobs": 2}, "top_logprobs", "message.output_text.logprobs"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}, "text.format", "in words"),
        ({"tools": [{}], "tool_choice": "required"}, "tool_choice", "demands a call"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "demands a call"),
        ({"input": []}, "input", "1 item"),
        ({"input": None}, "input", "missing"),
        ({"input": [{"role": "assistant", "content": "a"}]}, "input", "no question"),
        ({"input": [*TURNS, {"role": "assistant", "content": "a"}]}, "input", "ends with an answer"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]", "'function_call' are not read"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "input_image"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than"),
        ({"model": "gpt-9"}, "model", "gpt-9"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_supported_is_refused_in_a_line_that_names_it(client, given, param, words, stream):
    answer = client.post("/v1/responses", json={**asked(stream=stream), **given})
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400) and error["param"] == param
    assert words in error["message"] and "\n" not in error["message"]


def test_what_does_not_act_is_named(client):
    given = {
        "include": ["reasoning.encrypted_content"],
        "parallel_tool_calls": True,
        "reasoning": {"effort": "low"},
        "store": True,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "tools": [{"type": "web_search"}],
        "truncation": "auto",
    }
    answer = client.post("/v1/responses", json=asked(**given))
    passed = ["include", "parallel_tool_calls", "reasoning", "store", "text.verbosity", "tools", "truncation"]
    assert sorted(answer.headers["x-coterie-ignored"].split(", ")) == passed
    told = answer.json()
    assert told["tools"] == [] and told["store"] is False and told["truncation"] == "disabled"


def test_an_error_in_the_middle_fails_the_response(client, asking, breaking):
    breaking(CoterieError("the expert broke"))
    events = events_of(client)
    response = events[-1]["response"]
    assert events[-1]["type"] == "response.failed" and response["status"] == "failed"
    assert response["error"] == {"code": "invalid_request_error", "message": "the expert broke"}
    assert response["output"][0]["content"][0]["text"] == "".join(event.get("delta", "") for event in events)
    breaking(RuntimeError("a secret"))
    with pytest.raises(openai.InternalServerError, match="the server has failed"):
        asking.responses.create(**asked())


def test_no_response_is_kept_and_the_client_hears_it(asking):
    for call in (asking.responses.retrieve, asking.responses.delete, asking.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="not kept here"):
            call("resp_1")


@pytest.mark.filterwarnings("ignore")
def test_langchain_asks_by_responses_whole_and_streamed(server, client):
    from langchain_openai import ChatOpenAI

    to = {"base_url": f"{server.url}/v1", "api_key": "none", "model": "elrea", "use_responses_api": True}
    wanted = chat(client, temperature=0)["choices"][0]["message"]["content"]
    model = ChatOpenAI(**to, max_tokens=8, temperature=0)
    answer = model.invoke(QUESTION)
    assert answer.text == wanted and answer.usage_metadata["output_tokens"] == 8
    assert "".join(piece.text for piece in model.stream(QUESTION)) == wanted
