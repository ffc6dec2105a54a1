"""Small curves in a terminal: in braille or blocks or not at all, no wider than asked, drawn where they belong."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from nanorun.records.scales import Series
from nanorun.records.terminal_plot import marks_for, small_multiples

WORDS = {"x_label": "seconds", "y_label": "loss"}
FALLING = Series("muon", [0, 10, 20], [5.0, 2.0, 1.0])


def plotted(series, columns=80, marks="braille", **options):
    return small_multiples(series, columns=columns, marks=marks, **WORDS, **options)


@pytest.mark.parametrize(
    ("encoding", "terminal", "wanted"),
    [
        ("utf-8", "xterm-256color", "braille"),
        ("utf-8", None, "braille"),
        ("utf-8", "linux", "blocks"),
        ("utf-8", "dumb", None),
        ("cp437", None, "blocks"),
        ("cp1252", None, None),
        ("ascii", "xterm", None),
        ("no such encoding", None, None),
    ],
)
def test_a_terminal_gets_what_it_can_draw(encoding, terminal, wanted):
    assert marks_for(encoding, terminal) == wanted


def test_a_falling_curve_falls():
    lines = plotted([Series("a", [0, 1], [1.0, 0.0])], columns=24, rows=4, marks="blocks")
    body = [line[4:] for line in lines[2:6]]
    places = [line.index(next(char for char in line if char != " ")) for line in body]
    assert places == sorted(places)
    assert places[0] == 0
    assert len(body[-1]) == 20


def test_the_axes_are_labelled_with_their_ends():
    lines = plotted([FALLING])
    assert lines[0] == "loss against seconds"
    assert "muon" in lines[1]
    assert lines[2].startswith("5 ")
    assert lines[6].startswith("1 ")
    assert lines[7].split() == ["0", "20"]


def test_panels_share_their_axes_and_wrap_to_the_width():
    lines = plotted(
        [FALLING, Series("adamw", [0, 40], [5.5, 1.2]), Series("soap", [0, 1], [3, 2])], columns=50
    )
    assert all(cell_len(line) <= 50 for line in lines)
    assert [line.split() for line in lines if "muon" in line] == [["muon", "adamw"]]
    assert [line.split() for line in lines if "soap" in line] == [["soap"]]
    assert [line.split() for line in lines if line.endswith("40")] == [["0", "40", "0", "40"], ["0", "40"]]


def test_the_target_is_dotted_across_the_panel():
    lines = plotted([Series("a", [0, 1], [2.0, 2.0])], columns=24, rows=3, target=1.0, marks="blocks")
    assert lines[4].count("▄") >= 6


def test_a_step_is_drawn_with_corners():
    corner = plotted([Series("a", [0, 1], [1.0, 0.0])], columns=24, rows=4, step=True)
    straight = plotted([Series("a", [0, 1], [1.0, 0.0])], columns=24, rows=4)
    assert corner[2].strip("1. ") == "⠉" * 21 + "⢹"
    assert straight != corner


@pytest.mark.parametrize("series", [[], [Series("a", [], [])]])
def test_nothing_to_draw_gives_no_lines(series):
    assert plotted(series) == []


def test_a_terminal_that_is_too_narrow_gets_no_lines():
    assert plotted([FALLING], columns=19) == []
    assert plotted([FALLING], columns=20) != []


def test_hostile_and_wide_names_neither_act_nor_widen():
    names = ["\x1b[2J" * 30, "日本語" * 20, "a\nb", "\u202eevil"]
    lines = plotted([Series(name, [0, 1], [0, 1]) for name in names], columns=60)
    assert all(cell_len(line) <= 60 for line in lines)
    assert not set("\x1b\n\u202e") & set("".join(lines))


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), max_size=6),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["braille", "blocks"]),
    st.integers(0, 100),
)
def test_any_numbers_fit_the_width(pairs, x_log, step, marks, columns):
    one = Series("a", [x for x, _ in pairs], [y for _, y in pairs])
    lines = plotted([one, FALLING], columns, marks, x_log=x_log, step=step, target=math.pi)
    assert all(cell_len(line) <= columns for line in lines)
