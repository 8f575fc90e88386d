"""A2 line 16: tools that are only offered are tolerated, and the answer says so; a call that is demanded is refused.

pollinations#14454 (Open WebUI sends tools with every chat), ninfer-3090#14 (codex-cli); shunt#405, ocp#467 (silence).
"""

import pytest

from served import chat_body

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}, {"type": "web_search"}]


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": None}])
@pytest.mark.parametrize("stream", [True, False])
def test_offered_tools_are_answered_in_text_with_a_word(client, choice, stream):
    answer = client.post("/v1/chat/completions", json=chat_body(tools=TOOLS, stream=stream, **choice))
    assert answer.status_code == 200 and "tools" in answer.headers["x-coterie-ignored"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}, "f", 1, [], {"a": 1}])
@pytest.mark.parametrize("stream", [True, False])
def test_a_call_that_is_demanded_is_refused(client, choice, stream):
    answer = client.post("/v1/chat/completions", json=chat_body(tools=TOOLS, stream=stream, tool_choice=choice))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tool_choice"


def test_without_tools_nothing_is_said_of_them(client):
    assert "x-coterie-ignored" not in client.post("/v1/chat/completions", json=chat_body()).headers


def test_a_conversation_with_calls_of_tools_in_it_goes_on(client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    answer = client.post("/v1/chat/completions", json=chat_body(messages=turns))
    assert answer.status_code == 200 and "messages.tool_calls" in answer.headers["x-coterie-ignored"]
