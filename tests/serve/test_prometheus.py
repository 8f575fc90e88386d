"""A real Prometheus, where there is one: it scrapes the server by its key, and answers every query of the dashboard."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx2
import pytest
import yaml
from test_deploy import DEPLOY, dashboard, loaded

from helpers import unused_port
from served import chat_body, started

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
pytestmark = pytest.mark.skipif(not (PROMETHEUS and PROMTOOL), reason="there is no Prometheus here")
KEYS = {"user": "user-0000000000001", "metrics": "metrics-000000001"}
PATIENCE = 60  # seconds


@pytest.fixture(scope="module")
def scraped(run_folder, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A server that is asked now and then, and a Prometheus with the configuration of `deploy/` that scrapes it."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "keys").write_text("".join(f"{key} role={role}\n" for role, key in KEYS.items()))
    (folder / "key").write_text(KEYS["metrics"])
    shutil.copy(DEPLOY / "alerts.yml", folder)
    config = loaded("prometheus.yml")
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    address = f"127.0.0.1:{unused_port()}"
    with started(f"elrea={run_folder}", api_key_file=str(folder / "keys")) as server:
        config["scrape_configs"][0]["authorization"]["credentials_file"] = str(folder / "key")
        config["scrape_configs"][0]["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        words = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        running = subprocess.Popen([PROMETHEUS, *words, f"--web.listen-address={address}", "--log.level=error"])
        try:
            with httpx2.Client(trust_env=False, timeout=30) as http:
                yield SimpleNamespace(http=http, url=server.url, api=f"http://{address}/api/v1", written=0)
        finally:
            running.terminate()
            running.wait()


def asked(scraped) -> None:
    """Ask the server once."""
    headers = {"Authorization": f"Bearer {KEYS['user']}"}
    answer = scraped.http.post(f"{scraped.url}/v1/chat/completions", json=chat_body(), headers=headers)
    scraped.written += answer.json()["usage"]["completion_tokens"]


def found(scraped, expression: str) -> list[dict]:
    """Return what Prometheus answers to a query; nothing while it does not run yet, or is starting."""
    try:
        told = scraped.http.get(f"{scraped.api}/query", params={"query": expression})
    except httpx2.TransportError:
        return []
    if told.status_code == httpx2.codes.SERVICE_UNAVAILABLE:
        return []
    answer = told.json()
    assert answer["status"] == "success", (expression, answer)
    return answer["data"]["result"]


def within_patience(scraped, is_there) -> bool:
    """Ask the server now and then until something is there."""
    end = time.monotonic() + PATIENCE
    while not (there := is_there()) and time.monotonic() < end:
        asked(scraped)
        time.sleep(0.5)
    return there


def test_every_query_of_the_dashboard_is_answered(scraped):
    targets = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    silent = {expression.replace("$__rate_interval", "1m") for expression in targets}
    assert len(silent) > 18

    def all_answered() -> bool:
        silent.difference_update([expression for expression in silent if found(scraped, expression)])
        return not silent

    assert within_patience(scraped, all_answered), silent


def test_what_was_written_is_what_prometheus_counts(scraped):
    asked(scraped)
    end, told = time.monotonic() + PATIENCE, 0.0
    while told != scraped.written and time.monotonic() < end:
        time.sleep(0.5)
        told = sum(float(one["value"][1]) for one in found(scraped, "sum(coterie_generation_tokens_total)"))
    assert told == scraped.written > 0
    assert [one["value"][1] for one in found(scraped, "up")] == ["1"]


def test_all_alerts_are_understood_and_none_rings(scraped):
    def rules() -> list[dict]:
        groups = scraped.http.get(f"{scraped.api}/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    assert within_patience(scraped, lambda: {rule["health"] for rule in rules()} == {"ok"}), rules()
    wanted = {rule["alert"] for group in loaded("alerts.yml")["groups"] for rule in group["rules"]}
    assert {rule["name"] for rule in rules()} == wanted
    assert {rule["state"] for rule in rules()} == {"inactive"}


@pytest.mark.parametrize("words", [["rules", "alerts.yml"], ["config", "--syntax-only", "prometheus.yml"]])
def test_the_files_are_what_prometheus_reads(words):
    told = subprocess.run([PROMTOOL, "check", *words], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
