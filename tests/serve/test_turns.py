"""What a long request has done for it is done in parts, and others have their steps in between."""

from itertools import zip_longest

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coterie.engine.request import Token
from coterie.serve import worker as workers
from coterie.serve.answering import CHARACTERS, turns
from served import chat_body


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 40)), st.integers(1, 5), st.integers(1, 60))
def test_parts_are_all_there_in_order_within_their_limits_and_as_few_as_can_be(sizes, count, most):
    parts = turns(sizes, count, most)
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(len(sizes)))
    for part, behind in zip_longest(parts, parts[1:]):
        assert part.stop - part.start == 1 or (part.stop - part.start <= count and sum(sizes[part]) <= most)
        if behind:  # the next one would not have fitted
            assert part.stop - part.start == count or sum(sizes[part]) + sizes[part.stop] > most


def test_prompts_are_cut_into_tokens_in_parts(server, client, monkeypatch):
    put, sizes = server.worker.put, []
    monkeypatch.setattr(server.worker, "put", lambda job: [sizes.append(1), put(job)][1])
    body = {"model": "elrea", "prompt": ["x" * (CHARACTERS // 2 + 1)] * 4, "max_tokens": 1}
    assert client.post("/v1/completions", json=body).status_code == 400  # they are too long, once they are counted
    assert len(sizes) > 4


def test_a_text_that_is_much_too_long_is_refused_by_its_beginning(client, mixture, monkeypatch):
    long, read = "x" * 10 * CHARACTERS, []
    kind = type(mixture.tokenizer)
    cut = kind._encode_plus  # noqa: SLF001 - what all ways of cutting a text go through

    def noted(own, *given, **named):
        read.append(named["text"] if "text" in named else given[0])
        return cut(own, *given, **named)

    monkeypatch.setattr(kind, "_encode_plus", noted)
    for path, body in (
        ("/v1/completions", {"prompt": ["a", long]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/v1/route", {"prompt": long}),
        ("/v1/embeddings", {"input": long}),
        ("/tokenize", {"prompt": long}),
    ):
        answer = client.post(path, json={"model": "elrea", **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded"), path
    assert max(map(len, read)) == CHARACTERS


def test_jobs_that_take_long_let_those_who_write_have_a_step_between_any_two(server, client, monkeypatch):
    monkeypatch.setattr(workers, "MOMENT", 1e-9)
    engine, seen, begun = server.catalogue.resolve("elrea").desk.engine, [], []
    step = engine.step

    def noted():
        found = step()
        if not begun and any(isinstance(token, Token) for token in found):
            begun.append(True)
            for number in range(3):  # all there before the next step
                server.worker.put(lambda number=number: seen.append(number))
        elif begun:
            seen.append("step")
        return found

    monkeypatch.setattr(engine, "step", noted)
    assert client.post("/v1/chat/completions", json=chat_body(logit_bias={"257": -100})).status_code == 200
    assert [one for one in seen if one != "step"] == [0, 1, 2]
    assert not any(isinstance(one, int) and isinstance(two, int) for one, two in zip(seen, seen[1:], strict=False))
