"""Records of a small evaluation, and a reader of the page that is made from them."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from xml.etree import ElementTree

from coterie.report import write_report

HOSTILE = "<script>alert(1)</script></style></title></textarea>--><img src=x onerror=alert(2)>'\" onload='{{ 7*7 }}&lt;"
HOSTILE += "\x00\u202e"
SHOWN = HOSTILE.replace("\x00", "\ufffd").replace("\u202e", "\ufffd")  # as the page should show it
VOID = {"meta", "br", "img", "input", "hr", "link"}


def score(method, source, accuracy, gap=None, ends=None, nll=0.7, nll_gap=None, nll_ends=None):
    return {
        "method": method,
        "source": source,
        "rows": 50,
        "graded": 0 if accuracy is None else 40,
        "accuracy": accuracy,
        "accuracy_difference": gap,
        "accuracy_interval": ends,
        "nll": nll,
        "nll_difference": nll_gap,
        "nll_interval": nll_ends,
    }


def answer(text, correct, **others):
    return {
        "text": text,
        "correct": correct,
        "extracted": None,
        "nll": 0.7,
        "tokens": 9,
        "finish_reason": "stop",
    } | others


def row(number, source, ours, theirs):
    return {
        "id": f"{source}/{number}",
        "source": source,
        "category": None,
        "prompt": f"prompt {number} of {source}",
        "reference": "reference",
        "answer": "7",
        "weights": {"base": 0.25, "cluster-0": 0.75},
        "methods": {"base": answer(f"base says {number}", theirs), "elrea": answer(f"elrea says {number}", ours)},
    }


def records():
    """Two sources, two methods, two clusters, six rows."""
    outcomes = [(True, False), (False, True), (True, True), (False, False), (None, None), (True, False)]
    rows = [row(number, ("gsm8k", "math")[number % 2], *outcome) for number, outcome in enumerate(outcomes)]
    table = [
        score("base", "all", 0.4, nll=0.8123),
        score("base", "gsm8k", 0.5),
        score("base", "math", 0.3),
        score("elrea", "all", 0.4625, 0.0625, [0.0125, 0.1125], 0.7654, -0.0469, [-0.0912, 0.0017]),
        score("elrea", "gsm8k", 0.45, -0.05, [-0.2, 0.1], 0.7, -0.02, [-0.03, -0.01]),
        score("elrea", "math", 0.475, 0.175, [0.075, 0.3], 0.7, 0.01, [-0.03, 0.05]),
    ]
    evaluation = {
        "format": 1,
        "mixture": "runs/elrea",
        "base_model": {"id": "smollm2-135m", "revision": "abc123", "sha256": "f" * 64},
        "data": "test.jsonl",
        "control": "base",
        "methods": ["base", "elrea"],
        "experts": ["base", "cluster-0", "cluster-1"],
        "rows": len(rows),
        "sources": ["gsm8k", "math"],
        "settings": {"max_new_tokens": 64, "temperature": 0.0},
        "hardware": {"name": "a desktop, 2 cores", "torch": "2.13.0"},
        "clusters": {"cluster-0": {"gsm8k": 1041, "math": 7}, "cluster-1": {"math": 52, "dolly": 5}},
        "clustering": {"adjusted_rand_index": 0.7134, "method": "birch"},
        "routing": {
            "gsm8k": {"base": 0.11, "cluster-0": 0.57, "cluster-1": 0.32},
            "math": {"base": 0.2, "cluster-0": 0.04, "cluster-1": 0.76},
        },
        "seconds": {"base": {"generate": 12.3, "score": 4.5}, "elrea": {"generate": 61.25, "score": 22.0}},
        "table": table,
    }
    return evaluation, rows


def save(folder, evaluation, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """A page as elements with attributes and text; it fails on a tag that is closed out of turn."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.stack = [], []
        self.feed(text)
        assert not self.stack, "a tag was left open"

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [outer["tag"] for outer in self.stack]}
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_endtag(self, tag):
        assert self.stack.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.stack:
            element["text"] += data

    def all(self, tag, kind=None):
        kinds = [(element, (element["attrs"].get("class") or "").split()) for element in self.elements]
        return [element for element, names in kinds if element["tag"] == tag and (kind is None or kind in names)]

    def text(self):
        return re.sub(r"\s+", " ", self.all("body")[0]["text"])

    def table(self, caption):
        """The cells of the table with this caption, row by row."""
        found, inside = [], False
        for element in self.elements:
            if element["tag"] == "caption":
                inside = element["text"] == caption
            elif inside and element["tag"] == "tr":
                found.append([])
            elif inside and element["tag"] in {"th", "td"}:
                found[-1].append(" ".join(element["text"].split()))
        return found


def page_of(folder, evaluation, rows):
    return Page(write_report(save(folder, evaluation, rows)).read_text(encoding="utf-8"))


def number(text):
    return float(text.removesuffix("%").replace("−", "-"))


def style():
    return files("coterie.report").joinpath("style.css").read_text(encoding="utf-8")


def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def drawings(text, kind):
    """The pictures of this class on a page, as trees."""
    found = []
    for start in re.finditer(f'<svg class="{kind}"', text):
        depth = 0
        for tag in re.finditer(r"<svg|</svg>", text[start.start() :]):
            depth += 1 if tag[0] == "<svg" else -1
            if not depth:
                found.append(ElementTree.fromstring(text[start.start() : start.start() + tag.end()]))
                break
    return found


def unnamed_pictures(page):
    """The pictures that neither say what they show nor are hidden from those who cannot see them."""
    outer = [element["attrs"] for element in page.all("svg") if "svg" not in element["inside"]]
    return [a for a in outer if not (a.get("role") == "img" and a.get("aria-label")) and a.get("aria-hidden") != "true"]
