"""Tokens on the wire: each one's log goes out with its own text, and its bytes are what it adds to the text."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion

import tokenizers_of_kinds
from coterie.engine.request import Token
from coterie.engine.text import TextStream
from coterie.serve.frames import DONE, ChatFrames, CompletionFrames, Log, Pieces, Usage, completion_logprobs, sse
from coterie.serve.token_bytes import TokenBytes

TOKENIZERS = {
    kind: tokenizers_of_kinds.make(kind, special=["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    for kind in tokenizers_of_kinds.KINDS
}
each_kind = pytest.mark.parametrize("kind", TOKENIZERS)
few = settings(max_examples=60, deadline=None)
BYTES = TokenBytes(TOKENIZERS["byte-level"])


def written(tokenizer, ids, stop=()):
    """The tokens of an answer as an engine gives them: the last id ends the turn where it is the end of a text."""
    stream, tokens = TextStream(tokenizer, stop), []
    for place, token in enumerate(ids):
        ends = token == tokenizer.eos_token_id
        text = "" if ends else stream.push(token)
        reason = "stop" if ends or stream.stopped else "length" if place == len(ids) - 1 else None
        text += stream.finish() if reason and not stream.stopped else ""
        tokens.append(Token(0, token, -0.5 - place, text, reason, top=((token, -0.5 - place), (0, -9.0))))
        if reason:
            break
    return tokens


def pieces_of(tokenizer, ids, stop=()):
    pieces = Pieces(0, TokenBytes(tokenizer))
    return [pieces.push(token) for token in written(tokenizer, ids, stop)]


def joined(pieces):
    return "".join(piece.text for piece in pieces), b"".join(log.bytes for piece in pieces for log in piece.logs)


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@each_kind
@few
@given(text=st.text(max_size=20))
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = encoded(tokenizer, text)
    if tokenizer.unk_token_id in ids or tokenizer.backend_tokenizer.token_to_id("<unk>") in ids:
        return  # what a vocabulary cannot write has no bytes
    content, raw = joined(pieces_of(tokenizer, [*ids, tokenizer.eos_token_id]))
    assert raw.decode() == content == tokenizer.decode(ids, skip_special_tokens=True)


@few
@given(text=st.text("ab é🙂", max_size=12), stop=st.text("ab é🙂", min_size=1, max_size=3))
def test_a_log_goes_out_exactly_where_some_of_its_token_is_shown(text, stop):
    tokenizer = TOKENIZERS["byte-fallback-without-prefix"]
    pieces = pieces_of(tokenizer, encoded(tokenizer, text), [stop])
    content, raw = joined(pieces)
    if stop in text:
        assert content == text[: text.index(stop)] and raw.startswith(content.encode())
        last = pieces[-1].logs[-1:] or [log for piece in pieces for log in piece.logs][-1:]
        assert not last or len(raw) - len(last[0].bytes) < len(content.encode())
    else:
        assert content == text and raw == text.encode()
    covered = shown = 0
    for piece in pieces:
        shown += len(piece.text.encode())
        for log in piece.logs:
            assert covered < shown
            covered += len(log.bytes)


def test_half_a_character_keeps_its_own_byte():
    content, raw = joined(pieces_of(TOKENIZERS["byte-level"], encoded(TOKENIZERS["byte-level"], "é")[:1]))
    assert (content, raw) == ("\ufffd", b"\xc3")


def test_a_token_that_is_no_character_is_named_by_its_bytes():
    (first, second) = encoded(TOKENIZERS["byte-level"], "é")
    assert (BYTES.name(first), BYTES.name(second)) == ("bytes:\\xc3", "bytes:\\xa9")
    assert BYTES.name(TOKENIZERS["byte-level"].eos_token_id) == "</s>"


def test_the_token_that_ends_a_turn_is_counted_and_has_no_log():
    tokenizer = TOKENIZERS["byte-level"]
    frames = ChatFrames("m", BYTES, Usage(3), alternatives=1)
    body = frames.whole([pieces_of(tokenizer, [*encoded(tokenizer, "ok"), tokenizer.eos_token_id])])
    answer = ChatCompletion.model_validate(body, strict=True)
    assert answer.usage.completion_tokens == 3 and answer.usage.total_tokens == 6
    assert [entry.token for entry in answer.choices[0].logprobs.content] == ["o", "k"]
    assert answer.choices[0].finish_reason == "stop"


def test_a_chosen_token_stands_among_its_alternatives_with_the_same_number():
    shown = completion_logprobs([Log(5, b"a", -1.25, ((7, -0.5), (8, -1.0)))], 2, BYTES)
    assert shown["token_logprobs"] == [-1.25] and len(shown["top_logprobs"][0]) == 3
    assert shown["top_logprobs"][0][BYTES.name(5)] == -1.25
    alone = completion_logprobs([Log(5, b"a", -1.25)], 0, BYTES)
    assert alone["top_logprobs"] == [{BYTES.name(5): -1.25}]


def test_two_tokens_of_the_same_text_are_two_alternatives():
    tokenizer = TOKENIZERS["byte-fallback-without-prefix"]
    letter, byte = tokenizer.convert_tokens_to_ids(["A", "<0x41>"])
    names = TokenBytes(tokenizer)
    shown = completion_logprobs([Log(byte, b"A", -2.0, ((letter, -0.1),))], 1, names)
    assert sorted(shown["top_logprobs"][0].values()) == [-2.0, -0.1]


def test_a_probability_of_zero_is_a_number_that_json_can_write():
    shown = completion_logprobs([Log(5, b"a", -math.inf, ((5, -math.inf),)), Log(6, b"b", None)], 1, BYTES)
    assert shown["token_logprobs"] == [-9999.0, None] and shown["top_logprobs"][1] is None
    json.dumps(shown, allow_nan=False)


def test_text_offsets_count_characters():
    tokenizer = TOKENIZERS["byte-level"]
    ids = encoded(tokenizer, "aéb")
    shown = completion_logprobs([Log(i, BYTES.middle(i), -1.0) for i in ids], 0, BYTES, 10)
    assert shown["text_offset"] == [10, 11, 12, 12]


def streamed(frames, ids, index=0):
    tokenizer = TOKENIZERS["byte-level"]
    raw = (
        frames.opening(index) + b"".join(frames.piece(piece) for piece in pieces_of(tokenizer, ids)) + frames.closing()
    )
    events = raw.split(b"\n\n")
    assert events[-2:] == [DONE.strip(), b""]
    return [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]


@pytest.mark.parametrize("kind", [ChatFrames, CompletionFrames])
@pytest.mark.parametrize("alternatives", [None, 0, 2])
def test_a_stream_carries_what_the_whole_answer_does(kind, alternatives):
    tokenizer = TOKENIZERS["byte-level"]
    ids = [*encoded(tokenizer, "Là 🙂"), tokenizer.eos_token_id]
    whole = kind("m", BYTES, Usage(2), alternatives).whole([pieces_of(tokenizer, ids)])
    (ChatCompletion if kind is ChatFrames else Completion).model_validate(whole, strict=True)
    chunks = streamed(kind("m", BYTES, Usage(2), alternatives, usage_chunk=True), ids)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    parts = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    if kind is ChatFrames:
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk, strict=True)
        assert parts[0]["delta"] == {"role": "assistant", "content": ""} and parts[-1]["delta"] == {}
        assert "".join(part["delta"]["content"] for part in parts[:-1]) == "Là 🙂"
        logs = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert logs == ((whole["choices"][0]["logprobs"] or {}).get("content") or [])
    else:
        assert "".join(part["text"] for part in parts) == "Là 🙂" and parts[-1]["text"] == ""
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            own = [one for part in parts if part["logprobs"] for one in part["logprobs"][field]]
            assert own == (whole["choices"][0]["logprobs"] or {field: []})[field]


def test_a_stream_tells_its_usage_only_where_that_was_asked_for():
    ids = encoded(TOKENIZERS["byte-level"], "xyz")
    assert all("usage" not in chunk and chunk["choices"] for chunk in streamed(ChatFrames("m", BYTES, Usage(2)), ids))
    always = streamed(ChatFrames("m", BYTES, Usage(2), usage_chunk=True, usage_always=True), ids)
    assert [chunk["usage"]["completion_tokens"] for chunk in always] == [0, 1, 2, 3, 3, 3]


def test_the_routing_is_told_only_on_demand():
    tokenizer = TOKENIZERS["byte-level"]
    pieces = [piece._replace(weights=(0.25, 0.75)) for piece in pieces_of(tokenizer, encoded(tokenizer, "xy"))]
    assert "coterie" not in ChatFrames("m", BYTES, Usage(1)).whole([pieces])["choices"][0]
    asked = {"experts": ("x", "y"), "weights": {0: {"x": 0.5, "y": 0.5}}}
    told = ChatFrames("m", BYTES, Usage(1), **asked).whole([pieces])["choices"][0]["coterie"]
    token = {"weights": {"x": 0.25, "y": 0.75}}
    assert told == {"weights": {"x": 0.5, "y": 0.5}, "tokens": [{"text": "x"} | token, {"text": "y"} | token]}
    frames = ChatFrames("m", BYTES, Usage(1), **asked)
    first, second = (json.loads(raw[6:]) for raw in (frames.opening(0), frames.piece(pieces[0])))
    assert first["choices"][0]["coterie"] == {"weights": {"x": 0.5, "y": 0.5}}
    assert second["choices"][0]["coterie"] == {"tokens": [{"text": "x"} | token]}


def test_an_error_ends_a_stream_with_done():
    raw = ChatFrames("m", BYTES, Usage(1)).failed({"error": {"message": 'a "quote"'}})
    assert raw == b'data: {"error":{"message":"a \\"quote\\""}}\n\n' + DONE
    assert sse({"a": "é\n"}) == 'data: {"a":"é\\n"}\n\n'.encode()
