"""Whatever was fitted is served as it is: its own router and combiner answer through HTTP as they do in Python."""

from pathlib import Path

import httpx2
import pytest

import coterie
import tiny
from conftest import write_rows
from coterie.mixture import Mixture
from served import QUESTION, chat, started

QUICK = {"device": "cpu", "epochs": 1, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def bank(run_folder: Path, model_folder: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bank") / "bank"
    experts = [str(run_folder / "experts" / name) for name in ("base", "cluster-0", "cluster-1")]
    coterie.bank_add(folder, experts, model=str(model_folder), device="cpu")
    return folder


def from_adapters(bank: Path, model: Path, folder: Path) -> Path:
    coterie.methods.from_adapters(str(bank), output=folder, device="cpu")
    return folder


def token_level(bank: Path, model: Path, folder: Path) -> Path:
    rows = tiny.make_rows(18)
    data = {
        source: str(write_rows(folder.parent / f"{source}.jsonl", [row for row in rows if row["source"] == source]))
        for source in ("sum", "spell")
    }
    coterie.methods.token_level(str(model), data, output=folder, encoder="hidden", **QUICK)
    return folder


def kshot(bank: Path, model: Path, folder: Path) -> Path:
    shots = write_rows(folder.parent / "shots.jsonl", tiny.make_rows(6))
    coterie.methods.kshot(str(bank), [str(shots)], output=folder, keep=2, max_new_tokens=4, **QUICK)
    return folder


@pytest.mark.parametrize("fit", [from_adapters, token_level, kshot], ids=lambda fit: fit.__name__)
def test_a_fitted_folder_answers_as_in_python_and_tells_its_weights(bank, model_folder, tmp_path, fit):
    folder = fit(bank, model_folder, tmp_path / "run")
    mixture = Mixture.from_pretrained(folder, device="cpu")
    wanted = mixture.generate(QUESTION, max_new_tokens=6)[0]
    with started(f"own={folder}") as server, httpx2.Client(base_url=server.url, timeout=60) as client:
        answer = chat(client, model="own", max_tokens=6, temperature=0, coterie={"detail": True})["choices"][0]
        assert answer["message"]["content"] == wanted.text
        told = {name: weight for name, weight in answer["coterie"]["weights"].items() if weight}
        assert told == pytest.approx({name: weight for name, weight in wanted.weights.items() if weight}, abs=1e-5)
        assert ("tokens" in answer["coterie"]) == (wanted.trace is not None)


def test_a_bank_is_a_mixture_that_its_adapters_route(bank):
    wanted = Mixture.from_bank(bank, device="cpu").generate(QUESTION, max_new_tokens=6)[0]
    with started(str(bank)) as server, httpx2.Client(base_url=server.url, timeout=60) as client:
        asked = {"max_tokens": 6, "temperature": 0}
        assert chat(client, model="bank", **asked)["choices"][0]["message"]["content"] == wanted.text
        assert chat(client, model="cluster-1", **asked)["model"] == "cluster-1"
