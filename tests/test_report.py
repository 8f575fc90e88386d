"""The report shows what the records say, breaks on no text, and asks nothing of the network."""

import copy
import re
import subprocess
import sys
from importlib.resources import files
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from coterie.errors import CoterieError
from coterie.records.evaluation import MethodResult, RowRecord
from coterie.report import write_report
from coterie.report.charts import Interval, interval_chart, split_bar
from coterie.report.examples import choose
from coterie.report.scales import even_scale
from coterie.report.wording import fixed, short, signed
from helpers import put
from report_pages import HOSTILE, SHOWN, Page, answer, luminance, number, page_of, records, save, unnamed_pictures


@pytest.fixture
def page(tmp_path):
    return Page(write_report(save(tmp_path / "eval", *records())).read_text(encoding="utf-8"))


def hostile_everywhere(value):
    """Put the hostile text at the end of every text and name, except for the names that the reader looks up."""
    if isinstance(value, dict):
        return {hostile_name(key): hostile_everywhere(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile_everywhere(item) for item in value]
    return value + HOSTILE if isinstance(value, str) and value not in {"all", "stop"} else value


def hostile_name(key):
    return (
        key + HOSTILE if key in {"base", "elrea", "gsm8k", "math", "dolly", "cluster-0", "cluster-1", "name"} else key
    )


def test_hostile_texts_and_names_add_no_tag_and_no_attribute_but_are_shown_as_they_are(tmp_path, page):
    evaluation, rows = hostile_everywhere(list(records()))
    attacked = page_of(tmp_path / "attacked", evaluation, rows)
    tags = [element["tag"] for element in page.elements]
    assert [element["tag"] for element in attacked.elements] == tags
    assert not [name for element in attacked.elements for name in element["attrs"] if name.startswith("on")]
    assert "script" not in tags and tags.count("style") == 1
    for text in ("prompt 0 of gsm8k", "elrea says 0", "reference", "runs/elrea", "smollm2-135m", "a desktop, 2 cores"):
        assert text + SHOWN in attacked.text()
    for kind in ("cluster-0", "elrea"):
        assert kind + SHOWN in [element["text"].strip() for element in attacked.all("th")]


def test_half_a_surrogate_pair_and_nan_in_the_records_leave_a_readable_page(tmp_path):
    evaluation, rows = records()
    rows[0]["prompt"], rows[0]["methods"]["base"]["nll"] = "half \ud83d", float("nan")
    evaluation["table"][0]["nll"] = float("inf")
    page = page_of(tmp_path, evaluation, rows)
    assert "half \ufffd" in page.text()
    assert page.table("Results of all methods on all rows")[2][5] == "–"


def test_no_address_on_the_page_leads_out_of_it(tmp_path):
    text = write_report(save(tmp_path, *records())).read_text(encoding="utf-8")
    links = [
        v for e in Page(text).elements for name, v in e["attrs"].items() if name in {"href", "src", "srcset", "action"}
    ]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_link_leads_to_a_section(page):
    sections = {element["attrs"].get("id") for element in page.elements}
    assert {element["attrs"]["href"][1:] for element in page.all("a")} <= sections


def test_the_table_shows_the_numbers_of_the_records(page):
    head, _, base, elrea = page.table("Results of all methods on all rows")
    assert head[2:] == ["Accuracy, differences in points", "NLL, nats a token"]
    assert base == ["base control", "40", "40.0%", "–", "–", "0.812", "–", "–"]
    assert elrea == ["elrea", "40", "46.2%", "+6.2", "● +1.2 to +11.2", "0.765", "−0.0469", "○ −0.0912 to +0.0017"]


@pytest.mark.parametrize(
    ("measure", "kept", "told"),
    [
        ("accuracy", ["0.812", "–", "–"], "NLL is the mean surprise"),
        ("nll", ["40", "40.0%", "–", "–"], "Accuracy counts"),
    ],
)
def test_what_was_not_measured_has_no_columns(tmp_path, measure, kept, told):
    """After `coterie eval --no-generate`, or of endpoints that tell no likelihoods."""
    evaluation, rows = records()
    for line in evaluation["table"]:
        line |= {measure: None, f"{measure}_difference": None, f"{measure}_interval": None}
    page = page_of(tmp_path, evaluation, rows)
    _, _, base, elrea = page.table("Results of all methods on all rows")
    assert base == ["base control", *kept] and len(elrea) == len(base)
    others = {"Accuracy counts", "NLL is the mean surprise"} - {told}
    assert told in page.text() and not any(other in page.text() for other in others)


def test_the_table_by_source_has_every_method_under_every_source(page):
    _, _, *lines = page.table("Results of all methods by source")
    assert [line[0] for line in lines] == [
        "gsm8k, 50 rows",
        "base control",
        "elrea",
        "math, 50 rows",
        "base control",
        "elrea",
    ]
    assert lines[2][2:5] == ["45.0%", "−5.0", "○ −20.0 to +10.0"]


def test_the_heat_maps_show_the_records_cell_by_cell(page):
    assert page.table("Training rows by cluster and source") == [
        ["Cluster", "Rows", "gsm8k", "math", "dolly"],
        ["cluster-0", "1,048", "1,041", "7", "0"],
        ["cluster-1", "57", "0", "52", "5"],
    ]
    assert page.table("Mean routing weight by source and expert") == [
        ["Source", "base", "cluster-0", "cluster-1"],
        ["gsm8k", "0.11", "0.57", "0.32"],
        ["math", "0.20", "0.04", "0.76"],
    ]


def test_the_adjusted_rand_index_is_told_where_there_is_one(tmp_path, page):
    assert "adjusted Rand index of clusters and sources is 0.71" in page.text()
    evaluation, rows = records()
    for clustering in ({"adjusted_rand_index": None}, {"adjusted_rand_index": float("nan")}, {}):
        assert "Rand" not in page_of(tmp_path, evaluation | {"clustering": clustering}, rows).text()


def test_a_shade_is_the_share_of_the_cluster_or_of_the_largest_weight_in_tenths(page):
    shades = [cell["attrs"]["class"].removeprefix("cell s") for cell in page.all("td", "cell")]
    assert list(map(int, shades)) == [10, 0, 0, 0, 9, 1] + [
        round(10 * w / 0.76) for w in (0.11, 0.57, 0.32, 0.2, 0.04, 0.76)
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_number_on_a_shade_is_legible_and_shades_go_one_way(theme):
    style = files("coterie.report").joinpath("style.css").read_text()
    rules = re.findall(r"\.s\d+ \{ background: #(\w{6}); color: #(\w{6}) \}", style)
    shades = rules[:11] if theme == "light" else rules[11:]
    assert len(rules) == 22
    paper = [luminance(background) for background, _ in shades]
    assert paper == sorted(paper, reverse=theme == "light")
    for background, ink in shades:
        dark, light = sorted((luminance(background), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.2, 1.4.3


def drawn(svg):
    """The linear map of a picture, read off its two outermost axis numbers, and its drawn rows."""
    tree = ElementTree.fromstring(svg)
    marks = [(number(t.text), number(t.get("x"))) for t in tree.findall("text") if t.get("class") == "mark"]
    (low, left), (high, right) = marks[0], marks[-1]
    rows = [
        (number(line.get("x1")), number(dot.get("cx")), number(line.get("x2")))
        for line, dot in zip(tree.findall("g/line"), tree.findall("g/circle"), strict=True)
    ]
    (zero,) = (number(line.get("x1")) for line in tree.findall("line[@class='zero']"))
    return (lambda value: left + (right - left) * (value - low) / (high - low)), rows, zero


@pytest.mark.parametrize(
    "values",
    [[(-4.5, -2.0, 0.0), (1.0, 4.0, 7.0)], [(-0.0137, -0.0079, -0.0028), (0.0001, 0.02, 0.1006)], [(3.0, 5.0, 8.0)]],
)
def test_intervals_are_drawn_where_a_linear_map_of_the_axis_puts_them(values):
    axis = even_scale((value for interval in values for value in interval), around_zero=True)
    chart = interval_chart([Interval(m, (a, b), True, "x") for a, m, b in values], axis, ("", "", ""), "t")
    place, rows, zero = drawn(chart)
    assert rows == [pytest.approx(tuple(map(place, interval)), abs=0.002) for interval in values]
    assert zero == pytest.approx(place(0), abs=0.002)
    assert 0 < place(axis.low) < place(axis.high) < 100


def test_a_value_beyond_the_axis_is_written_at_its_end_and_a_line_stops_there():
    axis = even_scale([-0.1, 0.1], around_zero=True)
    far = [
        Interval(2.4765, (2.0, 3.0), True, "x"),
        Interval(-7.0, None, True, "x"),
        Interval(0.05, (-9.0, 0.08), False, "x"),
    ]
    tree = ElementTree.fromstring(interval_chart(far, axis, ("", "", ""), "t"))
    written = [text for text in tree.findall("g/text")]
    assert [text.text for text in written] == ["+2.48 →", "← −7.00"]
    place = dict(zip(axis.marks, [t.get("x") for t in tree.findall("text") if t.get("class") == "mark"], strict=False))
    assert [text.get("x") for text in written] == [place[axis.marks[-1]], place[axis.marks[0]]]
    (line,) = tree.findall("g/line")
    assert line.get("x1") == place[axis.marks[0]]
    assert len(tree.findall("g/circle")) == 1


def test_one_method_far_from_all_others_does_not_press_them_together(tmp_path):
    summary, rows = records()
    scores = {score["method"]: score for score in summary["table"] if score["source"] == "all"}
    far = {**scores["elrea"], "method": "backbone", "nll_difference": 3.0, "nll_interval": [2.5, 3.5]}
    near = [{**scores["elrea"], "method": f"m{number}"} for number in range(3)]
    summary["table"] += [far, *near]
    summary["methods"] += [score["method"] for score in (far, *near)]
    text = write_report(save(tmp_path, summary, rows)).read_text(encoding="utf-8")
    nll = re.findall(r'<svg class="intervals".*?</svg>', text)[1]
    marks = [number(mark) for mark in re.findall(r'class="mark">([^<]*)<', nll)]
    assert max(marks) < 0.2
    assert "→" in nll and "+3.0" in nll


def test_the_page_draws_the_differences_of_the_table_in_points_and_nats(tmp_path):
    text = write_report(save(tmp_path, *records())).read_text(encoding="utf-8")
    accuracy, nll, *by_source = re.findall(r'<svg class="intervals".*?</svg>', text)
    assert len(by_source) == 4
    for svg, values in [
        (accuracy, (1.25, 6.25, 11.25)),
        (nll, (-0.0912, -0.0469, 0.0017)),
        (by_source[2], (7.5, 17.5, 30)),
    ]:
        place, (row,), _ = drawn(svg)
        assert row == pytest.approx(tuple(map(place, values)), abs=0.002)


def test_all_sources_are_drawn_on_one_axis(tmp_path):
    text = write_report(save(tmp_path, *records())).read_text(encoding="utf-8")
    _, _, *by_source = re.findall(r'<svg class="intervals".*?</svg>', text)
    marks = [re.findall(r'class="mark">([^<]*)<', svg) for svg in by_source]
    assert marks[0] == marks[2] and marks[1] == marks[3]


@pytest.mark.parametrize(
    "values",
    [[], [0.0], [7.0], [-7.0], [1e-9, 3e-9], [-60.0, 62.5], [0.1, 0.2, 0.3], [-1e6, 4e5], [5.0, 10.0], [-0.05, 0.15]],
)
def test_an_axis_holds_all_values_and_zero_inside_in_few_round_steps(values):
    axis = even_scale(values, around_zero=True)
    marks = axis.marks
    slack = 1e-6 * axis.step
    assert axis.low < 0 < axis.high
    assert axis.low - slack <= min([0, *values]) and max([0, *values]) <= axis.high + slack
    assert 2 <= len(marks) <= 6 and marks[0] == pytest.approx(axis.low) and marks[-1] == pytest.approx(axis.high)
    assert any(abs(mark) < slack for mark in marks)
    assert f"{axis.step:.0e}"[0] in "125"


def test_a_filled_dot_means_that_the_interval_excludes_zero_in_picture_and_table(page):
    groups = [element["attrs"]["class"] for element in page.all("g")]
    dots = [element["text"] for element in page.all("span", "dot")][2:]  # after the two of the caption
    assert groups == ["clear", "open", "open", "clear", "clear", "open"]
    assert dots == ["●", "○", "○", "●", "●", "○"]


def test_a_bar_is_as_long_as_its_seconds():
    parts = ElementTree.fromstring(split_bar([("generate", 30.0, ""), ("score", 10.0, "")], "t", 80.0)).findall("rect")
    assert [(number(p.get("x")), number(p.get("width"))) for p in parts] == [(0, 37.5), (37.5, 12.5)]


def test_the_slowest_method_fills_the_width_of_its_cell_and_the_others_are_in_proportion(page):
    widths = [number(rect["attrs"]["width"]) for rect in page.all("rect")]
    assert widths == pytest.approx([100 * 12.3 / 61.25, 100], abs=0.001)


def test_the_cost_table_shows_seconds_and_a_rows_share(page):
    assert [line[:4] for line in page.table("Seconds by method")] == [
        ["Method", "Generate", "A row", "Score"],
        ["base control", "12.3", "2.05", "4.5"],
        ["elrea", "61.2", "10.21", "22.0"],
    ]


def rewrite(change):
    evaluation, rows = records()
    change(evaluation, rows)
    return evaluation, rows


def ungraded(evaluation, rows):
    for line in evaluation["table"]:
        line.update(graded=0, accuracy=None, accuracy_difference=None, accuracy_interval=None)
    for line in rows:
        for given in line["methods"].values():
            given["correct"] = None


def alone(evaluation, rows):
    evaluation.update(methods=["base"], table=evaluation["table"][:1], sources=["gsm8k"])
    for line in rows:
        del line["methods"]["elrea"]


def crowd(evaluation, rows):
    names = [f"an-expert-trained-on-a-data-set-with-a-very-long-name-{number}" for number in range(12)]
    sources = [f"subject-{number}" for number in range(57)]
    weights = dict.fromkeys(names, 1 / 12)
    evaluation.update(
        experts=names,
        sources=sources,
        routing=dict.fromkeys(sources, weights),
        clusters={name: dict.fromkeys(sources, 3) for name in names},
        table=evaluation["table"]
        + [line | {"source": s} for s in sources for line in (evaluation["table"][0], evaluation["table"][3])],
    )
    for line in rows:
        line["weights"] = weights


def unscored(evaluation, rows):
    evaluation.update(sources=[""], table=[evaluation["table"][0], evaluation["table"][3]])
    for line in evaluation["table"]:
        line.update(accuracy_difference=None, nll=None, nll_difference=None)


EMPTY = {
    "no clusters": lambda e, r: e.update(clusters={}, clustering={}),
    "no sections at all": lambda e, r: [
        e.pop(k) for k in ("clusters", "clustering", "routing", "seconds", "settings", "hardware")
    ],
    "nothing graded": ungraded,
    "one method": alone,
    "one source without a name": unscored,
    "many sources and experts": crowd,
    "no rows": lambda e, r: (r.clear(), e.update(rows=0, table=[])),
    "no answers": lambda e, r: [line.update(methods={}, weights={}) for line in r],
    "empty texts": lambda e, r: [g.update(text="", nll=None) for line in r for g in line["methods"].values()],
}


@pytest.mark.parametrize("case", EMPTY)
def test_an_incomplete_or_crowded_evaluation_gives_a_whole_page_with_all_its_sections(tmp_path, case):
    page = page_of(tmp_path, *rewrite(EMPTY[case]))
    clusters = [] if case in {"no clusters", "no sections at all"} else ["Clusters"]
    sections = ["Results", *clusters, "Routing", "Cost", "Examples"]
    assert [heading["text"] for heading in page.all("h2")] == sections == [link["text"] for link in page.all("a")]
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text())
    assert sum(len(line) > 0 for line in page.table("Results of all methods on all rows")) >= 2


def headline(tmp_path, **changes):
    evaluation, rows = records()
    evaluation["table"][3].update(changes)
    return page_of(tmp_path, evaluation, rows).all("p", "headline")[0]["text"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "elrea answers 46.2% of 40 graded rows right, 6.2 points more than base; the 95% interval"),
        ({}, "interval of the difference, +1.2 to +11.2 points, excludes zero: more than chance would explain."),
        ({"accuracy_interval": [-0.01, 0.1]}, "−1.0 to +10.0 points, includes zero: these rows cannot tell the two"),
        ({"accuracy_interval": [0.0, 0.1]}, "0.0 to +10.0 points, includes zero"),
        ({"accuracy_difference": -0.05, "accuracy_interval": [-0.09, -0.01]}, "5.0 points fewer than base"),
        ({"accuracy_difference": 0.0, "accuracy_interval": [-0.1, 0.1]}, "right, as many as base"),
        ({"accuracy_interval": None}, "no interval was recorded"),
        ({"accuracy_difference": None}, "elrea has a mean NLL of 0.765 nats a token on 50 rows, 0.0469 lower (better)"),
        ({"accuracy_difference": None, "nll_difference": None}, "1 method stands beside base on 6 rows"),
    ],
)  # fmt: skip
def test_the_headline_says_how_far_and_how_sure(tmp_path, changes, words):
    assert words in headline(tmp_path, **changes)


def test_the_headline_names_the_rival_that_was_chosen_and_what_to_use_instead(tmp_path):
    evaluation, rows = records()
    evaluation["control_among"] = ["base", "backbone"]
    evaluation["methods"].append("backbone")
    evaluation["table"][3] |= {"accuracy_difference": -0.1, "accuracy_interval": [-0.2, -0.01], "accuracy_p": 0.02}
    page = page_of(tmp_path, evaluation, rows)
    words = page.all("p", "headline")[0]["text"]
    assert "10.0 points fewer than base, the strongest of 2 simple rivals; the 95%" in words
    assert words.endswith("is 0.020: more than chance would explain. Use base instead of elrea.")
    assert "base, which did better on these rows than backbone" in page.text()
    assert "base was chosen because it did best on these rows among 2 simple rivals." in " ".join(page.text().split())


@pytest.mark.parametrize(
    ("entries", "title"),
    [
        ({"mixture": "/runs/elrea/"}, "elrea against base"),
        ({"routed": "uniform"}, "uniform against base"),
        ({"mixture": "mine"}, "3 methods, base as control"),
        ({"mixture": "mine", "methods": ["base", "elrea"]}, "elrea against base"),
    ],
)
def test_the_mixtures_own_method_is_the_recorded_one_or_its_folders_name_or_the_only_one(tmp_path, entries, title):
    evaluation, rows = records()
    page = page_of(tmp_path, evaluation | {"methods": ["base", "elrea", "uniform"]} | entries, rows)
    assert page.all("h1")[0]["text"] == title


def told(identifier, source, ours, theirs, texts=("a", "b")):
    answers = {"elrea": (texts[0], ours), "base": (texts[1], theirs)}
    methods = {name: MethodResult(text=text, correct=correct) for name, (text, correct) in answers.items()}
    return RowRecord(id=identifier, source=source, prompt="p", reference="r", methods=methods)


def test_examples_take_every_kind_in_turn_and_every_source_before_one_twice():
    rows = [told(f"right-{number}", "a", True, True) for number in range(90)]
    rows += [told(f"lost-{source}", source, False, True) for source in "aab"]
    rows += [told("won", "b", True, False), told("wrong", "c", False, False), told("open", "c", None, None)]
    chosen = choose(rows, "elrea", "base", most=7)
    assert [(kind, row.id) for kind, row in chosen] == [
        ("elrea right, base wrong", "won"),
        ("elrea wrong, base right", "lost-a"),
        ("elrea wrong, base right", "lost-b"),
        ("all right", "right-0"),
        ("all right", "right-1"),
        ("all wrong", "wrong"),
        ("not graded", "open"),
    ]


def test_examples_prefer_rows_whose_texts_differ_and_are_at_most_twelve():
    rows = [told(f"{number}", "a", True, True, ("same", "same")) for number in range(30)]
    rows.insert(20, told("differs", "a", True, True))
    chosen = [row.id for _, row in choose(rows, "elrea", "base")]
    assert chosen[0] == "differs" and len(chosen) == 12


def test_a_text_that_several_methods_wrote_stands_on_the_page_once(tmp_path):
    evaluation, rows = records()
    rows[2]["methods"] = {"base": answer("the very same", True), "elrea": answer("the very same", True)}
    page = page_of(tmp_path, evaluation, rows)
    assert page.text().count("the very same") == 1
    assert [" ".join(e["text"].split()) for e in page.all("p", "answer")].count(
        "✓ right base NLL 0.700, elrea NLL 0.700"
    ) == 1


@pytest.mark.parametrize(
    ("given", "aside"),
    [
        ({"extracted": "72"}, "read as 72"),
        ({"finish_reason": "length"}, "no answer found in it, cut off at the limit"),
        ({"correct": None, "finish_reason": "length"}, "cut off at the limit"),
        ({"correct": None, "text": None, "finish_reason": None}, None),
    ],
)
def test_what_was_read_from_a_text_and_whether_it_was_cut_off_stands_under_it(tmp_path, given, aside):
    evaluation, rows = records()
    rows[0]["methods"] = {"elrea": answer("text", True) | given}
    page = page_of(tmp_path, evaluation | {"rows": 1}, rows[:1])
    assert [element["text"] for element in page.all("p", "aside")] == ([aside] if aside else [])
    assert ("no text was generated" in page.text()) == ("text" in given)


def test_right_and_wrong_are_said_in_words_and_the_rows_of_each_kind_are_counted(page):
    verdicts = [element["text"] for element in page.all("span", "verdict")]
    assert sorted(verdicts) == sorted(["✓ right"] * 5 + ["✗ wrong"] * 5 + ["– not graded"] * 2)
    tally = [element["text"] for element in page.all("ul", "tally")][0].split("\n")
    assert [line for line in tally if line] == [
        "2 elrea right, base wrong",
        "1 elrea wrong, base right",
        "1 all right",
        "1 all wrong",
        "1 not graded",
    ]


def test_weights_are_named_written_and_drawn_in_proportion_and_many_small_ones_are_summed(tmp_path):
    evaluation, rows = records()
    rows[0]["weights"] = {"small": 0.01} | {f"e{number}": 0.03 for number in range(8)} | {"large": 0.75}
    page = page_of(tmp_path, evaluation, rows[:1] + rows[1:])
    first = page.all("ul", "weights")[0]["text"].split("\n")
    assert [line for line in first if line] == [
        "large 0.75",
        *(f"e{n} 0.03" for n in range(4)),
        "5 others together 0.13",
    ]
    widths = [element["attrs"]["style"] for element in page.all("span", "fill")][:2]
    assert widths == ["width:75.0%", "width:3.0%"]


def test_a_long_text_is_cut_and_says_how_much_is_left_out(tmp_path):
    evaluation, rows = records()
    rows[0]["prompt"] = "x" * 1500 + "y" * 1234
    texts = [element["text"] for element in page_of(tmp_path, evaluation, rows).all("div", "text")]
    assert "x" * 1500 + " … (1,234 more characters in rows.jsonl)" in texts


def test_the_page_has_a_language_headings_in_order_scoped_heads_and_named_pictures(page):
    assert page.all("html")[0]["attrs"]["lang"] == "en"
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch(r"h[1-6]", e["tag"])]
    assert levels.count(1) == 1 and levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    assert {head["attrs"].get("scope") for head in page.all("th")} == {"col", "row", "colgroup", "rowgroup"}
    assert not unnamed_pictures(page)
    assert (
        page.all("svg")[0]["attrs"]["aria-label"] == "Accuracy, points above base, all rows: elrea +6.2 (+1.2 to +11.2)"
    )


def test_every_table_of_numbers_scrolls_in_a_box_of_its_own(page):
    boxes = [element for element in page.all("div", "scroll")]
    assert len(boxes) == len(page.all("table")) and all("div" in table["inside"] for table in page.all("table"))
    assert all(box["attrs"]["tabindex"] == "0" and box["attrs"]["aria-label"] for box in boxes)


def test_the_same_records_give_the_same_bytes_and_nothing_else_is_left_in_the_folder(tmp_path):
    folders = [save(tmp_path / name, *records()) for name in ("one", "two")]
    first, second, again = (write_report(folder).read_bytes() for folder in (*folders, folders[0]))
    assert first == second == again
    assert sorted(path.name for path in folders[0].iterdir()) == ["evaluation.json", "report.html", "rows.jsonl"]


def test_records_that_broke_leave_the_earlier_report_as_it_was(tmp_path):
    before = write_report(save(tmp_path, *records())).read_bytes()
    (tmp_path / "rows.jsonl").write_text("{")
    with pytest.raises(CoterieError):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_missing_folder_or_file_is_named_with_the_command_that_makes_it(tmp_path):
    folder = tmp_path / "eval"
    for missing in ("evaluation.json", "rows.jsonl"):
        with pytest.raises(CoterieError) as caught:
            write_report(folder)
        command = f"coterie eval MIXTURE --data test.jsonl --output {folder}"
        assert str(caught.value) == f"{folder} holds no {missing}; make one with: {command}"
        save(folder, *records())
        (folder / "rows.jsonl").unlink()


WRONG = {
    "evaluation.json, 'format': should be less than or equal to 1, got 2": put(0, "format", value=2),
    "evaluation.json, 'format': should be a valid integer, got true": put(0, "format", value=True),
    "evaluation.json, 'methods' 1: should be a valid string, got 1": put(0, "methods", value=[1]),
    "evaluation.json, 'mixture': should be a valid string, got null": put(0, "mixture", value=None),
    "evaluation.json, 'table' 2, 'rows': should be a valid integer, got 1.5": put(0, "table", 1, "rows", value=1.5),
    "evaluation.json, 'table' 1, 'nll': should be a valid number, got true": put(0, "table", 0, "nll", value=True),
    "'table' 4, 'nll_interval': should be two numbers in order": put(0, "table", 3, "nll_interval", value=[2, 1]),
    "'table' 1: should be": put(0, "table", value=[3]),
    "'routing': should be a valid dictionary, got []": put(0, "routing", value=[]),
    "'clusters', 'cluster-0', 'a': should be greater than or equal": put(0, "clusters", "cluster-0", value={"a": -1}),
    "names 'other' as control, but not in 'methods'": put(0, "control", value="other"),
    "names 'other' in 'table', but not in 'methods'": put(0, "table", 0, "method", value="other"),
    "rows.jsonl holds 6 rows, evaluation.json tells of 7": put(0, "rows", value=7),
    "rows.jsonl, line 3, 'prompt': should be a valid string, got 5": put(1, 2, "prompt", value=5),
    "rows.jsonl, line 1, 'weights', 'base': should be a valid number": put(1, 0, "weights", "base", value="x"),
    "1, 'methods', 'elrea', 'correct': should be a valid boolean": put(1, 0, "methods", "elrea", "correct", value=1),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_field_is_named_with_its_place_in_one_line(tmp_path, message):
    parts = copy.deepcopy(records())
    WRONG[message](parts)
    with pytest.raises(CoterieError, match=re.escape(message)) as caught:
        write_report(save(tmp_path, *parts))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(f"--output {tmp_path}")


@pytest.mark.parametrize("broken", [b"{", b"[1]", b"\xff\xfe", b'{"id": "a"} trailing', b"[" * 100_000])
@pytest.mark.parametrize("name", ["evaluation.json", "rows.jsonl"])
def test_a_file_that_holds_no_json_objects_is_named(tmp_path, name, broken):
    save(tmp_path, *records())
    (tmp_path / name).write_bytes(broken)
    with pytest.raises(CoterieError, match=re.escape(f"{tmp_path / name}")):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "decimals", "words"),
    [(0.0, 1, "0.0"), (-0.04, 1, "0.0"), (0.04, 1, "0.0"), (-1.25, 1, "−1.2"), (3.0, 1, "+3.0"), (None, 1, "–")],
)
def test_a_difference_carries_its_sign_unless_it_rounds_to_zero(value, decimals, words):
    assert signed(value, decimals) == words
    assert fixed(value, decimals) == words.lstrip("+")


@pytest.mark.parametrize("length", [1, 26, 27, 90])
def test_a_shortened_name_keeps_its_start_and_its_end(length):
    name = "".join(chr(ord("a") + number % 26) for number in range(length))
    assert len(short(name)) == min(length, 26)
    assert short(name)[:12] == name[:12] and short(name)[-12:] == name[-12:]


def test_making_a_report_loads_no_model_library(tmp_path):
    save(tmp_path, *records())
    code = (
        "import sys; from pathlib import Path; from coterie.report import write_report;"
        "write_report(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
