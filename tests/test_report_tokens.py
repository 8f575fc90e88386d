"""Routing by token on the page: who leads which token, how often that changes, and what a stranger may put there."""

import copy
import json
import re
from xml.etree import ElementTree

import pytest

from coterie.errors import CoterieError
from coterie.records.evaluation import Trace
from coterie.report import write_report
from coterie.report.plots import Band, stacked_areas
from report_pages import (
    HOSTILE,
    SHOWN,
    answer,
    drawings,
    luminance,
    number,
    page_of,
    records,
    save,
    score,
    style,
    unnamed_pictures,
)

EXPERTS = ["maths", "science", "code"]
STRONG = {"m": [0.8, 0.15, 0.05], "s": [0.2, 0.7, 0.1], "c": [0.1, 0.25, 0.65]}


def trace(leaders, pieces=None):
    """A trace whose tokens are led as the letters say."""
    pieces = pieces or [f" {letter}{place}" for place, letter in enumerate(leaders)]
    return {"experts": EXPERTS, "pieces": pieces, "weights": [STRONG[letter] for letter in leaders]}


def traced(**leaders):
    """The small evaluation with token-level methods beside base; one text of leaders for each row of each method."""
    evaluation, rows = records()
    names = {method.replace("_", ":every="): texts for method, texts in leaders.items()}
    names = {method.replace("token", "token-level"): texts for method, texts in names.items()}
    evaluation |= {
        "mixture": "runs/domains",
        "routed": "token-level",
        "methods": ["base", *names],
        "experts": EXPERTS,
        "clusters": {},
        "routing": {source: dict(zip(EXPERTS, STRONG["s"], strict=True)) for source in ("gsm8k", "math")},
        "clustering": {},
        "table": [evaluation["table"][0], *(score(method, "all", 0.5, 0.1, [0.05, 0.15]) for method in names)],
    }
    for place, row in enumerate(rows):
        row["weights"] = dict(zip(EXPERTS, STRONG["m"], strict=True))
        del row["methods"]["elrea"]
        for method, texts in names.items():
            row["methods"][method] = answer(f"text {place}", True)
            if place < len(texts):
                row["methods"][method]["trace"] = trace(texts[place])
    return evaluation, rows


@pytest.mark.parametrize(
    ("leaders", "switches"), [("", 0), ("m", 0), ("mmmm", 0), ("mmss", 1), ("msms", 3), ("mscsm", 4), ("mssscc", 2)]
)
def test_a_switch_is_a_token_with_another_leader_than_the_one_before(leaders, switches):
    given = trace(leaders)
    found = Trace(**given)
    assert [name[0] for name in found.leaders] == list(leaders) and found.switches == switches


def test_among_equal_weights_the_first_expert_leads():
    weights = ((0.2, 0.4, 0.4), (0.5, 0.5, 0.0))
    assert Trace(experts=("a", "b", "c"), pieces=("x", "y"), weights=weights).leaders == ("b", "a")


def test_the_table_has_switches_a_text_and_in_a_hundred_tokens_and_who_leads(tmp_path):
    page = page_of(tmp_path, *traced(token=["msms", "mmmmss"], token_8=["mmmm", "ss", "cccc"]))
    _, *lines = page.table("Switches by method")
    assert lines == [
        ["token-level", "2.0", "40.0", "2", "10", "12"],
        ["token-level, every 8th token", "0.0", "0.0", "3", "10", "123"],
    ]
    assert page.table("Share of tokens by method and leading expert") == [
        ["Method", "maths", "science", "code"],
        ["token-level", "60.0%", "40.0%", "0.0%"],
        ["token-level, every 8th token", "40.0%", "20.0%", "40.0%"],
    ]
    bars = [part["attrs"] for part in page.all("rect", "part")]
    widths = [number(bar["width"]) for bar in bars if bar["class"].startswith("part k")]
    assert widths == pytest.approx([60, 40, 40, 20, 40])


@pytest.mark.parametrize(
    ("leaders", "words"),
    [
        (
            {"token": ["msms", "mmmmss"], "token_8": ["mmmm"], "token_2": ["mssm"]},
            "token-level changes its leading expert 2.0 times a text, 40.0 times in 100 tokens, and maths leads 60.0% "
            "of its tokens; 2 other methods: 0.0 to 50.0 in 100 tokens.",
        ),
        ({"token": ["ccc"]}, "token-level never changes its leading expert within a text, and code leads 100.0% of"),
        ({"token": [""]}, "token-level never changes its leading expert within a text."),
    ],
)
def test_one_sentence_says_what_the_switches_show(tmp_path, leaders, words):
    assert words in page_of(tmp_path, *traced(**leaders)).text()


def test_every_token_is_coloured_by_its_leader_and_tells_all_weights_at_it(tmp_path):
    page = page_of(tmp_path, *traced(token=["mmsc"]))
    tokens = page.all("span", "token")
    assert [token["text"] for token in tokens] == [" m0", " m1", " s2", " c3"]
    assert [token["attrs"]["data-weights"] for token in tokens][1:] == [
        "token 2: maths 0.80, science 0.15, code 0.05",
        "token 3: maths 0.20, science 0.70, code 0.10",
        "token 4: maths 0.10, science 0.25, code 0.65",
    ]
    assert [token["attrs"]["tabindex"] for token in tokens] == ["0", "-1", "0", "0"]  # from switch to switch
    runs = page.all("span", "run")
    assert [(run["attrs"]["class"], run["text"]) for run in runs] == [
        ("run k0", "1 m0 m1"),
        ("run k1", "2 s2"),
        ("run k2", "3 c3"),
    ]
    badges = [
        badge["attrs"] for badge in page.all("span", "badge") if "div" in badge["inside"] and "role" in badge["attrs"]
    ]
    assert [badge["aria-label"] for badge in badges] == EXPERTS


def test_the_tooltip_opens_for_the_pointer_and_for_the_keyboard():
    assert ".token:is(:hover, :focus)::after { content: attr(data-weights)" in style()


def test_white_space_and_line_breaks_of_a_text_stay_as_they_were(tmp_path):
    evaluation, rows = traced(token=["mmsc"])
    pieces = ["  x =", "\n\n", "\t1", " \n"]
    rows[0]["methods"]["token-level"]["trace"] = trace("mmsc", pieces)
    page = page_of(tmp_path, evaluation, rows)
    (text,) = page.all("div", "tokens")
    assert text["text"] == "1  x =\n\n2\t13 \n" and "text" in text["attrs"]["class"].split()
    assert re.search(r"\.text \{ white-space: pre-wrap", style())


def test_the_texts_with_most_switches_come_first_and_few_of_a_method(tmp_path):
    texts = ["m", "ms", "msm", "msms", "msmsm", "msmsms"]
    page = page_of(tmp_path, *traced(token=texts, token_2=texts, token_4=["mc"]))
    shown = [" ".join(s["text"].split()).split(" prompt")[0] for s in page.all("summary") if "switch" in s["text"]]
    twice = [
        f"{name} {count} switches" for count in (5, 4, 3, 2) for name in ("token-level", "token-level, every 2nd token")
    ]
    assert shown == twice


def test_a_text_without_tokens_is_counted_but_not_drawn(tmp_path):
    page = page_of(tmp_path, *traced(token=["", "ms"]))
    assert page.table("Switches by method")[1][1:5] == ["0.5", "50.0", "2", "2"]
    assert len(page.all("svg", "areas")) == 1


def test_of_a_long_text_the_first_four_hundred_tokens_are_drawn(tmp_path):
    page = page_of(tmp_path, *traced(token=["ms" * 617]))
    assert len(page.all("span", "token")) == 400
    assert "… (834 more tokens in rows.jsonl)" in page.text()
    assert page.table("Switches by method")[1][1:5] == ["1233.0", "99.9", "1", "1,234"]


def test_the_picture_says_in_words_who_leads_where(tmp_path):
    page = page_of(tmp_path, *traced(token=["mmsccc"]))
    (picture,) = page.all("svg", "areas")
    assert picture["attrs"]["aria-label"] == (
        "Weights over 6 tokens: maths leads 1 to 2; science leads 3; code leads 4 to 6"
    )
    assert not unnamed_pictures(page)


def test_areas_are_stacked_in_columns_of_their_shares_with_labels_where_there_is_room():
    bands = [Band("k0", "1", "low", (0.5, 0.5, 0.25, 0.25)), Band("k1", "2", "high", (0.5, 0.5, 0.75, 0.7))]
    tree = ElementTree.fromstring(
        stacked_areas([*bands, Band("k2", "3", "thin", (0.0, 0.0, 0.0, 0.05))], ("w", "t"), "n")
    )
    (inside,) = tree.findall("svg")
    assert inside.get("viewBox") == "0 0 4 100" and inside.get("preserveAspectRatio") == "none"
    assert [(path.get("class"), path.get("d"), path[0].text) for path in inside] == [
        ("part k2", "M0 100V0.0H4V100z", "thin"),
        ("part k1", "M0 100V0.0H3V5.0H4V100z", "high"),
        ("part k0", "M0 100V50.0H2V75.0H4V100z", "low"),
    ]
    labels = [t for t in tree.findall("text") if t.get("class") == "mark on"]
    assert [label.text for label in labels] == ["1", "2"]
    top, depth = float(inside.get("y")), float(inside.get("height"))
    for label, (low, high) in zip(labels, ((0.0, 0.25), (0.25, 1.0)), strict=True):
        column = 4 * (number(label.get("x")) - number(inside.get("x"))) / number(inside.get("width"))
        assert column == pytest.approx(2.5, abs=1e-3)
        assert low < 1 - (float(label.get("y")) - 4 - top) / depth < high


@pytest.mark.parametrize(
    ("count", "numbers"), [(1, "1"), (4, "1 2 3 4"), (60, "10 20 30 40 50 60"), (399, "100 200 300")]
)
def test_few_round_token_numbers_stand_under_the_areas(count, numbers):
    tree = ElementTree.fromstring(stacked_areas([Band("k0", "1", "a", (1.0,) * count)], ("w", "t"), "n"))
    assert [t.text for t in tree.findall("text") if t.get("class") == "mark"] == numbers.split()


def test_experts_beyond_the_colours_share_one_and_their_weights_are_summed(tmp_path):
    evaluation, rows = traced(token=["m"])
    names = [f"e{place}" for place in range(15)]
    weights = [[0.65 if place == leader else 0.025 for place in range(15)] for leader in (14, 14, 3)]
    rows[0]["methods"]["token-level"]["trace"] = {"experts": names, "pieces": ["a", "b", "c"], "weights": weights}
    page = page_of(tmp_path, evaluation, rows)
    keys = [" ".join(item["text"].split()) for item in page.all("ul", "parts")]
    assert keys[0].endswith("11 e10 12 e14 … 3 others") and keys[0] == keys[1]
    told = page.all("span", "token")[0]["attrs"]["data-weights"]
    assert told.endswith("e9 0.03, e10 0.03, e14 0.65, 3 smaller ones")
    (last, *_) = [e for e in page.all("path", "part") if "k12" in e["attrs"]["class"]]
    assert last["text"] == "3 others"


def test_hostile_pieces_and_names_add_no_tag_and_are_shown_as_they_are(tmp_path):
    evaluation, rows = traced(token=["mmsc"], token_2=["msms"])
    plain = page_of(tmp_path / "plain", evaluation, rows)
    hostile = json.dumps(HOSTILE)[1:-1]
    text = json.dumps([evaluation, rows])
    for name in ("maths", "science", " m0", " s1", " c3"):
        text = text.replace(f'"{name}"', f'"{name}{hostile}"')
    attacked = page_of(tmp_path / "attacked", *json.loads(text))
    assert [element["tag"] for element in attacked.elements] == [element["tag"] for element in plain.elements]
    assert not [name for element in attacked.elements for name in element["attrs"] if name.startswith("on")]
    assert " m0" + SHOWN in [token["text"] for token in attacked.all("span", "token")]
    assert f"maths{SHOWN} 0.80" in attacked.all("span", "token")[0]["attrs"]["data-weights"]


def test_a_report_without_traces_has_nothing_of_them(tmp_path):
    evaluation, rows = traced(token=[])
    text = write_report(save(tmp_path, evaluation, rows)).read_text(encoding="utf-8")
    body = text.partition("</style>")[2]
    for words in ("Token by token", "Switches", 'class="token"', "areas", "anew", "began"):
        assert words not in body
    assert "Weights that answered for token-level" in body


def test_the_words_fit_experts_that_are_domains_and_weights_that_change(tmp_path):
    page = page_of(tmp_path, *traced(token=["mmsc"]))
    assert not re.search(r"cluster|gradient|base adapter|elrea", page.text(), re.IGNORECASE)
    assert "The mean weight that each expert had in beginning to answer" in page.text()
    assert "Weights that began the answer of token-level" in page.text()


WRONG = {
    "'experts': should be a valid tuple, got 3": {"experts": 3},
    ": 'experts' should be a list of names, each once": {"experts": []},
    ": 'experts' should be a list of names, each once, ": {"experts": ["maths", "maths", "code"]},
    "'pieces' 1: should be a valid string, got 1": {"pieces": [1, "a"]},
    "'pieces': is missing": {"pieces": "missing"},
    ": 'weights' should be a row for each of 1 'pieces'": {"pieces": ["a"]},
    "'weights': should be a valid tuple, got null": {"weights": None},
    "'weights' 1: should be a valid tuple, got 0.5": {"weights": [0.5]},
    ": 'weights' should be rows of 3 numbers that sum to 1": {"weights": [[1, 0], [1, 0, 0]]},
    "'weights' 1 1: should be a valid number, got null": {"weights": [[float("nan"), 0.5, 0.5], [1, 0, 0]]},
    "'weights' 1 2: should be a valid number, got null": {"weights": [[1, float("inf"), 0], [1, 0, 0]]},
    "'weights' 1 2: should be greater than or equal to 0, got -0.5": {"weights": [[1.5, -0.5, 0], [1, 0, 0]]},
    "'weights' 1 1: should be a valid number, got true": {"weights": [[True, 0, 0], [1, 0, 0]]},
    ": 'weights' should be rows of 3 numbers that sum to 1, ": {"weights": [[0, 0, 0], [1, 0, 0]]},
    "numbers that sum to 1, got": {"weights": [[1, 0, 0], [1, 1, 0]]},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_broken_trace_is_named_with_its_place_in_one_line(tmp_path, message):
    evaluation, rows = copy.deepcopy(traced(token=["ms", "ms"]))
    broken = rows[1]["methods"]["token-level"]["trace"] | WRONG[message]
    rows[1]["methods"]["token-level"]["trace"] = {key: value for key, value in broken.items() if value != "missing"}
    with pytest.raises(
        CoterieError, match=re.escape("rows.jsonl, line 2, 'methods', 'token-level', 'trace'")
    ) as caught:
        write_report(save(tmp_path, evaluation, rows))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_trace_that_is_no_object_is_named_and_a_null_one_is_none(tmp_path):
    evaluation, rows = traced(token=["ms"])
    rows[0]["methods"]["token-level"]["trace"] = None
    assert "Switches" not in page_of(tmp_path, evaluation, rows).text()
    rows[0]["methods"]["token-level"]["trace"] = [1]
    with pytest.raises(CoterieError, match=r"line 1, 'methods', 'token-level', 'trace': should be .*, got \[1\]"):
        write_report(save(tmp_path, evaluation, rows))


def test_methods_are_called_in_words_wherever_they_stand(tmp_path):
    evaluation, rows = traced(token=["ms"], token_2=["ms"])
    text = (
        json.dumps([evaluation, rows])
        .replace('"base"', '"expert:maths"')
        .replace('"token-level"', '"token-level:every=4"')
    )
    page = page_of(tmp_path, *json.loads(text))
    assert page.all("h1")[0]["text"] == "token-level, every 4th token against maths alone"
    assert page.all("p", "headline")[0]["text"].startswith("token-level, every 4th token answers 50.0%")
    assert not re.search(r"expert:maths|every=", page.text())
    labels = [a for e in page.elements for key, a in e["attrs"].items() if key in ("aria-label", "data-weights")]
    assert labels and not [label for label in labels if "expert:maths" in label or "every=" in label]


def test_variants_run_from_every_token_to_the_prompts_weights_alone(tmp_path):
    path = write_report(save(tmp_path, *traced(token=["ms"], token_2=[], token_8=[], token_inf=[])))
    tree, _ = drawings(path.read_text(encoding="utf-8"), "plot curve")
    assert [t.text for t in tree.findall("text[@class='mark']")] == ["∞", "8", "2", "1"]
    assert [place.find("title").text.split(" 50.0")[0] for place in tree.findall("svg")] == [
        "token-level",
        "token-level, every 2nd token",
        "token-level, every 8th token",
        "token-level, prompt only",
    ]


def mixed(colour, paper, part):
    return "".join(
        f"{round(part * int(colour[at : at + 2], 16) + (1 - part) * int(paper[at : at + 2], 16)):02x}"
        for at in (0, 2, 4)
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_text_is_legible_on_every_tint_in_both_themes(theme):
    sheet = style()
    found = dict(
        re.findall(r"--(k\d+|panel|ink): #(\w{6})", sheet.split("prefers-color-scheme: dark")[theme == "dark"])[:15]
    )
    tints = [int(part) / 100 for part in re.findall(r"\.token[^\n]*color-mix\(in srgb, currentColor (\d+)%", sheet)]
    assert len(tints) == 2
    for tint in tints:
        for name in found.keys() - {"panel", "ink"}:
            dark, light = sorted(map(luminance, (mixed(found[name], found["panel"], tint), found["ink"])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, tint)  # WCAG 2.2, 1.4.3
