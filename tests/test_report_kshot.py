"""The records of a mixture made from a few shots: who was selected, what was gathered, and where the gates lead."""

import copy
import json
import math
import re

import pytest

from coterie.errors import CoterieError
from coterie.methods.kshot.gather_rows import BY_EMBEDDING, BY_TEXT
from coterie.methods.kshot.gather_rows import SHOT as GATHERED_SHOT
from coterie.report import draw, write_report
from coterie.report.kshot import MARK_OF_OUTCOME
from helpers import put
from report_pages import HOSTILE, SHOWN, Page, drawings, number, page_of, records, save, unnamed_pictures

KINDS = ("mlp.down_proj", "self_attn.q_proj")


def adapter(name, accuracy, perplexity, ranks, **others):
    return {
        "name": name,
        "accuracy": accuracy,
        "perplexity": perplexity,
        "nll": None if perplexity is None else math.log(perplexity),
        "rank_accuracy": ranks and ranks[0],
        "rank_perplexity": ranks and ranks[1],
        "rank_sum": ranks and sum(ranks),
        "candidate": False,
        "chosen": False,
        "similarity": None,
        "leak": 0,
        "known_rows": None,
        "dropped": None,
    } | others


def selection():
    return {
        "settings": {"keep": 2},
        "shots": 20,
        "adapters": [
            adapter("poems", 0.25, 16.0, (3, 4), similarity=0.1),
            adapter("sums", 0.75, 2.0, (1, 1), candidate=True, chosen=True, similarity=0.5, known_rows=7473),
            adapter("knots", 0.5, 4.0, (2, 2), candidate=True, similarity=0.3, leak=3, known_rows=1200),
            adapter("maps", 0.25, 8.0, (3, 3), candidate=True, chosen=True, similarity=0.5),
            adapter("cheat", None, None, None, leak=12, known_rows=400, dropped="leak"),
            adapter("slow", 0.0, 32.0, (5, 5), dropped="halving"),
        ],
        "subsets": [
            {"names": ["sums", "maps"], "rank_sum": 8, "similarity": 0.125, "rank_diversity": 1, "score": 9},
            {"names": ["sums", "knots"], "rank_sum": 6, "similarity": 0.25, "rank_diversity": 4, "score": 10},
        ],
        "chosen": ["sums", "maps"],
        "halving": [
            {"shots": 5, "scored": 5, "kept": 4, "tau": 0.7123},
            {"shots": 20, "scored": 4, "kept": 4, "tau": None},
        ],
    }


def gathering():
    points = [("shot", 0.0, 0.0, None, "two and two"), ("shot", 1.0, 0.0, None, "")]
    points += [("chosen", 0.0, 1.0, 0.8125, "three and three"), ("beyond the budget", 1.0, 1.0, 0.2, "a poem")]
    points += [("too near to a chosen row", 0.5, 0.5, 0.75, "three + three")]
    return {
        "budget": 100,
        "rule": "max-cosine",
        "tau": 0.9,
        "encoder": "minilm",
        "rows": 5321,
        "fates": {
            "copy of another row": 11,
            "question of an example": 0,
            "too near to a chosen row": 210,
            "beyond the budget": 5000,
            "chosen": 100,
        },
        "pools": [
            {"pool": "flan.jsonl", "rows": 5000, "chosen": 93},
            {"pool": "dolly.jsonl", "rows": 321, "chosen": 7},
        ],
        "shots": [{"id": "0", "nearest_of_chosen": 100}, {"id": "1", "nearest_of_chosen": 0}],
        "excluded_rows": 7,
        "similarity_quantiles": {"levels": [0, 0.5, 1], "compared": [0.0, 0.31, 0.9], "chosen": [0.6, 0.72, 0.9]},
        "map": [
            {"x": x, "y": y, "fate": fate, "similarity": alike, "label": label} for fate, x, y, alike, label in points
        ],
    }


def gates():
    load = {"load": [0.5, 0.375, 0.125], "entropy": 0.9743}
    paths = [f"model.layers.{block}.{kind}" for block in (0, 1, 10, 2) for kind in KINDS]
    layers = [{"path": path, **load} for path in paths]
    layers[-1] |= {"load": [0.04, 0.95, 0.01], "entropy": 0.223}
    return {
        "experts": ["sums", "maps", "knots"],
        **load,
        "layers": layers,
        "steps": [
            {"step": 0, "load": [0.25, 0.25, 0.5], "entropy": 1.04},
            {"step": 100, "load": [0.5, 0.25, 0.25], "entropy": 1.02},
            {"step": 50, "load": [0.25, 0.25, 0.5], "entropy": 1.03},
        ],
    }


def full():
    evaluation, rows = records()
    return evaluation | {"selection": selection(), "gathering": gathering(), "gates": gates()}, rows


@pytest.fixture
def page(tmp_path):
    return page_of(tmp_path / "eval", *full())


@pytest.fixture
def text(tmp_path):
    return write_report(save(tmp_path / "text", *full())).read_text()


def drawing(text, kind):
    return drawings(text, kind)[0]


def links(page):
    return [element["attrs"]["href"] for element in page.all("a")]


@pytest.mark.parametrize("key", ["selection", "gathering", "gates"])
@pytest.mark.parametrize("value", ["missing", None])
def test_a_record_that_is_absent_has_no_section_and_the_others_keep_theirs(tmp_path, key, value):
    evaluation, rows = full()
    evaluation[key] = None
    if value == "missing":
        del evaluation[key]
    page = page_of(tmp_path, evaluation, rows)
    sections = [element["attrs"]["id"] for element in page.all("section")]
    wanted = [name for name in ("selection", "gathering", "gates") if name != key]
    assert [name for name in sections if name in ("selection", "gathering", "gates")] == wanted
    assert f"#{key}" not in links(page) and {f"#{name}" for name in wanted} < set(links(page))


def test_hostile_names_in_all_three_records_add_no_tag_and_are_shown_as_they_are(tmp_path, page):
    told, hostile = json.dumps(full()), json.dumps(HOSTILE)[1:-1]
    names = ("poems", "knots", "cheat", "flan", "minilm", "a poem", "two and two", "down_proj")
    for name in names:
        told = told.replace(name, name + hostile)
    told = told.replace('"halving", "', f'"halving{hostile}", "').replace('"copy of', f'"copy{hostile} of')
    attacked = page_of(tmp_path / "attacked", *json.loads(told))
    assert [element["tag"] for element in attacked.elements] == [element["tag"] for element in page.elements]
    assert not [name for element in attacked.elements for name in element["attrs"] if name.startswith("on")]
    for name in ("poems", "knots", "cheat", "flan", "minilm", "a poem", "two and two", "down_proj", "copy"):
        assert name + SHOWN in attacked.text()


def test_every_new_picture_says_in_words_what_it_shows_and_the_same_records_give_the_same_bytes(tmp_path, page, text):
    assert not unnamed_pictures(page)
    assert write_report(save(tmp_path / "again", *full())).read_text() == text


# -------------------------------------------------------------------------------------------------------- selection


def test_every_scored_adapter_is_drawn_at_its_accuracy_and_log_perplexity_with_its_number_of_the_table(text):
    picture = drawing(text, "plot scatter")
    assert picture.get("aria-label") == (
        "Accuracy on the shots in % against perplexity of the reasoning: "
        "1 sums 75.0 at 2.00, chosen, similarity 0.500; "
        "2 knots 50.0 at 4.00, candidate, similarity 0.300; "
        "3 maps 25.0 at 8.00, chosen, similarity 0.500; "
        "4 poems 25.0 at 16.00, not a candidate, similarity 0.100; "
        "5 slow 0.0 at 32.00, left out by halving"
    )
    points = picture.findall("svg")
    assert [point.find("text").text for point in points] == ["1", "2", "3", "4", "5"]
    x, y = [number(point.get("x")) for point in points], [float(point.get("y")) for point in points]
    assert [after - before for before, after in zip(x, x[1:], strict=False)] == pytest.approx(
        [x[1] - x[0]] * 4, abs=0.01
    )
    assert x[1] > x[0] and y[2] == y[3] and y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.2) and y[1] > y[0]


def test_marks_tell_chosen_candidates_the_rest_and_left_out_ones_apart_and_grow_with_similarity(page, text):
    paths = [point.find("path") for point in drawing(text, "plot scatter").findall("svg")]
    kinds = [f"shape k{mark}" for mark in (draw.DIAMOND, draw.DISC, draw.DIAMOND, draw.CIRCLE, draw.CROSS)]
    assert [path.get("class") for path in paths] == kinds
    scales = [float(path.get("transform")[6:-1]) / 1.6 for path in paths]
    assert scales == pytest.approx([1.5, 1.1, 1.5, 0.7, 1.0], abs=0.01)
    assert "the smallest stands for a similarity of 0.10, the largest for 0.50." in page.text()
    key = [" ".join(e["text"].split()) for e in page.all("li") if e["inside"][-2:] == ["figure", "ul"]]
    assert key[:4] == ["chosen 2", "candidate 1", "not a candidate 1", "left out 2"]


def test_adapters_are_listed_best_first_with_their_ranks_leaks_and_outcomes(page):
    head, *lines = page.table("Adapters of the bank")
    assert head[:2] == ["Adapter", "Outcome"]
    assert [line[:2] for line in lines] == [
        ["1 sums", "chosen"],
        ["2 knots", "candidate"],
        ["3 maps", "chosen"],
        ["4 poems", "not a candidate"],
        ["5 slow", "left out by halving"],
        ["6 cheat", "left out: leak"],
    ]
    assert lines[0][2:] == ["75.0% 1", "2.00 1", "2", "0.500", "7,473 0"]
    assert lines[1][2:] == ["50.0% 2", "4.00 2", "4", "0.300", "1,200 3"]
    assert lines[2][-1] == "not known –"
    assert lines[5][2:] == ["– –", "– –", "–", "–", "400 12"]
    (warning,) = page.all("p", "warning")
    assert warning["text"].endswith("judged by: knots (3 rows) and cheat (12 rows).")


def test_groups_and_halving_are_told(page):
    assert page.table("Best groups of candidates")[1:] == [
        ["sums, maps", "8", "0.125", "1", "9"],
        ["sums, knots", "6", "0.250", "4", "10"],
    ]
    told = "5 adapters on 5 shots, 4 kept (rank agreement τ 0.71); 4 adapters on 20 shots, 4 kept."
    assert f"Successive halving: {told}" in page.text()


def test_the_chosen_adapters_and_their_group_are_set_off_wherever_they_stand(tmp_path):
    evaluation, rows = full()
    evaluation["selection"]["subsets"].reverse()
    evaluation["selection"]["chosen"].reverse()
    lines = [" ".join(e["text"].split()) for e in page_of(tmp_path, evaluation, rows).all("tr", "subject")]
    lines = [line for line in lines if "elrea" not in line]
    starts = ("1 sums chosen", "3 maps chosen", "sums, maps")
    assert len(lines) == 3 and all(map(str.startswith, lines, starts))


def test_a_selection_without_scores_or_similarities_or_rounds_is_a_table_alone(tmp_path):
    evaluation, rows = records()
    adapters = [adapter("a", None, None, None), adapter("b", 0.5, None, None)]
    evaluation["selection"] = {"settings": {}, "shots": 1, "adapters": adapters, "chosen": []}
    page = page_of(tmp_path, evaluation, rows)
    assert [line[0] for line in page.table("Adapters of the bank")[1:]] == ["1 a", "2 b"]
    assert not [e for e in page.all("figure", "selection")] and not page.all("p", "warning")
    assert "tried on 1 shot." in page.text() and "halving" not in page.text()


def test_of_many_adapters_the_table_is_folded_and_only_the_candidates_carry_a_number(tmp_path):
    evaluation, rows = records()
    adapters = [
        adapter(f"a{n}", n / 50, 1 + n / 10, (40 - n, n + 1), candidate=n > 36, chosen=n > 38) for n in range(40)
    ]
    evaluation["selection"] = selection() | {"adapters": adapters}
    text = write_report(save(tmp_path, evaluation, rows)).read_text()
    points = drawing(text, "plot scatter").findall("svg")
    assert len(points) == 40
    shown = [e.text for e in drawing(text, "plot scatter").iter("text") if "number" in e.get("class", "")]
    (head,) = [e for e in Page(text).all("caption") if e["text"] == "Adapters of the bank"]
    assert shown == ["32, 33, 34"] and "details" in head["inside"]
    folded = [e["attrs"] for e in Page(text).all("details") if "Table of 40 adapters" in e["text"]]
    assert folded == [{}]


# -------------------------------------------------------------------------------------------------------- gathering


def test_every_point_of_the_pool_is_drawn_where_it_lies_with_its_outcome_and_text(text):
    picture = drawing(text, "map")
    found = {}
    for path in picture.findall("path"):
        ((x, y),) = re.findall(r"M([\d.]+) ([\d.]+)", path.get("d"))
        found.setdefault(path.get("class"), []).append((float(x), float(y), path.find("title").text))
    assert found == {
        f"shape k{draw.STAR}": [(8, 412, "shot: two and two"), (412, 412, "shot")],
        f"shape k{draw.DISC}": [(8, 8, "chosen, similarity 0.812: three and three")],
        f"shape k{draw.CIRCLE}": [(210, 210, "too near to a chosen row, similarity 0.750: three + three")],
        f"shape k{draw.SHARED}": [(412, 8, "beyond the budget, similarity 0.200: a poem")],
    }
    words = "shot 2; chosen 1; beyond the budget 1; too near to a chosen row 1"
    assert picture.get("aria-label") == f"Map of the pool: {words}"


def test_all_outcomes_are_counted_beside_the_map_and_those_that_met_no_row_are_left_out(page):
    assert page.table("What became of the rows")[1:] == [
        ["shot", "2", "2"],
        ["chosen", "100", "1"],
        ["copy of another row", "11", "–"],
        ["too near to a chosen row", "210", "1"],
        ["beyond the budget", "5,000", "1"],
    ]
    symbols = [e["attrs"]["class"] for e in page.all("path", "shape") if "th" in e["inside"]]
    assert symbols == [f"shape k{mark}" for mark in (draw.STAR, draw.DISC, draw.CIRCLE, draw.SHARED)]
    assert page.table("Sources of the pool")[1:] == [["flan.jsonl", "5,000", "93"], ["dolly.jsonl", "321", "7"]]
    told = page.text()
    assert "What became of 5,321 rows of open data." in told
    assert "The median similarity of the chosen rows to the shots is 0.72, that of all compared rows 0.31." in told
    assert "Of 2 shots, 1 is the nearest to at least one chosen row." in told
    (facts,) = [e["text"] for e in page.all("p", "remark") if "budget" in e["text"]]
    assert facts == "budget 100, rule max-cosine, tau 0.9, encoder minilm"


def test_the_outcomes_that_gathering_writes_have_marks_of_their_own():
    compared = {GATHERED_SHOT, *BY_EMBEDDING.values()}
    assert set(MARK_OF_OUTCOME) == compared and not compared & set(BY_TEXT.values())
    assert len(set(MARK_OF_OUTCOME.values())) == len(compared)


def test_a_gathering_without_a_map_is_told_in_numbers(tmp_path):
    evaluation, rows = records()
    evaluation["gathering"] = {"rows": 3, "fates": {"chosen": 3}}
    page = page_of(tmp_path, evaluation, rows)
    assert page.table("What became of the rows")[1:] == [["chosen", "3", "–"]]
    assert not page.all("svg", "map") and not re.search(r"\b(None|nan)\b", page.text())


# ------------------------------------------------------------------------------------------------------------ gates


def test_the_mean_load_is_a_bar_and_every_expert_has_a_number(page):
    (bar,) = [e for e in page.all("svg", "bar") if "Mean load" in e["attrs"]["aria-label"]]
    assert bar["attrs"]["aria-label"] == "Mean load: sums 50.0%, maps 37.5%, knots 12.5%"
    (key, *_) = [" ".join(e["text"].split()) for e in page.all("ul", "parts")]
    assert key == "1 sums 50.0% 2 maps 37.5% 3 knots 12.5%"
    assert (
        "The mean entropy of the gates is 0.97 nats; it would be 1.10 where all share every token evenly."
        in page.text()
    )


def test_entropy_is_held_to_the_experts_that_take_part(tmp_path):
    evaluation, rows = full()
    evaluation["gates"]["top_k"] = 2
    told = page_of(tmp_path, evaluation, rows).text()
    assert "it would be 0.69 where the 2 that take part share every token evenly." in told


def test_layers_stand_by_block_and_kind_with_blocks_in_the_order_of_their_numbers(text):
    picture = drawing(text, "grid-of-bars")
    names = [(e.get("class"), e.text) for e in picture.findall("text")]
    assert names == [("mark", "down"), ("mark", "q"), *(("right", block) for block in ("0", "1", "2", "10"))]
    cells = {}
    for cell in picture.findall("g"):
        parts = [e for e in cell.findall("rect") if "part" in e.get("class")]
        cells[cell.find("title").text.split(":")[0]] = [(e.get("class"), float(e.get("y")), e) for e in parts]
    assert list(cells)[4:6] == ["model.layers.2.mlp.down_proj", "model.layers.2.self_attn.q_proj"]
    heights = [cells[f"model.layers.{block}.{kind}"][0][1] for block in (0, 1, 2, 10) for kind in KINDS]
    assert heights == [22, 22, 37, 37, 52, 52, 67, 67]
    for parts in cells.values():
        assert [kind for kind, *_ in parts] == ["part k0", "part k1", "part k2"]
        start, width = ([number(e.get(name)) for *_, e in parts] for name in ("x", "width"))
        assert start[1:] == pytest.approx([start[0] + width[0], start[0] + width[0] + width[1]], abs=0.01)
    widths = [number(e.get("width")) for *_, e in cells["model.layers.0.mlp.down_proj"]]
    assert [width / sum(widths) for width in widths] == pytest.approx([0.5, 0.375, 0.125], abs=1e-3)


def test_a_layer_that_one_expert_fills_is_framed_told_and_in_the_table_with_its_entropy(page, text):
    (framed,) = drawing(text, "grid-of-bars").findall("g[@class='framed']")
    words = "model.layers.2.self_attn.q_proj: sums 4.0%, maps 95.0%, knots 1.0%, entropy 0.22"
    assert framed.find("title").text == words and len(framed.findall("rect[@class='frame']")) == 1
    assert "In 1 of 8 layers one expert carries more than 90%." in page.text()
    head, *lines = page.table("Load of the gates by layer and expert")
    assert head == ["Layer", "Entropy", "sums", "maps", "knots"]
    assert lines[5] == ["model.layers.2.self_attn.q_proj", "0.22", "4.0%", "95.0%", "1.0%"]


def test_layers_whose_short_names_would_be_alike_keep_their_long_ones(tmp_path):
    evaluation, rows = full()
    for layer, path in zip(evaluation["gates"]["layers"], ("a.0.x.q", "b.0.x.q", "a.0.y.q", "head"), strict=False):
        layer["path"] = path
    del evaluation["gates"]["layers"][4:]
    picture = drawing(write_report(save(tmp_path, evaluation, rows)).read_text(), "grid-of-bars")
    names = [(e.get("class"), e.text) for e in picture.findall("text")]
    assert [name for kind, name in names if kind == "mark"] == ["head", "x.q", "y.q"]
    assert [name for kind, name in names if kind == "right"] == [None, "a.0", "b.0"]


@pytest.mark.parametrize(("largest", "warned"), [(0.9, False), (0.91, True), (1.0, True)])
def test_only_a_mean_load_above_ninety_per_cent_is_warned_of(tmp_path, largest, warned):
    evaluation, rows = full()
    del evaluation["selection"]
    evaluation["gates"]["load"] = [0.0, 1 - largest, largest]
    found = [" ".join(e["text"].split()) for e in page_of(tmp_path, evaluation, rows).all("p", "warning")]
    told = f"The gates have collapsed. knots carries {100 * largest:.1f}% of the load: next to it, the other"
    assert len(found) == warned and all(one.startswith(told) for one in found)


def test_loads_that_do_not_sum_to_one_are_shown_as_shares(tmp_path, page):
    evaluation, rows = full()
    for load in (evaluation["gates"], *evaluation["gates"]["layers"], *evaluation["gates"]["steps"]):
        load["load"] = [2 * value for value in load["load"]]
    doubled = page_of(tmp_path, evaluation, rows)
    assert doubled.text() == page.text()


def test_loads_over_training_are_lines_in_the_order_of_the_steps_with_numbers_at_their_ends(page, text):
    picture = drawing(text, "plot lines")
    assert picture.get("aria-label") == (
        "Load over the steps of training: sums from 25.0% to 50.0%; maps from 25.0% to 25.0%; knots from 50.0% to 25.0%"
    )
    lines = [(path.get("class"), path.get("d")) for path in picture.findall("svg/path")]
    assert lines == [
        ("line k0", "M0 750 500 750 1000 500"),
        ("line k1", "M0 750 500 750 1000 750"),
        ("line k2", "M0 500 500 500 1000 750"),
    ]
    ends = {e.text: float(e.get("y")) for e in picture.findall("text") if e.get("class").startswith("end")}
    assert ends["1"] < ends["2"] and ends["3"] - ends["2"] == pytest.approx(12, abs=0.1)
    assert "The mean entropy went from 1.04 at step 0 to 1.02 at step 100." in page.text()


@pytest.mark.parametrize("steps", [[], [0], [7, 7]])
def test_fewer_than_two_steps_make_no_lines(tmp_path, steps):
    evaluation, rows = full()
    evaluation["gates"]["steps"] = [{"step": step, "load": [1, 1, 1], "entropy": None} for step in steps]
    page = page_of(tmp_path, evaluation, rows)
    assert not page.all("svg", "lines") and "While training" not in page.text() and page.all("svg", "grid-of-bars")


def test_of_very_many_steps_an_even_part_with_both_ends_is_drawn(tmp_path):
    evaluation, rows = full()
    evaluation["gates"]["steps"] = [
        {"step": step, "load": [step + 1, 5000 - step, 0], "entropy": None} for step in range(5000)
    ]
    picture = drawing(write_report(save(tmp_path, evaluation, rows)).read_text(), "plot lines")
    ways = [path.get("d")[1:].split(" ") for path in picture.findall("svg/path")]
    assert [len(way) for way in ways] == [800] * 3
    assert (ways[0][0], ways[0][-2:], ways[1][-1]) == ("0", ["1000", "0"], "1000")


# ------------------------------------------------------------------------------------------------------- errors


WRONG = {
    "'selection', 'shots': should be": put("selection", "shots", value="x"),
    "'selection', 'adapters': should be a valid tuple": put("selection", "adapters", value={}),
    "'selection', 'adapters' 2, 'accuracy': should be a valid": put("selection", "adapters", 1, "accuracy", value="x"),
    "'selection', 'adapters' 1, 'chosen': should be a valid": put("selection", "adapters", 0, "chosen", value=1),
    "'selection', 'adapters' 1, 'leak': should be": put("selection", "adapters", 0, "leak", value=-1),
    "'selection', 'subsets' 1, 'names': should be": put("selection", "subsets", 0, "names", value="x"),
    "'selection', 'halving' 1, 'kept': should be": put("selection", "halving", 0, "kept", value=0.5),
    "'gathering', 'rows': should be a valid integer": put("gathering", "rows", value=None),
    "'gathering', 'fates', 'chosen': should be a valid number": put("gathering", "fates", value={"chosen": "x"}),
    "'gathering', 'pools' 1, 'chosen': should be": put("gathering", "pools", 0, "chosen", value="x"),
    "'gathering', 'map' 3, 'x': should be a valid number": put("gathering", "map", 2, "x", value=None),
    "'gathering', 'map' 3, 'fate': should be a valid string": put("gathering", "map", 2, "fate", value=3),
    "'gates': 'experts' should be a list of names": put("gates", "experts", value=[]),
    "'gates': 'load' should be 3 numbers that are not": put("gates", "load", value=[0.5, 0.5]),
    "'gates', 'layers' 1, 'load' 3: should be greater than": put("gates", "layers", 0, "load", value=[1, 0, -1]),
    "'gates': 'layers' 2, 'load' should be 3 numbers that are not": put("gates", "layers", 1, "load", value=[0, 0, 0]),
    "'gates', 'steps' 1, 'step': should be a valid integer": put("gates", "steps", 0, "step", value=None),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_field_is_named_with_its_place(tmp_path, message):
    evaluation, rows = copy.deepcopy(full())
    WRONG[message](evaluation)
    with pytest.raises(CoterieError, match=re.escape(message)):
        write_report(save(tmp_path, evaluation, rows))
