"""The pictures' parts: scales, labels, marks, and what stands where in a drawing."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.report import draw
from coterie.report.charts import split_bar
from coterie.report.plots import Frame, Group, Point, curve, draw_map, fit, scatter, spread_out
from coterie.report.scales import Scale, even_scale, scale_for
from report_pages import luminance, number, style

EVEN = Scale(0.0, 10.0, (0.0, 5.0, 10.0))


@given(st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 3)), min_size=1, max_size=9))
def test_an_even_scale_holds_all_values_between_its_marks_in_few_round_steps(values):
    scale = even_scale(values)
    slack = 1e-6 * (scale.marks[1] - scale.marks[0])
    assert scale.marks[0] - slack <= min(values) and max(values) <= scale.marks[-1] + slack
    assert 2 <= len(scale.marks) <= 8
    steps = [after - before for before, after in zip(scale.marks, scale.marks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
    assert f"{steps[0]:.0e}"[0] in "125"
    assert [scale.share(scale.low), scale.share(scale.high)] == [0, 1]


@given(st.floats(1e-6, 1e3), st.floats(4.0, 1e12))
def test_positive_values_far_apart_get_a_log_scale_whose_marks_are_round_and_few(low, factor):
    scale = scale_for([low, low * factor])
    assert scale.log and scale.low < low and low * factor < scale.high
    assert 2 <= len(scale.marks) <= 6
    assert all(scale.low <= mark <= scale.high and f"{mark:.0e}"[0] in "125" for mark in scale.marks)
    assert scale.share(low * math.sqrt(factor)) == pytest.approx(0.5)


@pytest.mark.parametrize("values", [[1.0, 3.9], [0.0, 100.0], [-1.0, 50.0], [7.0]])
def test_values_that_lie_close_or_are_not_positive_get_an_even_scale(values):
    assert not scale_for(values).log


def drawn(markup):
    tree = ElementTree.fromstring(markup)
    return tree, [(number(place.get("x")), float(place.get("y"))) for place in tree.findall("svg")]


def point(x, y, label="1", **others):
    return Point(float(x), float(y), draw.DISC, label, f"point {label}", **others)


@pytest.mark.parametrize("turned", [False, True])
def test_points_lie_where_their_scales_put_them_and_a_turned_scale_has_its_low_values_at_the_top(turned):
    frame = Frame(EVEN, EVEN, ("cost", "quality"), turned)
    tree, places = drawn(scatter([point(0, 0), point(10, 10), point(5, 2.5)], frame, "quality against cost"))
    (left, first), (right, second), (middle, third) = places
    assert middle == pytest.approx((left + right) / 2, abs=0.002)
    assert third == pytest.approx(first + 0.25 * (second - first), abs=0.1)
    assert (first < second) == turned
    lines = {float(line.get("y1")) for line in tree.findall("line[@class='grid']")}
    assert {first, second} < lines
    assert tree.get("aria-label") == "quality against cost: point 1; point 1; point 1"


def test_every_point_of_a_scatter_carries_its_number():
    frame = Frame(EVEN, EVEN, ("cost", "quality"))
    tree, _ = drawn(scatter([point(n, n, str(n)) for n in range(5)], frame, "t"))
    assert [place.find("text").text for place in tree.findall("svg")] == ["0", "1", "2", "3", "4"]


def test_a_point_without_room_beside_it_has_its_number_in_one_line_with_its_neighbours_above_them():
    frame = Frame(EVEN, EVEN, ("cost", "quality"))
    points = [point(5.8, 5.2, "1"), point(5, 5, "2"), point(5, 5, ""), point(5.3, 5.9, "3"), point(7, 5, "4")]
    tree, places = drawn(scatter(points, frame, "t"))
    assert [place.findtext("text") for place in tree.findall("svg")] == [None, None, None, "3", "4"]
    (label,) = [text for text in tree.findall("text") if "number" in text.get("class")]
    assert label.text == "2, 1" and number(label.get("x")) == pytest.approx((places[0][0] + places[1][0]) / 2)
    assert float(label.get("y")) < min(y for _, y in places[:2]) - 6


@pytest.mark.parametrize(("x", "middle"), [(0, 38), (5, 55), (10, 62)])
def test_a_long_line_of_numbers_reaches_into_the_picture_and_not_out_of_it(x, middle):
    points = [point(x, 5, str(label)) for label in range(10, 20)]
    tree, _ = drawn(scatter(points, Frame(EVEN, EVEN, ("cost", "quality")), "t"))
    (label,) = [text for text in tree.findall("text") if "number" in text.get("class")]
    assert label.text == ", ".join(map(str, range(10, 20))) and number(label.get("x")) == middle


def test_a_curve_joins_its_points_and_its_whiskers_reach_their_ends():
    frame = Frame(EVEN, EVEN, ("k", "quality"))
    points = [point(0, 5, "none", ends=(0.0, 10.0)), point(10, 5, "all")]
    tree, places = drawn(curve(points, frame, "t", level=2.5))
    (joint,) = tree.findall("line[@class='joint']")
    assert [(number(joint.get(f"x{n}")), float(joint.get(f"y{n}"))) for n in (1, 2)] == places
    (whisker,) = tree.findall("line[@class='whisker']")
    low, high = float(whisker.get("y1")), float(whisker.get("y2"))
    assert (low + high) / 2 == pytest.approx(places[0][1], abs=0.1) and low > high
    (level,) = tree.findall("line[@class='level']")
    assert float(level.get("y1")) == pytest.approx(low + 0.25 * (high - low), abs=0.1)
    assert [t.text for t in tree.findall("text[@class='mark']")] == ["all", "none"]


def test_numbers_under_a_curve_that_would_touch_are_left_out_but_the_last_stays():
    frame = Frame(EVEN, EVEN, ("k", "quality"))
    tree, _ = drawn(curve([point(x, 1, str(x)) for x in (0, 9.2, 9.6, 10)], frame, "t"))
    assert [t.text for t in tree.findall("text[@class='mark']")] == ["10", "0"]


def test_labels_that_would_touch_are_moved_apart_and_the_others_stay():
    assert spread_out([10.0, 50.0, 90.0], 12.0) == [10.0, 50.0, 90.0]
    assert spread_out([50.0, 52.0, 90.0], 12.0) == [45.0, 57.0, 90.0]
    moved = spread_out([30.0, 20.0, 25.0, 40.0], 12.0)
    assert [place for _, place in sorted(zip([30, 20, 25, 40], moved, strict=True))] == sorted(moved)
    gaps = [after - before for before, after in zip(sorted(moved), sorted(moved)[1:], strict=False)]
    assert min(gaps) == pytest.approx(12) and sum(moved) == pytest.approx(115)


def test_twelve_marks_differ_in_outline_or_filling():
    unfilled = re.search(r"\.shape:is\(([^)]*)\) \{ fill: none \}", style())[1].replace(".", "").split(", ")
    shapes = {(draw.outline(n), draw.css_class(n) in unfilled) for n in range(13)}
    assert len(shapes) == 13
    assert (draw.outline(12), draw.css_class(12)) == (draw.outline(99), draw.css_class(99))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_colour_of_a_mark_stands_out_from_the_paper_in_both_themes(theme):
    part = style().split("prefers-color-scheme: dark")[theme == "dark"]
    colours = dict(re.findall(r"--(k\d+|paper): #(\w{6})", part)[:14])
    assert len(colours) == 14
    for name in set(colours) - {"paper"}:
        dark, light = sorted((luminance(colours[name]), luminance(colours["paper"])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name  # WCAG 2.2, 1.4.3: numbers stand on these colours


def test_a_map_fills_its_square_and_keeps_directions_and_proportions():
    places = fit([(0.0, 0.0), (10.0, 0.0), (10.0, 5.0)])
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == pytest.approx(2 * (y1 - y3)) and y1 == y2 and x2 == x3
    assert (x1, x2) == pytest.approx((8, 232)) and y2 + y3 == pytest.approx(240)
    assert fit([(3.0, 3.0)]) == [(120, 120)]


def test_a_map_draws_every_point_once_and_the_largest_group_first():
    groups = [Group(0, "few", ((1.0, 2.0),)), Group(5, "many", ((3.0, 4.0), (5.0, 6.0)))]
    tree = ElementTree.fromstring(draw_map(groups, "t"))
    paths = [(path.get("class"), re.findall(r"M([\d.]+) ([\d.]+)", path.get("d"))) for path in tree.findall("path")]
    assert paths == [("shape k5", [("3.0", "4.0"), ("5.0", "6.0")]), ("shape k0", [("1.0", "2.0")])]
    assert tree.get("aria-label") == "t: few 1; many 2"


def test_the_parts_of_a_bar_are_as_long_as_their_shares_and_narrow_ones_have_no_label():
    tree = ElementTree.fromstring(split_bar([("k0", 0.7, "1"), ("k1", 0.25, "2"), ("rest", 0.05, "…")], "t"))
    assert [(number(r.get("x")), number(r.get("width"))) for r in tree.findall("rect")] == [(0, 70), (70, 25), (95, 5)]
    assert [(t.text, number(t.get("x"))) for t in tree.findall("text")] == [("1", 35), ("2", 82.5)]
