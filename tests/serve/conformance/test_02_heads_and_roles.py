"""A2 line 2: all chunks of a stream have one id, time and model; the first one says who speaks, and no other does.

llama.cpp tools/server/tests/unit/test_chat_completion.py, SGLang test_openai_server.py.
"""

from served import chat, chat_stream


def test_chunks_are_of_one_response_and_the_first_has_the_role(client):
    frames = chat_stream(client, stream_options={"include_usage": True})
    assert len({(frame["id"], frame["created"], frame["model"]) for frame in frames}) == 1
    assert {frame["object"] for frame in frames} == {"chat.completion.chunk"}
    deltas = [choice["delta"] for frame in frames for choice in frame["choices"]]
    assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])


def test_every_response_has_an_id_of_its_own(client):
    first, second = chat(client), chat(client)
    assert first["id"] != second["id"] and first["id"].startswith("chatcmpl-") and first["model"] == "elrea"
