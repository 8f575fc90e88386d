"""A2 line 5: `[DONE]` is always last, also behind an error in the middle, which OpenAI's clients can read.

vLLM test_completion_error.py; openai raises with the message only if `error` is an object.
"""

import http.client
import json
import time
from contextlib import closing

import openai
import pytest

from coterie.errors import CoterieError
from served import chat_body


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_an_error_in_the_middle_is_a_frame_and_done_follows(client, breaking, route):
    breaking(CoterieError('the "expert" broke\nat /home/me/x'))
    body = chat_body(prompt="add", stream=True, temperature=0)
    lines = client.post(f"/v1/{route}", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and lines[0] != lines[-3]
    error = json.loads(lines[-3].removeprefix("data: "))["error"]
    assert error["message"] == 'the "expert" broke at x' and error["type"] == "invalid_request_error"


def test_openais_client_raises_what_the_frame_says(server, breaking):
    breaking(RuntimeError("a secret"))
    asking = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="the server has failed"):
        list(asking.chat.completions.create(**chat_body(temperature=0), stream=True))
    breaking(RuntimeError("a secret"))
    with pytest.raises(openai.InternalServerError, match="the server has failed"):
        asking.chat.completions.create(**chat_body(temperature=0))


def test_a_connection_outlives_a_bug_of_ours(server, breaking):
    breaking(RuntimeError("a secret"))
    body, kept = json.dumps(chat_body(temperature=0)), set()
    with closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)) as asking:
        for status in (500, 200):
            asking.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            answer = asking.getresponse()
            assert answer.status == status and answer.headers["x-request-id"] and json.loads(answer.read())
            kept.add(asking.sock)
            time.sleep(0.05)
    assert len(kept) == 1 and None not in kept
