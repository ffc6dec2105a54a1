"""Charts as SVG: well formed, escaped, told in words as well, and drawn where the numbers say."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.records.scales import Axis, Series, axis_over, tick_labels
from nanorun.records.svg import DARK, DASHES, LIGHT, line_chart

SVG = "{http://www.w3.org/2000/svg}"
WORDS = {"title": "Loss", "x_label": "seconds", "y_label": "validation loss"}


def drawn(series, **options):
    """The chart's root element, parsed strictly."""
    return ET.fromstring(line_chart(series, **{**WORDS, **options}))


def paths(root, kind):
    return [one for one in root.iter(f"{SVG}path") if kind in one.get("class", "").split()]


def points(path):
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([^MLZ]+)", path.get("d"))]


def curves(root):
    """The lines of the series, without the samples in the legend."""
    return [one for group in root.iter(f"{SVG}g") for one in paths(group, "line")]


def test_a_chart_is_told_in_words_as_well():
    root = drawn([Series("muon", [0, 10], [5.5, 1.5])], target=1.55)
    assert root.get("role") == "img"
    title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
    assert title.text == "Loss"
    assert desc.text == "validation loss against seconds. muon: 5.5 at 0, 1.5 at 10. Target 1.55."


def test_points_lie_where_the_axes_say():
    root = drawn([Series("a", [0, 5, 10], [0.0, 0.5, 1.0])], x_range=(0, 10), y_range=(0, 1))
    (x0, y0), (x1, y1), (x2, y2) = points(curves(root)[0])
    frame = re.match(r"M([\d.]+) ([\d.]+)V([\d.]+)H([\d.]+)", paths(root, "frame")[0].get("d"))
    left, top, bottom, right = map(float, frame.groups())
    assert (x0, y0, x2, y2) == (left, bottom, right, top)
    assert (x1, y1) == (
        pytest.approx((left + right) / 2, abs=0.1),
        pytest.approx((top + bottom) / 2, abs=0.1),
    )


def test_a_logarithmic_axis_gives_each_decade_the_same_room():
    root = drawn([Series("a", [0, 1, 10, 100, 1000], [9, 1, 1, 1, 2])], x_log=True)
    xs = [x for x, _ in points(curves(root)[0])]
    assert len(xs) == 4
    assert [b - a for a, b in itertools.pairwise(xs)] == pytest.approx([xs[1] - xs[0]] * 3, abs=0.2)


def test_steps_hold_a_value_until_the_next_point():
    root = drawn([Series("a", [0, 1, 2], [3.0, 2.0, 1.0])], step=True)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3), (x4, y4) = points(curves(root)[0])
    assert (y0, x1, y2, x3) == (y1, x2, y3, x4)
    assert x0 < x1 < x3
    assert y0 < y2 < y4


def test_the_band_runs_along_its_edges_and_the_target_lies_at_its_loss():
    one = Series("a", [0, 1], [2.0, 1.0], low=[1.5, 0.5], high=[2.5, 1.5])
    root = drawn([one], target=1.0, y_range=(0, 3))
    band = points(paths(root, "band")[0])
    line = points(curves(root)[0])
    assert len(band) == 4
    assert band[0][1] > line[0][1] > band[3][1]
    assert band[0][0] == band[3][0] == line[0][0]
    target = float(re.match(r"M[\d.]+ ([\d.]+)h", paths(root, "target")[0].get("d"))[1])
    assert target == line[1][1]


def test_what_is_not_finite_breaks_the_line():
    root = drawn([Series("a", [0, 1, 2, 3, 4, math.inf], [1, 2, math.nan, 2, 1, 0])])
    assert [len(points(one)) for one in curves(root)] == [2, 2]
    alone = drawn([Series("a", [0, 1, 2], [math.inf, 1.0, math.nan])])
    assert len(list(alone.iter(f"{SVG}circle"))) == 1


@pytest.mark.parametrize("xs", [[], [3], [3, 3]])
def test_few_points_or_none_still_make_a_chart(xs):
    root = drawn([Series("a", xs, xs)])
    assert root.find(f"{SVG}desc").text
    assert "nan" not in ET.tostring(root, encoding="unicode")


HOSTILE = "</title><script>alert(1)</script>&\"'\x1b[2J\u202e\x00\ufffe"


def test_hostile_texts_stay_texts():
    text = line_chart(
        [Series(HOSTILE, [0, 1], [0, 1])],
        title=HOSTILE,
        x_label=HOSTILE,
        y_label=HOSTILE,
        target=0.5,
        target_label=HOSTILE,
    )
    root = ET.fromstring(text)
    assert not list(root.iter(f"{SVG}script"))
    assert not set("\x1b\u202e\x00\ufffe") & set(text)
    assert root.find(f"{SVG}title").text.startswith("</title><script>")


def test_a_long_name_is_cut_and_many_series_all_get_a_line_in_the_legend():
    root = drawn([Series("n" * 500, [0, 1], [0, 1]), *(Series(f"s{i}", [0, 1], [0, i]) for i in range(60))])
    names = [one.text for one in root.iter(f"{SVG}text")]
    assert "n" * 39 + "…" in names
    assert "s59" in names
    lowest = max(float(one.get("y")) for one in root.iter(f"{SVG}text"))
    assert lowest <= float(root.get("height"))


def test_fifty_six_lines_all_differ_by_colour_or_dash():
    root = drawn([Series(f"s{i}", [0, 1], [0, i]) for i in range(len(LIGHT) * len(DASHES))])
    styles = {(one.get("class"), one.get("stroke-dasharray")) for one in curves(root)}
    assert len(styles) == 56


def luminance(colour):
    """WCAG's relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_can_be_read_on_its_ground():
    for colours, ground in ((LIGHT, "#ffffff"), (DARK, "#14171b")):
        for colour in colours:
            low, high = sorted([luminance(colour), luminance(ground)])
            assert (high + 0.05) / (low + 0.05) >= 4.5, colour


def test_light_and_dark_follow_the_reader_and_touch_nothing_else_in_a_page():
    root = drawn([Series("a", [0, 1], [0, 1])], scope="one")
    style = root.find(f"{SVG}style").text
    assert "prefers-color-scheme:dark" in style
    selectors = re.findall(r"(?:^|[{}])([^{}@]+)\{", style)
    assert selectors
    assert all(part.startswith("#one") for selector in selectors for part in selector.split(","))


def test_a_curve_of_many_points_stays_small():
    n = 50_000
    text = line_chart([Series("a", list(range(n)), [1 / (i + 1) for i in range(n)])], **WORDS)
    assert len(text) < 25_000


def test_two_charts_of_the_same_numbers_are_the_same_bytes():
    series = [Series("a", [0, 1], [0.1, 0.2])]
    assert line_chart(series, **WORDS) == line_chart(series, **WORDS)


@pytest.mark.parametrize(
    ("axis", "about", "wanted"),
    [
        (Axis(0, 1), 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Axis(0, 47), 6, [0, 10, 20, 30, 40]),
        (Axis(1.4, 5.6), 8, [2, 3, 4, 5]),
        (Axis(1, 1000, True), 4, [1, 10, 100, 1000]),
        (Axis(1, 100, True), 9, [1, 2, 5, 10, 20, 50, 100]),
    ],
)
def test_ticks_are_round(axis, about, wanted):
    assert axis.ticks(about) == pytest.approx(wanted)


def test_tick_labels_have_as_many_decimals_as_they_need():
    assert tick_labels([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_labels([0, 1000, 2000]) == ["0", "1,000", "2,000"]
    assert tick_labels([0, 2_500_000, 5_000_000]) == ["0", "2.5M", "5M"]


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), max_size=6),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.text(max_size=5),
)
def test_any_numbers_make_a_whole_chart(pairs, x_log, y_log, step, name):
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    text = line_chart(
        [Series(name, xs, ys, low=ys, high=ys)], x_log=x_log, y_log=y_log, step=step, target=1.0, **WORDS
    )
    root = ET.fromstring(text)
    for one in root.iter(f"{SVG}path"):
        assert "nan" not in one.get("d")
        assert "inf" not in one.get("d")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(NUMBERS, max_size=5), st.booleans(), st.integers(0, 12))
def test_any_numbers_make_an_axis_with_a_length_and_few_ticks(values, log, about):
    axis = axis_over(values, log=log, room=0.04)
    assert axis.start < axis.end
    assert len(axis.ticks(about)) <= 4 * about + 12
