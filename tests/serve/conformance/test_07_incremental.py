"""A2 line 7: frames leave while the answer is being written, not all at its end (theroyallab/tabbyAPI#52)."""

import threading

from served import chat_body


def test_frames_arrive_before_the_answer_has_ended(server, client, mixture, monkeypatch):
    letter = mixture.tokenizer("a")["input_ids"][0]  # a character of its own, so that every token is a frame
    body = chat_body(stream=True, max_tokens=20, logit_bias={str(letter): 100})
    engine, may_write = server.catalogue.desks[0].engine, threading.Semaphore(4)
    step = engine.step

    def waiting():
        if tokens := step():  # a prompt may take several steps before the first
            may_write.acquire()
        return tokens

    monkeypatch.setattr(engine, "step", waiting)
    seen = []
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            seen += [line] if line else []
            if len(seen) == 3:  # who speaks, and two pieces: the engine stands still, 16 tokens before the end
                assert engine.load.running == 1
                may_write.release(100)
    assert seen[-1] == "data: [DONE]" and len(seen) > 10
