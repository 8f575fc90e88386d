"""The Grafana dashboard of `deploy/` as a picture, without Grafana: a real Prometheus answers every query of it.

    python benchmarks/dashboard.py --model smollm2-135m --minutes 3 --output docs/dashboard.png

A server is asked by more and fewer clients, in various mixtures, while Prometheus scrapes it. Then the panels are
drawn, each at its place under its title, and photographed by Chromium. `prometheus` and `chromium` are to be installed.
"""

import asyncio
import html
import json
import math
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import yaml
from _harness import arguments, load

from serve import WORDS, free_port, process, saved_mixture

DEPLOY = Path(__file__).parents[1] / "deploy"
STEP = 2  # seconds between two scrapes
COLOURS = ("#0b6", "#36c", "#d70", "#a3a", "#c33", "#085", "#777", "#a80")
SHARE_WEIGHED, SHARE_WRONG = 0.8, 0.03  # of the requests: with weights of their own, and to a model that is not there
CELL_W, CELL_H, PAD = 50, 34, 8  # pixels of a column and of a row of the grid, and around a panel
Series = Sequence[tuple[float, float]]


async def load_for(url: str, seconds: float, experts: Sequence[str]) -> None:
    """Let up to eight clients ask, more and fewer of them as time goes by."""
    end, numbers = time.monotonic() + seconds, random.Random(0)

    async def client(place: int) -> None:
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as http:
            while (left := end - time.monotonic()) > 0:
                if place > 4 + 4 * math.sin(6 * left / seconds):
                    await asyncio.sleep(1)
                    continue
                weights = {name: numbers.random() ** 3 for name in experts}
                prompt = f"{WORDS * numbers.randint(1, 4)} {numbers.random()}"
                body: dict[str, Any] = {"model": "ensemble", "prompt": prompt, "max_tokens": numbers.randint(4, 24)}
                if numbers.random() < SHARE_WEIGHED:
                    body["coterie"] = {"weights": weights}
                if numbers.random() < SHARE_WRONG:
                    body["model"] = "nobody"
                await http.post(f"{url}/v1/completions", json=body)

    await asyncio.gather(*(client(place) for place in range(8)))


def answers(api: str, expression: str, start: float, end: float) -> list[tuple[Mapping[str, str], Series]]:
    """Return the series that Prometheus answers a panel's query with."""
    query = expression.replace("$__rate_interval", f"{8 * STEP}s")
    asked = {"query": query, "start": start, "end": end, "step": STEP}
    told = httpx2.get(f"{api}/query_range", params=asked, trust_env=False).json()
    if told["status"] != "success":
        raise SystemExit(f"Prometheus does not answer {query}: {told}")
    return [(one["metric"], [(t, float(v)) for t, v in one["values"]]) for one in told["data"]["result"]]


def told(value: float) -> str:
    """Write a number in few characters."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def drawn(panel: Mapping[str, Any], api: str, start: float, end: float) -> str:
    """Draw a panel."""
    named = []
    for target in panel["targets"]:
        for labels, series in answers(api, target["expr"], start, end):
            name = target["legendFormat"]
            for label, value in labels.items():
                name = name.replace("{{" + label + "}}", value)
            named.append((name, [(t, v) for t, v in series if math.isfinite(v)]))
    place = panel["gridPos"]
    width, height = place["w"] * CELL_W - 2 * PAD, place["h"] * CELL_H - 2 * PAD
    left, top, right, bottom = 46, 30, width - 8, height - 34
    largest = max((v for _, series in named for _, v in series), default=0.0) or 1.0
    unit = {"s": " s", "percentunit": ""}.get(panel["fieldConfig"]["defaults"].get("unit", ""), "")
    across = lambda t: left + (right - left) * (t - start) / (end - start)  # noqa: E731
    up = lambda v: bottom - (bottom - top) * v / largest  # noqa: E731
    parts = [f'<text x="6" y="18" class="title">{html.escape(panel["title"])}</text>']
    for share in (0, 0.5, 1):
        y, value = up(share * largest), share * largest
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{told(value)}{unit}</text>')
    x = left
    for number, (name, series) in enumerate(named):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{across(t):.1f},{up(v):.1f}" for t, v in series)
        parts.append(f'<polyline points="{points}" stroke="{colour}"/>')
        parts.append(f'<text x="{x}" y="{height - 10}" fill="{colour}">{html.escape(name)}</text>')
        x += 14 + 7 * len(name)
    style = f"left:{place['x'] * CELL_W + PAD}px;top:{place['y'] * CELL_H + PAD}px"
    return f'<svg style="{style}" width="{width}" height="{height}">{"".join(parts)}</svg>'


def page(panels: Sequence[Mapping[str, Any]], api: str, start: float, end: float) -> str:
    """Return all panels as a page."""
    style = """
        body { margin: 0; background: #f4f5f5; font: 11px sans-serif }
        svg { position: absolute; background: #fff; border: 1px solid #ddd }
        line { stroke: #e5e5e5 }
        polyline { fill: none; stroke-width: 1.5 }
        .title { font-size: 13px; font-weight: 600 }
    """
    return f"<meta charset=utf-8><style>{style}</style>" + "".join(drawn(one, api, start, end) for one in panels)


def main() -> None:
    """Serve, scrape, draw."""
    flags = arguments("dashboard")
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder, port, api_port = Path(place), free_port(), free_port()
        mixture = saved_mixture(load(flags.model), folder / "mixture")
        words = ("-m", "coterie", "serve", f"ensemble={folder / 'mixture'}", "--port", str(port))
        url = stack.enter_context(process(*words, url=f"http://127.0.0.1:{port}"))
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"]["scrape_interval"] = f"{STEP}s"
        (job,) = config["scrape_configs"]
        del job["authorization"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        shutil.copy(DEPLOY / "alerts.yml", folder)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        paths = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        running = subprocess.Popen(["prometheus", *paths, f"--web.listen-address=127.0.0.1:{api_port}"])
        stack.callback(running.wait)
        stack.callback(running.terminate)
        start = time.time()
        asyncio.run(load_for(url, 60 * (flags.minutes or 3), mixture.bank.names))
        panels = json.loads((DEPLOY / "grafana" / "coterie.json").read_text(encoding="utf-8"))["panels"]
        drawn_page = folder / "dashboard.html"
        drawn_page.write_text(page(panels, f"http://127.0.0.1:{api_port}/api/v1", start, time.time()), encoding="utf-8")
        high = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in panels) * CELL_H
        size = f"--window-size={24 * CELL_W},{high}"
        output = (flags.output or Path("dashboard.png")).resolve()
        browser = ("chromium", "--headless", "--no-sandbox", "--hide-scrollbars", size, f"--screenshot={output}")
        subprocess.run([*browser, drawn_page.as_uri()], check=True)


if __name__ == "__main__":
    main()
