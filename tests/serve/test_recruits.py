"""Recruited experts behind the API: they answer as on the command line, and local aggregators stream."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

import tiny
from conftest import write_rows
from coterie.grading.grade import after_thinking
from coterie.serve.recruiting import Seen
from served import chat, chat_body, chat_stream, started
from stub_server import Sent
from symbolic_place import question


@pytest.fixture
def server(fitted):
    with started(f"sym={fitted.folder / 'run'}") as running:
        yield running


@pytest.fixture
def asked():
    return {"model": "sym", "messages": [{"role": "user", "content": question("algebra", 41)}], "max_tokens": 32}


def content(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def test_endpoints_that_are_recruited_answer_as_on_the_command_line(client, fitted, run, asked):
    words = ["generate", fitted.folder / "run", question("algebra", 41), "--json", "--retries", 0]
    wanted = json.loads(run(*words)[1])
    answer = chat(client, **asked, temperature=0, seed=0, coterie={"detail": True})
    assert content(answer) == wanted["text"] == "The answer is 141."
    shares = answer["choices"][0]["coterie"]["weights"]
    total = sum(wanted["recruits"].values())
    assert shares == {name: count / total for name, count in wanted["recruits"].items() if count}
    assert answer["usage"]["completion_tokens"] == wanted["cost"]["tokens"]
    assert answer["usage"]["prompt_tokens"] == wanted["cost"]["prompt_tokens"]
    frames = chat_stream(client, **asked, temperature=0, seed=0)
    assert "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames) == wanted["text"]


def test_recruited_experts_answer_as_a_response(client, asked):
    body = {"model": "sym", "input": question("algebra", 41), "temperature": 0}
    wanted = chat(client, **asked, temperature=0)
    answer = client.post("/v1/responses", json=body).json()
    assert answer["output"][0]["content"][0]["text"] == content(wanted) and answer["status"] == "completed"
    assert answer["usage"]["output_tokens"] == wanted["usage"]["completion_tokens"]


def test_a_run_is_listed_with_its_methods_and_experts_and_each_answers(client, asked):
    ids = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert ids[0] == "sym" and {"sym:majority", "sym:maths", "sym:judge"} <= set(ids)
    assert client.get("/v1/models/sym:maths").json()["coterie"]["kind"] == "expert"
    assert "141" in content(chat(client, **{**asked, "model": "sym:maths"}))
    assert "3" in content(chat(client, **{**asked, "model": "sym:judge"}))


def test_a_mixture_that_takes_the_name_of_a_run_answers_in_its_place_and_back(server, fitted, run_folder):
    made, kinds = server.catalogue, []
    for source in (run_folder, fitted.folder / "run"):
        server.worker.put(lambda source=source: made.load("sym", str(source))).result()
        kinds.append(type(made.find("sym")).__name__)
        assert bool(made.desks) != bool(made.recruits)
    assert kinds == ["Cell", "RecruitCell"]


REFUSED = [{"n": 2}, {"logprobs": True}, {"lora": []}, {"coterie": {"top_k": 1}}]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_what_finished_answers_cannot_give_is_refused_by_name(client, asked, fields):
    refused = client.post("/v1/chat/completions", json=chat_body(**asked, **fields))
    assert refused.status_code == 400 and refused.json()["error"]["param"] == next(iter(fields))
    text = client.post("/v1/completions", json={"model": "sym", "prompt": "x"})
    assert text.status_code == 400 and "ask it by a chat" in text.json()["error"]["message"]


def test_experts_that_all_fail_are_told_as_such(client, fitted, asked):
    fitted.stub.respond = lambda got: Sent(400, {"error": {"message": "broken"}})
    failed = client.post("/v1/chat/completions", json=chat_body(**asked))
    assert failed.status_code == 502 and failed.json()["error"]["code"] == "no_answer"


def test_a_server_of_recruited_experts_alone_knows_no_tokens_and_says_so(client):
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert client.post(path, json=body).json()["error"]["code"] == "model_not_found"
    assert client.get("/tokenizer_info").status_code == 404 and client.get("/lora-adapters").json() == []


def at_once(client, bodies):
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: content(chat(client, **body)), bodies))


def test_endpoints_are_asked_for_several_requests_at_once(client, fitted, asked):
    meeting, respond = threading.Barrier(3, timeout=50), fitted.stub.respond

    def together(got):
        if "Keywords:" not in got.question:
            meeting.wait()
        return respond(got)

    fitted.stub.respond = together  # nobody's answer comes before all three are asked for
    assert at_once(client, [{**asked, "model": "sym:maths"}] * 3) == ["The answer is 141."] * 3


def test_an_endpoint_that_failed_is_asked_again_for_the_next_request(client, fitted, asked):
    respond, body = fitted.stub.respond, chat_body(**{**asked, "model": "sym:maths"})
    fitted.stub.respond = lambda got: Sent(401, {"error": {"message": "no such key"}})
    assert client.post("/v1/chat/completions", json=body).status_code == 502
    fitted.stub.respond = respond
    assert (
        client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        == "The answer is 141."
    )


def test_what_recruited_experts_write_is_in_the_metrics(client, asked):
    usages = [chat(client, **asked, temperature=0)["usage"] for _ in range(2)]
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if 'model_name="sym"' in line)
    told = {name.partition("{")[0]: 0.0 for name in lines}
    for name, value in lines.items():
        told[name.partition("{")[0]] += float(value)
    written = sum(usage["completion_tokens"] for usage in usages)
    assert told["coterie_generation_tokens_total"] == told["coterie_expert_weight_total"] == written > 0
    assert told["coterie_prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert lines['coterie_request_success_total{finished_reason="stop",model_name="sym"}'] == "2.0"
    assert told["coterie_time_to_first_token_seconds_count"] == told["coterie_e2e_request_latency_seconds_count"] == 2
    assert told["coterie_num_requests_running"] == told["coterie_num_requests_waiting"] == 0


@pytest.mark.parametrize("text", ["<think>a</think> b c ", " b <c", "<think>never closed", "a <think>b"])
def test_what_is_seen_of_a_growing_answer_is_in_the_end_what_is_seen_of_it_whole(text):
    seen = Seen()
    pieces = [seen.push(sign, is_last=place == len(text) - 1) for place, sign in enumerate(text)]
    assert "".join(pieces) == seen.text == after_thinking(text)


@pytest.fixture
def local(model_folder, run, tmp_path):
    """A run whose experts are the tiny model twice; one of them makes the answer."""
    pool, data = tmp_path / "pool", write_rows(tmp_path / "val.jsonl", tiny.make_rows(6))
    experts = [word for name in ("one", "two") for word in ("--expert", f"{name}={model_folder}")]
    assert run("experts", "init", pool, *experts)[0] == 0
    how = ["--device", "cpu", "--max-new-tokens", 8]
    assert run("profile", pool, "--data", data, "--skills", "source", "--encoder", "none", *how)[0] == 0
    code, _, err = run(
        "fit", "symbolic-moe", "--experts", pool, "--output", tmp_path / "run", "--aggregator", "two", *how
    )
    assert code == 0, err
    return tmp_path / "run"


def test_a_local_aggregator_streams_what_the_command_line_says(local, run):
    words = ["generate", local, "add 3 4", "--json", "--device", "cpu", "--max-new-tokens", 12, "--seed", 3]
    wanted = json.loads(run(*words)[1])
    assert wanted["aggregator"] == "two"
    with started(f"sym={local}") as server, httpx2.Client(base_url=server.url, timeout=60) as client:
        asked = {"model": "sym", "max_tokens": 12, "temperature": 0, "seed": 3}
        assert content(chat(client, **asked)) == wanted["text"]
        frames = chat_stream(client, **asked)
        texts = [text for frame in frames if (text := frame["choices"][0]["delta"].get("content"))]
        assert "".join(texts) == wanted["text"] and len(texts) > 2
        assert frames[-1]["choices"][0]["finish_reason"] == "length"


def test_local_experts_of_several_requests_write_in_one_batch_what_each_writes_alone(local):
    bodies = [
        {"model": "sym", "messages": [{"role": "user", "content": f"add {number} 4"}], "max_tokens": 10, "seed": number}
        for number in range(4)
    ]
    with started(f"sym={local}") as server, httpx2.Client(base_url=server.url, timeout=60) as client:
        alone = [content(chat(client, **body, temperature=0.5)) for body in bodies]
        (desk,) = {cell.desk for cell in server.catalogue.recruits}
        engine, sizes, company = desk.scheduler.loaded("one").engine, [], threading.Event()
        step = engine.step

        def together():
            if sum(engine.load[:2]) > 3:  # more than the three answers of one request: until then nobody writes
                company.set()
            sizes.append(engine.load.running)
            return step() if company.is_set() else []

        engine.step = together
        assert at_once(client, [{**body, "temperature": 0.5} for body in bodies]) == alone
        assert max(sizes) > 3
        lines = client.get("/metrics").text.splitlines()
    assert sum('expert_weight_total{expert="two"' in line for line in lines) == 1
