"""The optional records of an evaluation: each is shown where it is there, and missed by nobody where it is not."""

import copy
import json
import re

import pytest

from coterie.errors import CoterieError
from coterie.report import write_report
from helpers import put
from report_pages import HOSTILE, SHOWN, Page, drawings, number, page_of, records, save, score, unnamed_pictures

VARIANTS = {"elrea:top_k=1": 0.42, "elrea:top_k=2": 0.44, "elrea:d_proj=64": 0.41, "elrea:d_proj=512": 0.45}


def full():
    """The small evaluation with every optional record."""
    evaluation, rows = records()
    evaluation["methods"] += ["oracle", *VARIANTS]
    evaluation["table"].append(score("oracle", "all", 0.6, 0.2, [0.1, 0.3], 0.6, -0.2, [-0.3, -0.1]))
    evaluation["table"] += [
        score(m, "all", a, a - 0.4, [a - 0.45, a - 0.35], 0.8, -0.01, [-0.02, 0.01]) for m, a in VARIANTS.items()
    ]
    evaluation["table"][3] |= {"accuracy_p": 0.0312, "nll_p": 0.0004, "f1": 0.512, "oracle_share": 0.3125}
    evaluation["table"][3] |= {"oracle_share_interval": [-0.05, 1.2]}
    evaluation["seconds"]["elrea"]["train"] = 321.5
    evaluation["seconds"]["oracle"] = {"generate": 120.0}
    evaluation |= {
        "routed": "elrea",
        "memory": {"base": 3e8, "elrea": 6e8, "oracle": None},
        "merge_error": {"elrea": 0.0831},
        "composition": {
            "cluster-0": {"gsm8k / algebra": 30, "gsm8k / sums": 60, "math / geometry": 10},
            "cluster-1": {f"math / topic {n}": 20 - n for n in range(8)} | {"gsm8k / sums": 0},
        },
        "routing_by_category": {"gsm8k / algebra": {"base": 0.25, "cluster-0": 0.75}},
        "unfamiliar_routing": {"elrea": {"base": 0.25, "cluster-0": 0.75}, "uniform-weights": {"cluster-1": 0.5}},
        "choice": {
            **{"chosen": "base", "combiner": "layers", "rows": 40, "trained_tokens": 900},
            "candidates": [{"name": "base", "cost": 1.0, "nll": 1.25, "difference": 0.0, "p": 1.0}],
        },
        "features": {"d_proj": 8192, "kind": "gradient"},
        "map": {
            "kind": "t-SNE",
            "points": [place(n, ("gsm8k", "math")[n % 2], [n % 3, (n + 1) % 3]) for n in range(30)],
            "seeds": [0, 7],
            "stability": 0.8312,
            "agreement": [0.71, None],
        },
        "notes": ["The test is small."],
    }
    for row in rows:
        row["expert_nll"] = {"base": 0.9, "cluster-0": 0.7, "cluster-1": 0.5}
        row["methods"]["elrea"] |= {"nll": None, "tokens": 0, "f1": 0.5}
    return evaluation, rows


def place(number, source, clusters):
    return {"x": number % 7, "y": number // 7, "source": source, "category": None, "clusters": clusters}


@pytest.fixture
def page(tmp_path):
    return page_of(tmp_path / "eval", *full())


def headings(page):
    return [element["text"] for element in page.all("h3")]


NEW = [
    "How the mixture was chosen",
    "Limits of this evaluation",
    "Unfamiliar prompts",
    "Variants",
    "What each cluster is made of",
    "Map of the training rows",
]


def test_old_records_make_a_page_without_the_new_sections_and_columns(tmp_path, page):
    old = page_of(tmp_path / "old", *records())
    assert set(NEW) < set(headings(page)) and not set(NEW) & set(headings(old))
    for words in ("p, adjusted", "oracle", "F1", "Training is what", "Memory", "Frobenius", "by category", "the best"):
        assert words in page.text() and words not in old.text()


@pytest.mark.parametrize(
    "field",
    [
        "memory",
        "merge_error",
        "composition",
        "routing_by_category",
        "unfamiliar_routing",
        "features",
        "map",
        "notes",
        "seconds",
    ],
)
@pytest.mark.parametrize("value", ["missing", None, "empty"])
def test_every_optional_record_may_be_missing_null_or_empty_by_itself(tmp_path, field, value):
    evaluation, rows = full()
    evaluation[field] = type(evaluation[field])() if value == "empty" and field not in ("map", "choice") else None
    if value == "missing":
        del evaluation[field]
    page = page_of(tmp_path, evaluation, rows)
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text())
    assert len(page.table("Results of all methods on all rows")) == 9


def test_hostile_names_in_every_optional_record_add_no_tag_and_are_shown_as_they_are(tmp_path, page):
    text, hostile = json.dumps(full()), json.dumps(HOSTILE)[1:-1]
    text = text.replace('"oracle"', f'"oracle{hostile}"')
    for name in ("elrea", "gsm8k", "math", "algebra", "sums", "topic", "cluster-0", "t-SNE", "small"):
        text = text.replace(name, name + hostile)
    attacked = page_of(tmp_path / "attacked", *json.loads(text))
    assert [element["tag"] for element in attacked.elements] == [element["tag"] for element in page.elements]
    assert not [name for element in attacked.elements for name in element["attrs"] if name.startswith("on")]
    for name in ("elrea", "gsm8k", "algebra", "cluster-0", "t-SNE", "small"):
        assert name + SHOWN in attacked.text()


def test_every_picture_of_the_full_page_says_in_words_what_it_shows(page):
    assert len(page.all("svg")) > 12 and not unnamed_pictures(page)
    assert "script" not in [element["tag"] for element in page.elements]


def test_the_table_shows_adjusted_p_f1_and_the_share_of_the_oracle_gap(page):
    head, under, base, elrea, *_ = page.table("Results of all methods on all rows")
    assert head[-2:] == ["F1", "Share of the oracle gap"] and under.count("Adjusted p") == 2
    assert base[2:] == ["40.0%", "–", "–", "0.812", "–", "–", "–", "–"]
    assert elrea[2:5] == ["46.2%", "+6.2 ● +1.2 to +11.2", "0.031"]
    assert elrea[5:] == ["0.765", "−0.0469 ● −0.0912 to +0.0017", "<0.001", "51.2%", "31% −5 to 120%"]
    widths = {sum(int(cell) for cell in row) for row in spans(page)}
    assert widths == {10}


def spans(page):
    """The columns that each cell of the table by source spans, line by line."""
    lines, inside = [], False
    for element in page.elements:
        if element["tag"] == "caption":
            inside = element["text"] == "Results of all methods by source"
        elif inside and element["tag"] == "tr":
            lines.append([])
        elif inside and element["tag"] in {"th", "td"}:
            lines[-1].append(element["attrs"].get("colspan", 1))
    return lines[2:]  # the two lines of the head share their cells


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "excludes zero, and p, adjusted for all comparisons, is 0.031: more than chance would explain."),
        ({"accuracy_p": 0.0002}, "and p, adjusted for all comparisons, is below 0.001: more than chance"),
        ({"accuracy_p": 0.05}, "excludes zero, but p, adjusted for all comparisons, is 0.050: these rows cannot tell"),
        ({"accuracy_interval": [-0.1, 0.2], "accuracy_p": 0.4}, "includes zero, and p, adjusted for all"),
        ({"accuracy_interval": [-0.1, 0.2]}, "includes zero, but p, adjusted for all comparisons, is 0.031: more than"),
        ({"accuracy_interval": None}, "than base; p, adjusted for all comparisons, is 0.031: more than chance"),
        ({"accuracy_p": None}, "excludes zero: more than chance would explain."),
    ],
)  # fmt: skip
def test_the_headline_goes_by_the_adjusted_p_where_there_is_one(tmp_path, changes, words):
    evaluation, rows = full()
    evaluation["table"][3].update(changes)
    assert words in page_of(tmp_path, evaluation, rows).all("p", "headline")[0]["text"]


def test_the_methods_that_differ_significantly_are_named(tmp_path, page):
    assert "In accuracy, 1 of 1 method differs significantly: elrea. In NLL, 1 of 1 method differs" in page.text()
    evaluation, rows = full()
    evaluation["table"][3]["accuracy_p"] = 0.2
    for line, p in zip(evaluation["table"][6:9], (0.0, 0.01, 0.9), strict=True):
        line["nll_p"] = p
    text = page_of(tmp_path, evaluation, rows).text()
    assert "In accuracy, none of 1 method differs significantly." in text
    assert "In NLL, 3 of 4 methods differ significantly: elrea, oracle and elrea:top_k=1." in text


def test_merge_errors_and_notes_are_told(page):
    assert "The merge of elrea is approximate: its relative Frobenius error is 0.0831." in page.text()
    assert [item["text"] for item in page.all("li")].count("The test is small.") == 1


def test_the_cost_table_shows_training_and_memory(page):
    head, *lines = page.table("Seconds by method")
    assert head[:6] == ["Method", "Train", "Generate", "A row", "Memory, GB", "Score"]
    assert lines[1][:6] == ["elrea", "321.5", "61.2", "10.21", "0.60", "22.0"]
    assert lines[2][:6] == ["oracle", "–", "120.0", "20.00", "–", "–"]


def test_what_methods_share_is_shown_as_shared_and_as_no_time_of_theirs(tmp_path):
    evaluation, rows = full()
    for stages in evaluation["seconds"].values():
        stages.pop("score", None)
    evaluation["shared_seconds"] = [{"stage": "score", "methods": ["base", "oracle"], "seconds": 31.25}]
    evaluation["answer_tokens"] = {"base": 41.25, "elrea": 12.0}
    page = page_of(tmp_path, evaluation, rows)
    head, *lines = page.table("Seconds by method")
    assert head[4:7] == ["Tokens a row", "Memory, GB", "Score"]
    assert [(line[0], line[4], line[6]) for line in lines] == [
        ("base control", "41.2", "shared"),
        ("elrea", "12.0", "–"),
        ("oracle", "–", "shared"),
    ]
    assert "Scoring was shared by 2 methods: one pass over the rows, 31.2 seconds for all of them" in page.text()


def test_without_answers_the_bars_are_of_scoring(tmp_path):
    evaluation, rows = full()
    evaluation["seconds"] = {"base": {"score": 4.5}, "elrea": {"score": 9.0}}
    page = page_of(tmp_path, evaluation, rows)
    assert page.table("Seconds by method")[0][-1] == "Score, drawn"
    assert [line[2] for line in page.table("Seconds by method")[1:]] == ["0.75", "1.50"]


def test_memory_without_seconds_has_dashes_for_the_seconds(tmp_path):
    evaluation, rows = full()
    evaluation["seconds"] = {}
    assert page_of(tmp_path, evaluation, rows).table("Seconds by method")[2][1:6] == ["–", "–", "0.60", "–", ""]


def pictures(page, kind):
    return [element["attrs"]["aria-label"] for element in page.all("svg", kind)]


def test_cost_is_drawn_against_quality_with_control_and_subject_marked_and_variants_left_out(page):
    time, memory = pictures(page, "scatter")
    assert time == (
        "Accuracy in % against seconds to answer a row: 1 base 40 at 2.05; 2 elrea 46.2 at 10.2; 3 oracle 60 at 20"
    )
    assert memory == "Accuracy in % against memory in GB: 1 base 40 at 0.3; 2 elrea 46.2 at 0.6"
    names = [" ".join(item["text"].split()) for item in page.all("li") if "ol" in item["inside"]]
    assert names == ["1 base", "2 elrea", "3 oracle"]
    shapes = [e["attrs"]["class"] for e in page.all("path", "shape") if "ol" in e["inside"]]
    assert shapes == ["shape k2", "shape k3", "shape k8"]


def test_without_accuracy_quality_is_nll_with_the_low_values_on_top(tmp_path):
    evaluation, rows = full()
    for line in evaluation["table"]:
        line["accuracy"] = None
    time, _ = drawings(write_report(save(tmp_path, evaluation, rows)).read_text(), "plot scatter")
    assert "NLL in nats a token against seconds" in time.get("aria-label")
    base, elrea, oracle = (float(point.get("y")) for point in time.findall("svg"))
    assert oracle < elrea < base


def curves(folder, evaluation, rows):
    return drawings(write_report(save(folder, evaluation, rows)).read_text(), "plot curve")


def test_variants_are_drawn_over_their_number_with_the_plain_method_at_its_own(tmp_path):
    accuracy, nll, projected, _ = curves(tmp_path, *full())
    assert accuracy.get("aria-label") == (
        "Accuracy in % over top_k, base at 40.0: elrea:top_k=1 42.0 (difference −3.0 to +7.0); "
        "elrea:top_k=2 44.0 (difference −1.0 to +9.0); elrea 46.2 (difference +1.2 to +11.2)"
    )
    labels = [text.text for text in accuracy.findall("text[@class='mark']")]
    assert labels == ["all", "2", "1"]
    assert [t.text for t in projected.findall("text[@class='mark']")] == ["8,192", "512", "64"]
    places = [number(point.get("x")) for point in projected.findall("svg")]
    assert (places[1] - places[0]) / (places[2] - places[0]) == pytest.approx(3 / 7, abs=1e-3)  # log2: 6, 9, 13
    low_is_high = [float(point.get("y")) for point in nll.findall("svg")]
    assert low_is_high[2] < low_is_high[0] == low_is_high[1]  # an NLL of 0.7654 beside two of 0.8
    assert nll.get("aria-label").startswith("NLL in nats a token over top_k, base at 0.812: ")


def test_a_whisker_is_the_differences_interval_laid_on_the_controls_line(tmp_path):
    accuracy, *_ = curves(tmp_path, *full())
    (level,) = accuracy.findall("line[@class='level']")
    ends = [(float(line.get("y1")), float(line.get("y2"))) for line in accuracy.findall("line[@class='whisker']")]
    crosses = [high <= float(level.get("y1")) <= low for low, high in ends]
    assert crosses == [True, True, False]


@pytest.mark.parametrize("name", ["elrea:seed=x", "elrea:top_k=1,d_proj=64", "elrea:top_k=nan", "elrea:top_k"])
def test_a_variant_without_one_number_is_in_the_table_but_in_no_curve(tmp_path, name):
    evaluation, rows = records()
    evaluation["methods"].append(name)
    evaluation["table"].append(score(name, "all", 0.4))
    page = page_of(tmp_path, evaluation, rows)
    assert "Variants" not in headings(page)
    assert page.table("Results of all methods on all rows")[4][0] == name


def test_a_clusters_parts_are_named_by_size_and_the_small_ones_counted(page):
    lists = [" ".join(part["text"].split()) for part in page.all("ul", "parts")]
    assert lists[0] == "1 gsm8k / sums 60% 2 gsm8k / algebra 30% 3 math / geometry 10%"
    assert lists[1].startswith("1 math / topic 0 15% 2 math / topic 1 14%") and lists[1].endswith("… 3 more 32%")
    bars = [element for element in page.all("rect", "part")]
    assert [bar["attrs"]["class"] for bar in bars[:3]] == ["part k0", "part k0", "part k1"]
    assert [number(bar["attrs"]["width"]) for bar in bars[:3]] == [60, 30, 10]
    table = page.table("Training rows by category and cluster")
    assert table[:2] == [["Source / category", "cluster-0", "cluster-1"], ["gsm8k / algebra", "30", "0"]]
    assert ["math / topic 7", "0", "13"] in table


def test_routing_by_category_is_a_table_that_is_folded_away(page):
    assert page.table("Mean routing weight by category and expert") == [
        ["Source / category", "base", "cluster-0"],
        ["gsm8k / algebra", "0.25", "0.75"],
    ]
    folded = [e for e in page.all("caption") if "by category and expert" in e["text"]]
    assert "details" in folded[0]["inside"]


def test_what_fit_auto_chose_is_told_in_its_own_sentences(page):
    assert "No mixture helps here: use the base adapter. Nothing had a smaller loss on held-out rows." in page.text()


def test_weights_of_unfamiliar_prompts_are_a_table_of_the_methods_that_look_at_prompts(page):
    assert page.table("Mean routing weight of unfamiliar prompts by method and expert") == [
        ["Method", "base", "cluster-0", "cluster-1"],
        ["elrea", "0.25", "0.75", "0.00"],
        ["uniform-weights", "0.00", "0.00", "0.50"],
    ]


def test_the_map_is_drawn_for_every_seed_and_by_source_with_its_indices(page):
    assert pictures(page, "map") == [
        "t-SNE of the rows by cluster, seed 0, adjusted Rand index with the sources 0.71: 0 10; 1 10; 2 10",
        "t-SNE of the rows by cluster, seed 7: 1 10; 2 10; 0 10",
        "t-SNE of the rows, by source: gsm8k 15; math 15",
    ]
    assert "Over pairs of seeds the mean adjusted Rand index is 0.83" in page.text()


def test_seeds_that_split_the_rows_alike_give_them_the_same_marks_whatever_the_labels(page):
    first, second, by_source = (
        [e["attrs"]["d"] for e in page.all("path", "shape") if e["inside"][-2:] == ["figure", "svg"]][at : at + 3]
        for at in (0, 3, 6)
    )
    assert first == second and len(by_source) == 2


def many(count, clusters):
    evaluation, rows = full()
    evaluation["map"]["points"] = [place(n, f"source-{n % 20}", [n % clusters, 0]) for n in range(count)]
    return evaluation, rows


def test_more_than_two_thousand_points_are_thinned_out_and_the_page_stays_small(tmp_path):
    path = write_report(save(tmp_path, *many(4600, 5)))
    page = Page(path.read_text())
    assert "2,000 of 4,600 rows are drawn." in page.text()
    drawn = [e["attrs"]["d"].count("M") for e in page.all("path", "shape") if e["inside"][-2:] == ["figure", "svg"]]
    assert sum(drawn) == 3 * 2000
    assert path.stat().st_size < 1_000_000


def test_clusters_and_sources_beyond_the_marks_share_a_dot(tmp_path):
    page = page_of(tmp_path, *many(150, 15))
    by_cluster, _, by_source = pictures(page, "map")
    assert by_cluster.endswith("3 others 30") or by_cluster.startswith("3 others")
    assert "others" in by_source
    assert max(int(e["attrs"]["class"].rsplit("k")[-1]) for e in page.all("path", "shape")) == 12


def test_at_most_four_seeds_are_drawn(tmp_path):
    evaluation, rows = full()
    evaluation["map"] |= {"seeds": list(range(6)), "agreement": None}
    for point in evaluation["map"]["points"]:
        point["clusters"] = [0] * 6
    assert len(pictures(page_of(tmp_path, evaluation, rows), "map")) == 5


def test_an_example_shows_every_experts_nll_beside_its_weight_and_marks_the_best(page):
    lines = [" ".join(e["text"].split()) for e in page.all("li") if "details" in e["inside"] and "NLL" in e["text"]][:3]
    assert lines == ["cluster-0 0.75 NLL 0.700", "base 0.25 NLL 0.900", "cluster-1 – NLL 0.500, the best"]
    assert [e["text"].split()[0] for e in page.all("li", "best")][:1] == ["cluster-1"]


def test_the_best_expert_is_named_even_where_small_weights_are_summed(tmp_path):
    evaluation, rows = full()
    rows[0]["weights"] = {f"e{n}": 0.1 for n in range(10)}
    rows[0]["expert_nll"] = {f"e{n}": 1.0 - 0.1 * (n == 8) for n in range(10)}
    (first, *_) = page_of(tmp_path, evaluation, rows).all("ul", "weights")
    assert re.findall(r"e\d|\d others together 0\.\d+", first["text"]) == [
        "e0",
        "e1",
        "e2",
        "e3",
        "e4",
        "e8",
        "4 others together 0.40",
    ]


def test_an_answer_without_likelihood_shows_its_f1_and_no_nll(page):
    assert any("elrea F1 50.0%" in " ".join(e["text"].split()) for e in page.all("p", "answer"))


def test_the_same_full_records_give_the_same_bytes(tmp_path):
    first, second = (write_report(save(tmp_path / name, *full())).read_bytes() for name in ("one", "two"))
    assert first == second


WRONG = {
    "'table' 4, 'accuracy_p': should be a valid number": put("table", 3, "accuracy_p", value="low"),
    "'table' 4, 'oracle_share_interval' 2: is missing": put("table", 3, "oracle_share_interval", value=[1]),
    "evaluation.json, 'memory', 'base': should be greater than or equal to 0": put("memory", "base", value=-1),
    "'composition', 'cluster-0', 'a': should be a valid number": put("composition", "cluster-0", value={"a": "x"}),
    "evaluation.json, 'notes': should be a valid tuple": put("notes", value="none"),
    "'map', 'points' 1, 'x': should be a valid number, got null": put("map", "points", 0, "x", value=None),
    "'map': 'points' 2, 'clusters' should be a label for each of 2": put("map", "points", 1, "clusters", value=[1]),
    "'map', 'agreement' 1: should be a valid number": put("map", "agreement", value=["x"]),
    "'map', 'seeds' 1": put("map", "seeds", value=[1.5]),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_optional_field_is_named_with_its_place(tmp_path, message):
    evaluation, rows = copy.deepcopy(full())
    WRONG[message](evaluation)
    with pytest.raises(CoterieError, match=re.escape(message)):
        write_report(save(tmp_path, evaluation, rows))
