"""Adapters and mixtures are loaded, replaced and removed while others are answered (vLLM's LoRA endpoints)."""

import json
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from served import started

ADMIN, USER = "admin-0000000000001", "user-00000000000002"
LONG = "add 3 4 and then go on and on"


def as_key(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def allowed(run_folder, tmp_path_factory):
    """A folder to load from, with good adapters in it and all kinds of bad ones, and something outside of it."""
    place = tmp_path_factory.mktemp("place")
    folder, outside = place / "allowed", place / "outside"
    shutil.copytree(run_folder / "experts", folder)
    shutil.copytree(run_folder, folder / "mixture")
    shutil.copytree(folder / "cluster-0", outside)
    (folder / "link").symlink_to(outside)
    (folder / "empty").mkdir()
    config = json.loads((folder / "cluster-0" / "adapter_config.json").read_text())
    for name, fields in {
        "dora": {"use_dora": True},
        "rank": {"r": 5},
        "saved": {"modules_to_save": ["lm_head"]},
    }.items():
        shutil.copytree(folder / "cluster-0", folder / name)
        (folder / name / "adapter_config.json").write_text(json.dumps(config | fields))
    shutil.copytree(folder / "cluster-0", folder / "torn")
    (folder / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    return folder


@pytest.fixture(scope="module")
def live(run_folder, allowed, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"{ADMIN} name=deploy role=admin\n{USER} name=alice\n")
    with started(f"elrea={run_folder}", api_key_file=str(keys), allow_folder=[str(allowed)]) as server:
        yield server


@pytest.fixture
def admin(live):
    with httpx2.Client(base_url=live.url, headers=as_key(ADMIN), timeout=120) as client:
        yield client
        for model in client.get("/v1/models").json()["data"]:
            if model["id"].startswith("new"):
                client.post("/v1/unload_lora_adapter", json={"lora_name": model["id"]})


def load(client, name, path, **fields):
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})


def body(model, **fields):
    endless = {"logit_bias": {"257": -100}}  # the token that ends an answer
    return {"model": model, "prompt": LONG, "max_tokens": 24, "temperature": 0, **endless, **fields}


def answer(client, model):
    response = client.post("/v1/completions", json=body(model))
    return response.json()["choices"][0]["text"] if response.status_code == 200 else response.json()["error"]["code"]


def models(client):
    return {model["id"]: model for model in client.get("/v1/models").json()["data"]}


def test_an_adapter_is_loaded_listed_asked_and_removed(admin, allowed):
    response = load(admin, "new", allowed / "cluster-0")
    assert response.status_code == 200 and "success" in response.text
    listed = list(models(admin).values())
    base, new = listed[0], models(admin)["new"]
    assert base["parent"] is None and (new["root"], new["parent"]) == (str(allowed / "cluster-0"), base["id"])
    assert new["coterie"]["kind"] == "expert"
    alone = answer(admin, "elrea:cluster-0")
    assert answer(admin, "new") == answer(admin, f"{base['id']}:new") == alone != answer(admin, "elrea:cluster-1")
    assert "success" in admin.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).text
    assert answer(admin, "new") == "model_not_found" and "new" not in models(admin)


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(admin, allowed):
    load(admin, "new", allowed / "cluster-0")
    before = models(admin)
    for name, path, status, words in (
        ("other", allowed / "none", 404, "there is no such folder"),
        ("new", allowed / "cluster-1", 400, "already been loaded"),
        ("elrea", allowed / "cluster-1", 400, "already been loaded"),
        ("cluster-0", allowed / "cluster-1", 400, "another model that is served"),
        ("a/b", allowed / "cluster-1", 400, "cannot be a model's id"),
        ("other", allowed / "empty", 400, "adapter_config.json does not exist"),
        ("other", allowed / "torn", 400, "adapter_model.safetensors"),
        ("other", allowed / "dora", 400, "use_dora = True is not supported"),
        ("other", allowed / "rank", 400, "adapter_config.json"),
        ("other", allowed / "saved", 400, "modules_to_save"),
    ):
        response = load(admin, name, path)
        assert response.status_code == status and words in response.json()["error"]["message"], response.text
    assert models(admin) == before
    gone = admin.post("/v1/unload_lora_adapter", json={"lora_name": "elrea"})
    assert gone.status_code == 404 and admin.post("/v1/unload_mixture", json={"name": "new"}).status_code == 404


OUTSIDE = "{outside} {allowed}/../outside {allowed}/link ../outside link /etc /".split()


@pytest.mark.parametrize("path", [*OUTSIDE, "~", "", ".\0", "x" * 5000])
def test_nothing_is_loaded_from_anywhere_else(admin, allowed, path):
    given = path.format(allowed=allowed, outside=allowed.parent / "outside")
    for route, fields in (
        ("load_lora_adapter", {"lora_name": "other", "lora_path": given}),
        ("load_mixture", {"name": "other", "path": given}),
    ):
        response = admin.post(f"/v1/{route}", json=fields)
        assert response.status_code in ((403,) if path in OUTSIDE else (400, 403, 404))
        assert str(allowed.parent) not in response.text


def test_only_an_admin_loads(live, allowed):
    for headers, status in ((as_key(USER), 403), (as_key("someone-0000000000"), 401), ({}, 401)):
        with httpx2.Client(base_url=live.url, headers=headers) as client:
            assert load(client, "other", allowed / "cluster-0").status_code == status
            for route in ("unload_lora_adapter", "load_mixture", "unload_mixture"):
                assert client.post(f"/v1/{route}", json={}).status_code == status


def test_new_weights_are_those_of_requests_that_come_after(admin, live, allowed):
    """SkyRL PR #1606: `load_inplace` reloaded at every step."""
    load(admin, "new", allowed / "cluster-0")
    old, wanted = answer(admin, "new"), answer(admin, "elrea:cluster-1")
    held = threading.Event()
    with admin.stream("POST", "/v1/completions", json=body("new", stream=True)) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        text = json.loads(next(lines))["choices"][0]["text"]
        live.worker.put(held.wait)
        with ThreadPoolExecutor() as pool, httpx2.Client(base_url=live.url, headers=as_key(ADMIN)) as other:
            loading = pool.submit(load, other, "new", allowed / "cluster-1", load_inplace=True)
            held.set()
            assert loading.result().status_code == 200
        text += "".join(json.loads(line)["choices"][0]["text"] for line in lines if line != "[DONE]")
    assert text == old != wanted == answer(admin, "new")


def test_bad_loads_beside_live_traffic_break_nothing(admin, live, allowed):
    wanted, bad = answer(admin, "elrea"), ("torn", "dora", "empty", "none", "rank")
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(answer, admin, "elrea") for _ in range(10)]
        loads = [pool.submit(load, admin, "other", allowed / bad[place % 5]) for place in range(25)]
        answers += [pool.submit(answer, admin, "elrea") for _ in range(10)]
    assert {one.result() for one in answers} == {wanted}
    assert {one.result().status_code for one in loads} == {400, 404}
    assert live.worker.is_alive


def test_ten_loads_at_once_all_work(admin, allowed):
    wanted = [answer(admin, f"elrea:cluster-{place % 3}") for place in range(10)]
    with ThreadPoolExecutor(10) as pool:
        loads = [pool.submit(load, admin, f"new-{n}", allowed / f"cluster-{n % 3}") for n in range(10)]
    assert {one.result().status_code for one in loads} == {200}
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda n: answer(admin, f"new-{n}"), range(10)))
    assert found == wanted


def test_a_mixture_is_loaded_replaced_and_removed(admin, live, allowed):
    assert "success" in admin.post("/v1/load_mixture", json={"name": "second", "path": "mixture"}).text
    assert answer(admin, "second") == answer(admin, "elrea")
    again = admin.post("/v1/load_mixture", json={"name": "second", "path": "mixture"})
    assert again.status_code == 400 and "already been loaded" in again.json()["error"]["message"]
    desks = {desk.name: desk for desk in live.catalogue.desks}
    assert desks["second"].grid.own.backbone is desks["elrea"].grid.own.backbone
    old = weakref.ref(desks["second"].grid.own.bank)
    desks.clear()
    fields = {"name": "second", "path": "mixture", "load_inplace": True}
    assert admin.post("/v1/load_mixture", json=fields).status_code == 200
    assert old() is None  # its weights are gone once nobody is answered with them
    assert admin.post("/v1/unload_mixture", json={"name": "second"}).status_code == 200
    assert answer(admin, "second") == "model_not_found" and 'model_name="second"' not in admin.get("/metrics").text


def test_without_folders_nothing_is_loaded(run_folder, allowed, tmp_path):
    (tmp_path / "keys").write_text(f"{ADMIN} role=admin\n")
    with started(f"elrea={run_folder}", api_key_file=str(tmp_path / "keys")) as server:
        with httpx2.Client(base_url=server.url, headers=as_key(ADMIN)) as client:
            response = load(client, "other", allowed / "cluster-0")
    assert (response.status_code, response.json()["error"]["code"]) == (403, "loading_is_off")
