"""Endpoints over real HTTP: what is sent, what is tried again, what a failure costs, and that the key stays unseen."""

import email.utils
import json
import threading
import time
from types import SimpleNamespace

import pytest

from coterie.data.examples import from_prompt
from coterie.errors import CoterieError
from coterie.experts import endpoints
from coterie.experts.answering import Question, Reply
from coterie.experts.chat_completions import seconds_to_wait
from coterie.experts.endpoints import HOPELESS, Endpoint, EndpointAnswerer, Pace, key_variable
from coterie.settings.groups import ExpertServingSettings, SamplingSettings
from helpers import table
from stub_server import Got, Sent, completion, serving

KEY = "sk-very-secret-0123456789"


def asks(*questions: str, **sampling: object) -> list[Question]:
    return [Question("big", from_prompt(text).messages, SamplingSettings(**sampling)) for text in questions]


def ask_all(stub, questions, **work: object) -> list[Reply]:
    settings = ExpertServingSettings(**{"retries": 2, "timeout": 5.0, "concurrency": 4, **work})
    answerer = EndpointAnswerer(Endpoint("big", stub.url, "some-model"), settings, first_pause=0.01)
    found: dict[int, Reply] = {}
    answerer.answer(questions, found.__setitem__)
    return [found[number] for number in range(len(questions))]


def test_a_question_is_sent_as_the_protocol_wants_it():
    with serving(lambda got: completion("four")) as stub:
        (reply,) = ask_all(stub, asks("2+2?", max_new_tokens=9, temperature=0.5, seed=3, top_p=0.9, stop=["\n"]))
    assert (reply.text, reply.prompt_tokens, reply.tokens, reply.finish_reason) == ("four", 7, 3, "stop")
    assert reply.error is None and reply.seconds > 0
    (got,) = stub.requests
    assert got.path == "/v1/chat/completions" and got.key is None
    assert got.body == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "2+2?"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 3,
        "top_p": 0.9,
        "stop": ["\n"],
    }


def test_penalties_and_biases_are_sent_as_servers_take_them():
    given = {"min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.25, "repetition_penalty": 1.25}
    with serving(lambda got: completion("four")) as stub:
        ask_all(stub, asks("2+2?", logit_bias=["12=-100", "7=1.5"], **given))
    usual = {"model", "messages", "max_tokens", "temperature"}
    sent = {name: value for name, value in stub.requests[0].body.items() if name not in usual}
    assert sent == {**given, "logit_bias": {"12": -100.0, "7": 1.5}}


def test_fields_that_say_nothing_are_not_sent():
    with serving(lambda got: completion("x")) as stub:
        ask_all(stub, asks("hi"))
    assert set(stub.requests[0].body) == {"model", "messages", "max_tokens", "temperature"}


def test_an_answer_cut_off_at_its_longest_says_so():
    with serving(lambda got: completion("x", "length")) as stub:
        assert ask_all(stub, asks("hi"))[0].finish_reason == "length"


def test_tokens_are_estimated_where_the_server_does_not_count():
    answer = {"choices": [{"message": {"content": "12345678"}}]}
    with serving(lambda got: Sent(200, answer)) as stub:
        (reply,) = ask_all(stub, asks("abcd"))
    assert (reply.prompt_tokens, reply.tokens) == (1, 2)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    def respond(got: Got) -> Sent:
        return completion("at last") if len(stub.requests) == 3 else Sent(status, {"error": {"message": "busy"}})

    with serving(respond) as stub:
        assert ask_all(stub, asks("hi"))[0].text == "at last"


def test_the_pause_that_a_server_asks_for_is_kept():
    def respond(got: Got) -> Sent:
        return completion("ok") if len(stub.requests) == 2 else Sent(429, {}, (("Retry-After", "0.5"),))

    with serving(respond) as stub:
        assert ask_all(stub, asks("hi"))[0].text == "ok"
    assert stub.requests[1].moment - stub.requests[0].moment >= 0.5


def test_pauses_grow_from_try_to_try():
    with serving(lambda got: Sent(500, {})) as stub:
        settings = ExpertServingSettings(retries=2, timeout=5.0)
        answerer = EndpointAnswerer(Endpoint("big", stub.url, "m"), settings, first_pause=0.2)
        found: dict[int, Reply] = {}
        answerer.answer(asks("hi"), found.__setitem__)
    first, second, third = (got.moment for got in stub.requests)
    assert second - first >= 0.1 and third - second >= 0.2
    assert found[0].error is not None and "answered 500" in found[0].error


GARBAGE = {
    "no json": b"<html>gateway</html>",
    "no choices": {"id": 1},
    "empty choices": {"choices": []},
    "no message": {"choices": [{"text": "x"}]},
    "a number as text": {"choices": [{"message": {"content": 3}}]},
    "numbers as parts": {"choices": [{"message": {"content": [3]}}]},
    "an odd choice": {"choices": ["x"]},
    "a list": [1, 2],
    "not utf-8": b"\xff\xfe",
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_costs_one_answer_and_is_reported(kind):
    def respond(got: Got) -> Sent:
        return Sent(200, GARBAGE[kind]) if got.question == "b" else completion(f"re {got.question}")

    with serving(respond) as stub:
        replies = ask_all(stub, asks("a", "b", "c"))
    assert [reply.text for reply in replies] == ["re a", "", "re c"]
    assert "no chat completion" in replies[1].error and "\n" not in replies[1].error
    assert len(stub.requests) == 3


def test_a_slow_answer_is_given_up():
    def respond(got: Got) -> Sent:
        return completion("x")._replace(delay=2.0 if got.question == "slow" else 0.0)

    with serving(respond) as stub:
        replies = ask_all(stub, asks("slow", "fast"), timeout=1.0, retries=0)
    assert replies[1].text == "x" and "does not answer (no whole answer within 1 s)" in replies[0].error


def test_an_answer_that_drips_in_is_given_up_at_the_deadline():
    started = time.monotonic()
    with serving(lambda got: completion("x")._replace(drip=0.05)) as stub:
        (reply,) = ask_all(stub, asks("hi"), timeout=0.3, retries=0)
    assert "does not answer (no whole answer within 0.3 s)" in reply.error
    assert time.monotonic() - started < 5, "every byte came in time, the whole answer would have taken 6 seconds"


def test_an_endless_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(endpoints, "LARGEST_ANSWER", 100)
    with serving(lambda got: completion("x" * 200)) as stub:
        (reply,) = ask_all(stub, asks("hi"))
    assert reply.error == "the answer has more than 100 bytes" and len(stub.requests) == 1


def test_a_proxy_that_cannot_be_used_is_told(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:1")
    with serving(lambda got: completion("x")) as stub, pytest.raises(CoterieError, match="proxy that the environment"):
        ask_all(stub, asks("hi"))


def test_a_refused_question_costs_only_itself():
    def respond(got: Got) -> Sent:
        return Sent(400, {"error": {"message": "too\nlong"}}) if got.question == "b" else completion("ok")

    with serving(respond) as stub:
        replies = ask_all(stub, asks("a", "b", "c"))
    assert [reply.error is None for reply in replies] == [True, False, True]
    assert replies[1].error.endswith("answered 400 (too long)") and len(stub.requests) == 3


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "check the key in COTERIE_KEY_BIG"), (404, "check the model's name")]
)
def test_a_server_that_refuses_everything_is_asked_once(status, hint):
    with serving(lambda got: Sent(status, {})) as stub:
        replies = ask_all(stub, asks(*"abcdefgh"), concurrency=1)
    assert len(stub.requests) == 1 and all(hint in reply.error for reply in replies)


def test_a_server_that_is_gone_is_given_up_after_some_questions():
    with serving(lambda got: Sent(503, {})) as stub:
        replies = ask_all(stub, asks(*"abcdefgh"), concurrency=1, retries=1)
    assert len(stub.requests) == 2 * HOPELESS
    assert all(reply.error for reply in replies) and "not asked any more" in replies[-1].error


def test_a_server_that_answers_now_and_then_is_not_given_up():
    with serving(lambda got: Sent(503, {}) if int(got.question) % 2 else completion("ok")) as stub:
        replies = ask_all(stub, asks(*map(str, range(2 * HOPELESS + 2))), concurrency=1, retries=0)
    assert [reply.error is None for reply in replies] == [True, False] * (HOPELESS + 1)
    assert len(stub.requests) == len(replies)


def test_an_address_where_nobody_listens_is_told():
    with serving(lambda got: completion("x")) as stub:
        pass
    (reply,) = ask_all(stub, asks("hi"), retries=0)
    assert "does not answer" in reply.error and "connection attempts failed" in reply.error


def test_as_many_requests_as_allowed_run_at_a_time_and_no_more():
    three = threading.Barrier(3)

    def respond(got: Got) -> Sent:
        three.wait(60)
        return completion("x")._replace(delay=0.05)  # a fourth would come meanwhile

    with serving(respond) as stub:
        replies = ask_all(stub, asks(*map(str, range(12))), concurrency=3, timeout=60)
    assert {reply.text for reply in replies} == {"x"} and stub.most_at_once == 3


def test_requests_a_minute_are_limited():
    started = time.monotonic()
    with serving(lambda got: completion("x")) as stub:
        ask_all(stub, asks(*"abcd"), requests_per_minute=600)
    assert max(got.moment for got in stub.requests) - started >= 0.3


def test_a_turn_comes_after_the_one_before(monkeypatch):
    clock = iter([5.0, 5.5, 5.5, 20.0])
    monkeypatch.setattr(endpoints, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    pace = Pace(60)
    assert [pace.turn() for _ in range(4)] == [0, 0.5, 1.5, 0]


def test_the_key_goes_into_the_header_and_nowhere_else(monkeypatch, caplog, capsys):
    def respond(got: Got) -> Sent:
        bad = Sent(400, {"error": {"message": f"key {KEY} is odd"}})
        cut = Sent(400, {"error": {"message": "x" * 190 + KEY}})
        spelt = completion("SPELT")._replace(
            body=json.dumps(completion("SPELT").body).replace("SPELT", r"\u0073" + KEY[1:]).encode()
        )
        answers = {"a": completion(f"you said {KEY}"), "b": bad, "c": Sent(200, f"junk {KEY}".encode())}
        return {**answers, "d": cut, "e": spelt}[got.question]

    monkeypatch.setenv(key_variable("big"), KEY + "\n")
    caplog.set_level("DEBUG")
    with serving(respond) as stub:
        replies = ask_all(stub, asks(*"abcde"))
    assert {got.key for got in stub.requests} == {f"Bearer {KEY}"}
    assert replies[0].text == "you said ***" and "key *** is odd" in replies[1].error
    assert replies[4].text == "***"
    assert KEY[:8] not in f"{replies} {caplog.text} {capsys.readouterr()}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_does_not_carry_the_key_away(monkeypatch, status):
    monkeypatch.setenv(key_variable("big"), KEY)
    with serving(lambda got: completion("stolen")) as thief:
        with serving(lambda got: Sent(status, {}, (("Location", f"{thief.url}?{KEY}"),))) as stub:
            replies = ask_all(stub, asks("a", "b"), concurrency=1)
    assert f"answered {status} ({thief.url}?***); it points elsewhere, where no key is sent" in replies[0].error
    assert thief.requests == [] and len(stub.requests) == 1


def test_a_broken_key_is_told_without_showing_it(monkeypatch):
    monkeypatch.setenv("COTERIE_KEY_MY_BIG_1", f"{KEY}\nX-Evil: 1")
    with pytest.raises(CoterieError, match="the key in COTERIE_KEY_MY_BIG_1 holds spaces") as error:
        EndpointAnswerer(Endpoint("my-big.1", "http://h/v1", "m"), ExpertServingSettings())
    assert KEY not in str(error.value)


def test_closing_ends_a_pause_and_asks_nothing_more():
    with serving(lambda got: Sent(429, {}, (("Retry-After", "30"),))) as stub:
        one_at_a_time = ExpertServingSettings(concurrency=1)
        answerer = EndpointAnswerer(Endpoint("big", stub.url, "m"), one_at_a_time, first_pause=30.0)
        started = time.monotonic()
        stub.respond = lambda got: (answerer.close(), Sent(429, {}, (("Retry-After", "30"),)))[1]
        answerer.answer(asks("a", "b"), lambda number, reply: None)
    assert time.monotonic() - started < 25 and len(stub.requests) == 1


def test_what_the_caller_raises_comes_back_to_it():
    def done(number: int, reply: Reply) -> None:
        raise OSError("disk full")

    with serving(lambda got: completion("x")) as stub:
        answerer = EndpointAnswerer(Endpoint("big", stub.url, "m"), ExpertServingSettings())
        with pytest.raises(OSError, match="disk full"):
            answerer.answer(asks("a", "b"), done)


# ------------------------------------------------------------------------------------- as the server wants to be asked

NO_MAX_TOKENS = {
    "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
    "instead.",
    "type": "invalid_request_error",
    "param": "max_tokens",
    "code": "unsupported_parameter",
}
NO_TEMPERATURE = {
    "message": "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is "
    "supported.",
    "type": "invalid_request_error",
    "param": "temperature",
    "code": "unsupported_value",
}


def test_a_server_is_asked_as_it_wants_and_told_once(caplog):
    def reasoning_model(got: Got) -> Sent:
        if "max_tokens" in got.body:
            return Sent(400, {"error": NO_MAX_TOKENS})
        return Sent(400, {"error": NO_TEMPERATURE}) if "temperature" in got.body else completion("ok")

    with serving(reasoning_model) as stub:
        replies = ask_all(stub, asks("a", "b", "c", max_new_tokens=9), concurrency=1, retries=0)
    assert [reply.text for reply in replies] == ["ok"] * 3 and len(stub.requests) == 2 + 3
    assert set(stub.requests[-1].body) == {"model", "messages", "max_completion_tokens"}
    assert stub.requests[-1].body["max_completion_tokens"] == 9
    assert caplog.text.count("big takes no temperature") == 1


def test_a_server_that_names_the_one_temperature_it_takes_is_asked_without():
    words = {
        "message": "invalid temperature: only 1 is allowed for this model",
        "type": "invalid_request_error",
    }  # Kimi
    with serving(lambda got: Sent(400, {"error": words}) if "temperature" in got.body else completion("ok")) as stub:
        replies = ask_all(stub, asks("a", "b"), concurrency=1, retries=0)
    assert [reply.text for reply in replies] == ["ok"] * 2 and len(stub.requests) == 1 + 2


def test_questions_under_way_are_asked_again_as_the_server_wants():
    def respond(got: Got) -> Sent:
        return Sent(400, {"error": NO_MAX_TOKENS}, delay=0.1) if "max_tokens" in got.body else completion("ok")

    with serving(respond) as stub:
        replies = ask_all(stub, asks(*"abcdefgh"), concurrency=4, retries=0)
    assert [reply.text for reply in replies] == ["ok"] * 8 and len(stub.requests) == 4 + 8


def test_a_server_that_is_never_content_is_asked_no_further():
    with serving(lambda got: Sent(400, {"error": NO_MAX_TOKENS})) as stub:
        replies = ask_all(stub, asks(*"abcdefgh"), concurrency=1)
    assert len(stub.requests) == 2 and all("max_completion_tokens" in reply.error for reply in replies)


QUOTA = {"message": "You exceeded your current quota.", "type": "insufficient_quota", "code": "insufficient_quota"}
DETAIL = {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_k"], "msg": "Extra inputs are not permitted"}]}
FATAL = table(
    ("quota", 429, {"error": QUOTA}, "answered 429 (You exceeded your current quota.); check what the account may"),
    ("payment", 402, {"error": {"message": "Insufficient Balance"}}, "(Insufficient Balance); check what the account"),
    ("quota inside", 200, {"error": QUOTA}, "error (You exceeded your current quota.); check what the account may"),
    ("key", 401, {"error": {"message": "Wrong key"}}, "answered 401 (Wrong key); check the key in COTERIE_KEY_BIG"),
    ("key at 400", 400, [{"error": {"message": "API key not valid."}}], "(API key not valid.); check the key in"),
    ("model", 404, {"error": {"message": "no such model"}}, "(no such model); check the model's name and the address"),
    ("model at 400", 400, {"error": {"message": "no such model", "param": "model"}}, "answered 400 (no such model)"),
    ("value", 400, {"error": {"message": "must be above 0", "param": "temperature"}}, "answered 400 (must be above 0)"),
    ("parameter", 422, DETAIL, "answered 422 (body.top_k: Extra inputs are not permitted)"),
    (
        "Anthropic's account",
        400,
        {"error": {"message": "Your credit balance is too low."}},
        "check what the account may",
    ),
    ("method", 405, b"", "answered 405 (Method Not Allowed); check the model's name and the address"),
    (
        "quota under no name",
        200,
        {"code": "insufficient_quota", "message": "Empty."},
        "(Empty.); check what the account",
    ),
    ("plain words", 400, b"unknown field: top_k", "answered 400 (unknown field: top_k)"),
)


@pytest.mark.parametrize(("status", "body", "wanted"), FATAL)
def test_what_no_question_can_pass_is_told_in_the_servers_words_and_asked_once(status, body, wanted):
    with serving(lambda got: Sent(status, body)) as stub:
        replies = ask_all(stub, asks(*"abcd"), concurrency=1)
    assert len(stub.requests) == 1 and wanted in replies[0].error
    assert all(reply.error.startswith("not asked any more after: ") and wanted in reply.error for reply in replies[1:])


SINGLE = table(
    ("too long", 400, {"message": "maximum context length is 64 tokens", "code": "context_length_exceeded"}),
    (
        "too long for both",
        400,
        {"message": "max_tokens is too large: your prompt has 40 tokens", "param": "max_tokens"},
    ),
    ("moderation", 403, {"message": "your input was flagged", "metadata": {"reasons": ["violence"]}}),
    ("content policy", 400, {"message": "no", "code": "content_policy_violation"}),
    ("unknown", 418, {"message": "teapot"}),
    ("unknown inside", 200, {"message": "odd", "code": 400}),
)


@pytest.mark.parametrize(("status", "error"), SINGLE)
def test_what_one_question_cannot_pass_costs_that_question_one_try(status, error):
    with serving(lambda got: Sent(status, {"error": error}) if got.question == "b" else completion("ok")) as stub:
        replies = ask_all(stub, asks("a", "b", "c"), concurrency=1)
    assert [reply.error is None for reply in replies] == [True, False, True] and len(stub.requests) == 3
    assert error["message"] in replies[1].error


INSIDE = table(
    ("rate limit", {"error": {"code": 429, "message": "Rate limited"}}),
    ("code as text", {"error": {"code": "503", "message": "no provider"}}),
    ("upstream", {"error": {"code": 502, "message": "bad gateway", "metadata": {"raw": "x"}}, "user_id": "u"}),
    ("by its type", {"error": {"type": "overloaded_error", "message": "Overloaded"}}),
    ("in the choice", {"choices": [{"error": {"code": 502, "message": "x"}, "message": {"content": ""}}]}),
    ("by its reason", {"choices": [{"finish_reason": "error", "message": {"content": "half"}}]}),
    ("a bare text", {"error": "Server overloaded, please retry"}),
    ("vLLM", {"object": "error", "message": "slow down", "code": 429}),
    ("Gemini", [{"error": {"code": 429, "message": "slow down", "status": "RESOURCE_EXHAUSTED"}}]),
    ("a gateway", {"detail": "Too many requests"}),
    ("its status", {"status": 503, "message": "no replica", "choices": None}),
)


@pytest.mark.parametrize("body", INSIDE)
def test_a_busy_server_that_says_200_is_asked_again(body):
    with serving(lambda got: completion("ok") if len(stub.requests) == 3 else Sent(200, body)) as stub:
        (reply,) = ask_all(stub, asks("hi"))
    assert (reply.text, reply.error) == ("ok", None)


def test_the_words_of_an_error_inside_are_told():
    with serving(lambda got: Sent(200, {"error": {"code": 429, "message": "Rate limited"}})) as stub:
        (reply,) = ask_all(stub, asks("hi"), retries=1)
    assert reply.error == "the server answered with an error 429 (Rate limited)" and len(stub.requests) == 2


def message(content: object, **more: object) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": content, **more}, "finish_reason": "length"}]}


@pytest.mark.parametrize(
    ("content", "text"),
    table(
        ("text", "four", "four"),
        ("null", None, ""),
        ("empty", "", ""),
        ("parts", [{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}], "four"),
        ("texts", ["fo", "ur"], "four"),
        ("thinking apart", [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, "four"], "four"),
        ("thinking alone", [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}], ""),
        ("no parts", [], ""),
        ("half a character", "a\ud800b", "a?b"),
    ),
)
def test_an_answer_may_be_a_text_parts_or_nothing(content, text):
    with serving(lambda got: Sent(200, message(content, reasoning_content="long"))) as stub:
        (reply,) = ask_all(stub, asks("hi"))
    assert (reply.text, reply.error, reply.finish_reason) == (text, None, "length")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("stop", "stop"),
        ("STOP", "stop"),
        ("eos", "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("content_filter", "content_filter"),
        ("tool_calls", "other"),
        (None, "other"),
        (3, "other"),
    ],
)
def test_why_an_answer_ends_is_kept_as_the_server_says_it(given, kept):
    with serving(lambda got: completion("x", given)) as stub:
        assert ask_all(stub, asks("hi"))[0].finish_reason == kept


def test_a_pause_may_be_seconds_or_a_date_and_is_never_negative():
    def later(seconds: float) -> str:
        return email.utils.formatdate(time.time() + seconds, usegmt=True)

    assert [seconds_to_wait(text) for text in ("2", "0.5", "-3", None, "", "soon", "nan")] == [2, 0.5, 0, 0, 0, 0, 0]
    assert 28 < seconds_to_wait(later(30)) <= 30 and seconds_to_wait(later(-30)) == 0
    assert seconds_to_wait("Fri, 31 Dec 9999 23:59:59 GMT") > 1e9


@pytest.mark.parametrize("header", ["1e99", "inf", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_no_server_makes_us_wait_longer_than_the_longest_pause(monkeypatch, header):
    monkeypatch.setattr(endpoints, "LONGEST_PAUSE", 0.1)
    started = time.monotonic()
    with serving(lambda got: Sent(429, {}, (("Retry-After", header),))) as stub:
        ask_all(stub, asks("hi"), retries=1)
    assert len(stub.requests) == 2 and 0.1 <= time.monotonic() - started < 60
