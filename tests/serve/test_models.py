"""What is served, what prompts are to it, and their routing without an answer."""

import base64
import dataclasses
import json
import struct

import pytest

from coterie.errors import CoterieError
from coterie.mixture import Mixture
from served import QUESTION, chat_body


def told(answer, status=400):
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_models_are_listed_base_first_each_with_its_parent(client, mixture: Mixture):
    data = client.get("/v1/models").json()["data"]
    base, own = data[0], {entry["id"]: entry for entry in data}
    assert base["parent"] is None and base["coterie"]["kind"] == "base"
    assert all(entry["parent"] == base["id"] for entry in data[1:])
    assert own["elrea"]["coterie"] | {"kind": "mixture", "router": "gradient-centroids"} == own["elrea"]["coterie"]
    assert "layers" in own["elrea"]["coterie"]["combiners"] and not own["elrea"]["coterie"]["reroutes"]
    experts = [entry["id"] for entry in data if entry["coterie"]["kind"] == "expert"]
    assert experts == list(mixture.bank.names)
    methods = {entry["coterie"]["method"]: entry["id"] for entry in data if entry["coterie"]["kind"] == "method"}
    assert methods["uniform-weights"] == "elrea:uniform-weights"
    for entry in data:
        assert client.get(f"/v1/models/{entry['id']}").json() == entry


def test_models_are_listed_beside_one_that_cannot_be_made(server, client, monkeypatch, caplog):
    ids = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    cell = server.catalogue.find("elrea:uniform-weights")

    def broken():
        raise CoterieError("its weights are gone")

    broken_cell = dataclasses.replace(cell, make=broken)
    cells = {name: broken_cell if own is cell else own for name, own in server.catalogue._cells.items()}
    monkeypatch.setattr(server.catalogue, "_cells", cells)
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == [one for one in ids if one != cell.id]
    assert told(client.get(f"/v1/models/{cell.id}"))["message"] == "its weights are gone"
    assert f"{cell.id} is not listed: its weights are gone" in caplog.text


@pytest.mark.parametrize(
    "name",
    ["nothing", "../elrea", "..%2f..%2fetc%2fpasswd", "elrea/../../etc", "elrea:", ":", "elrea:../x", "%00", "é" * 500],
)
def test_a_name_that_is_no_model_is_only_a_name(client, name):
    assert told(client.get(f"/v1/models/{name}"), 404)["code"] in ("model_not_found", None)
    for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/route", "/tokenize"):
        error = told(client.post(path, json=chat_body(model=name, input="a")), 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"


def test_a_prompt_is_routed_without_an_answer_as_python_routes_it(client, mixture: Mixture):
    wanted = mixture.route([QUESTION, "SPELL THIS"]).normalized()
    answer = client.post("/v1/route", json={"model": "elrea", "prompt": [QUESTION, "SPELL THIS"]}).json()
    for number, entry in enumerate(answer["data"]):
        shares = {name: share for name, share in entry["weights"].items() if share}
        assert shares == pytest.approx({name: share for name, share in wanted.row(number).items() if share})
    messages = {"model": "elrea", "messages": [{"role": "user", "content": QUESTION}]}
    alone = client.post("/v1/route", json=messages).json()["data"][0]["weights"]
    assert alone == pytest.approx(answer["data"][0]["weights"], abs=1e-5)


def test_many_prompts_are_routed_as_each_alone(client):
    prompts = [f"add {number} 3" for number in range(19)]
    many = client.post("/v1/route", json={"model": "elrea", "prompt": prompts}).json()["data"]
    assert [entry["index"] for entry in many] == list(range(19))
    alone = client.post("/v1/route", json={"model": "elrea", "prompt": prompts[18]}).json()["data"][0]
    assert many[18]["weights"] == pytest.approx(alone["weights"], abs=1e-5)


def test_the_routing_of_a_prompt_can_be_asked_for_otherwise(client, mixture: Mixture):
    body = {"model": "elrea", "prompt": QUESTION}
    uniform = client.post("/v1/route", json={**body, "coterie": {"router": "uniform"}}).json()["data"][0]["weights"]
    assert len({round(share, 6) for share in uniform.values() if share}) == 1
    one = client.post("/v1/route", json={**body, "coterie": {"top_k": 1}}).json()["data"][0]["weights"]
    assert sorted(one.values())[-1] == 1.0 and sum(one.values()) == 1.0
    assert "no router" in told(client.post("/v1/route", json={**body, "coterie": {"router": "x"}}))["message"]


def test_embeddings_are_what_the_router_reads(client, mixture: Mixture):
    wanted = mixture.router.features(mixture.tokens([QUESTION, "SPELL"]))
    body = {"model": "elrea", "input": [QUESTION, "SPELL"]}
    answer = client.post("/v1/embeddings", json=body).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    for vector, entry in zip(wanted, answer["data"], strict=True):
        assert entry["embedding"] == pytest.approx(vector.tolist(), abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(len(row.ids) for row in mixture.tokens([QUESTION, "SPELL"]))
    raw = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"][1]["embedding"]
    assert struct.unpack(f"<{wanted.shape[1]}f", base64.b64decode(raw)) == tuple(answer["data"][1]["embedding"])
    assert told(client.post("/v1/embeddings", json={**body, "dimensions": 3}))["param"] == "dimensions"


def test_a_model_whose_router_reads_nothing_has_no_embeddings(client):
    expert = next(
        entry["id"] for entry in client.get("/v1/models").json()["data"] if entry["coterie"]["kind"] == "expert"
    )
    assert "no features" in told(client.post("/v1/embeddings", json={"model": expert, "input": "a"}))["message"]


def test_text_becomes_tokens_and_text_again(client, mixture: Mixture):
    answer = client.post("/tokenize", json={"prompt": "é <e>", "return_token_strs": True}).json()
    assert answer["tokens"] == mixture.tokenizer("é <e>")["input_ids"] and answer["count"] == len(answer["tokens"])
    assert len(answer["token_strs"]) == answer["count"] and answer["max_model_len"] == mixture.backbone.context == 512
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "é <e>"}
    asked = {"messages": [{"role": "user", "content": QUESTION}], "model": "elrea"}
    assert client.post("/tokenize", json=asked).json()["tokens"] == list(mixture.tokens(QUESTION)[0].ids)
    assert client.get("/tokenizer_info").json()["eos_token"] == mixture.tokenizer.eos_token


def test_the_commands_of_curl_need_no_header(server, client):
    raw = json.dumps(chat_body(max_tokens=2))
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/v1/chat/completions", content=raw, headers=form).status_code == 200
    assert client.post("/v1/chat/completions", content=raw).status_code == 200
    from_page = {"content-type": "text/plain", "origin": "https://elsewhere.example"}
    told(client.post("/v1/chat/completions", content=raw, headers=from_page))


def test_many_prompts_of_one_request_let_others_have_steps_between_them(server, client, monkeypatch):
    router, sizes = server.catalogue.resolve("elrea").mixture.router, []
    start = router.start
    monkeypatch.setattr(router, "start", lambda rows: [sizes.append(len(rows)), start(rows)][1])
    body = {"model": "elrea", "prompt": [f"add {number} 3" for number in range(19)], "temperature": 0, "max_tokens": 2}
    many = client.post("/v1/completions", json=body).json()["choices"]
    assert sizes == [8, 8, 3] and [choice["index"] for choice in many] == list(range(19))
    alone = client.post("/v1/completions", json={**body, "prompt": "add 18 3"}).json()["choices"][0]
    assert many[18]["text"] == alone["text"]


def test_experts_have_the_numbers_and_the_scales_that_llama_cpp_lists(client, mixture: Mixture):
    numbered = [(entry["id"], entry["path"]) for entry in client.get("/lora-adapters").json()]
    assert numbered == list(enumerate(mixture.bank.names))
    assert {entry["scale"] for entry in client.get("/lora-adapters").json()} == {None}  # the prompt decides
    uniform = client.get("/lora-adapters", params={"model": "elrea:uniform-weights"}).json()
    wanted = client.post("/v1/route", json={"model": "elrea:uniform-weights", "prompt": "x"}).json()["data"][0][
        "weights"
    ]
    share = 1 / sum(entry["scale"] for entry in uniform)
    assert {entry["path"]: entry["scale"] * share for entry in uniform} == pytest.approx(
        {name: weight for name, weight in wanted.items() if weight}
    )
    single = client.get("/lora-adapters", params={"model": "cluster-1"}).json()
    assert {entry["path"]: entry["scale"] for entry in single if entry["scale"]} == {"cluster-1": 1.0}
    assert told(client.get("/lora-adapters", params={"model": "none"}), 404)["code"] == "model_not_found"
