"""The files of `deploy/` name what is there: flags, paths, and metrics that the server has."""

import json
import re
import shlex
from pathlib import Path

import yaml

from coterie.engine.request import Load
from coterie.serve.keys import OPEN_PATHS
from coterie.serve.metrics import Metrics
from coterie.settings.reading import flag_of, flat_fields
from coterie.settings.serving import ServeSettings

DEPLOY = Path(__file__).parents[2] / "deploy"
METRIC = re.compile(r"\b(?:coterie_|vllm:)\w+")


def loaded(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def known_metrics():
    """Every name under which Prometheus keeps what the page has."""
    metrics = Metrics(lambda: {"elrea": Load(0, 0, 0.0, 0)})
    metrics.set_up({"places": "16"})
    kinds = dict(line.split()[2:] for line in metrics.page()[0].decode().splitlines() if line.startswith("# TYPE"))
    parts = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
    return {name + part for name, kind in kinds.items() for part in parts[kind]}


def dashboard():
    return json.loads((DEPLOY / "grafana" / "coterie.json").read_text())


def expressions():
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return panels + [rule["expr"] for group in loaded("alerts.yml")["groups"] for rule in group["rules"]]


def test_every_metric_that_the_dashboard_and_the_alerts_name_is_measured():
    named = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(named) > 15 and named <= known_metrics()


def test_the_dashboard_reads_the_source_that_is_set_up_and_its_panels_do_not_overlap():
    (source,) = loaded("grafana/datasource.yml")["datasources"]
    panels = dashboard()["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert source["url"].split("//")[1].split(":")[0] in loaded("docker-compose.yml")["services"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels) == len({panel["id"] for panel in panels})
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_brackets_of_all_expressions_close():
    for text in expressions():
        assert [text.count(one) for one in "([{"] == [text.count(one) for one in ")]}"], text


def test_the_compose_file_mounts_files_that_there_are_and_secrets_that_it_names():
    compose = loaded("docker-compose.yml")
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            made_by_the_user = source in ("../runs", *compose["volumes"])
            assert made_by_the_user or (DEPLOY / source).is_file(), mount
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
    assert (DEPLOY / compose["services"]["coterie"]["build"]["context"] / "pyproject.toml").is_file()
    key = loaded("prometheus.yml")["scrape_configs"][0]["authorization"]["credentials_file"]
    assert Path(key).name in compose["services"]["prometheus"]["secrets"]
    ignored = (DEPLOY / ".gitignore").read_text().split()
    assert {Path(secret["file"]).name for secret in compose["secrets"].values()} == set(ignored)


def test_containers_are_given_flags_that_there_are():
    flags = {flag_of(name) for name, _, _ in flat_fields(ServeSettings)}
    entry = re.search(r"^ENTRYPOINT (.*)$", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)[1]
    words = [*json.loads(entry), *loaded("docker-compose.yml")["services"]["coterie"]["command"]]
    assert words[:2] == ["coterie", "serve"] and {word for word in words if word.startswith("--")} <= flags


def test_the_image_is_not_run_by_root_and_its_probe_needs_no_key():
    text = (DEPLOY / "Dockerfile").read_text()
    last = text[text.rindex("FROM ") :]
    assert re.search(r"useradd .*--uid 10001 coterie", last) and re.search(r"^USER coterie$", last, flags=re.MULTILINE)
    assert re.search(r"127\.0\.0\.1:8000(/\w+)", last)[1] in OPEN_PATHS


def test_what_the_image_copies_is_let_through_and_nothing_else():
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE)
        for word in shlex.split(line)[:-1]
    }
    let_through = {line[1:] for line in (DEPLOY.parent / ".dockerignore").read_text().split() if line.startswith("!")}
    assert copied == let_through and all((DEPLOY.parent / one).exists() for one in copied)


def test_containers_get_longer_to_stop_than_answers_to_end():
    grace = int(loaded("docker-compose.yml")["services"]["coterie"]["stop_grace_period"].rstrip("s"))
    assert grace > ServeSettings(mixtures=["x"]).operation.drain
