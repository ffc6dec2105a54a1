"""The HTML report: what it holds, that it is one file on its own, and that no record can do anything in it."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from records_samples import TARGET, a_dict, a_record, on_a_mix
from rich.console import Console
from runs_samples import a_logged_run, put_import

from nanorun.records import page_charts as charts
from nanorun.records.logs import LoggedMachine
from nanorun.records.page import FILES, render_page
from nanorun.records.record import Record, write_record
from nanorun.records.report import TrackView, build_table
from nanorun.records.show import report_text
from nanorun.records.significance import Rule
from nanorun.records.states import contest, state_key

SOTU = TrackView("sotu", TARGET, "seconds", Rule("t", n=3, alpha=0.05))
VOID = {"meta", "link", "input", "br", "path", "rect", "circle"}
GPU = {**a_dict()["hardware"], "device": "cuda", "device_name": "NVIDIA H100"}
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><b>&amp;{{ 7 * 7 }}{% x %}",
    "‮evil⁦\x1b]0;owned\x07\x00",
    "javascript:alert(1)//\u2028\u2029",
)


class Outline(HTMLParser):
    """Elements of a page as (tag, attributes, texts inside), with every tag closed or void."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {[tag for tag, _, _ in self._open]}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {tag} {attrs}"
        element = (tag, {name: value or "" for name, value in attrs}, [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str], str]]:
        """Attributes and text of every such element; `_` ends a name that Python keeps, `__` is a dash."""
        names = {name.rstrip("_").replace("__", "-"): value for name, value in wanted.items()}
        return [
            (attributes, "".join(texts))
            for name, attributes, texts in self.elements
            if name == tag and all(attributes.get(key) == value for key, value in names.items())
        ]

    def data(self) -> dict[str, Any]:
        ((_, text),) = self.all("script", id="data")
        return json.loads(text)


def seeds(n: int = 3, *, first: int = 0, seconds: float = 31.0, final: float = 1.54, **changes: Any):
    return [
        a_record(seed=first + index, seconds=seconds + 0.4 * index, final=final + 0.001 * index, **changes)
        for index in range(n)
    ]


def two_rows() -> list[Record]:
    adamw = seeds(name="adamw", seconds=45.0, created="2026-11-20T12:00:00Z")
    return [*adamw, *seeds(created="2026-11-24T12:30:00Z")]


def a_hundred() -> list[Record]:
    """Records as a busy track has them: long curves, and settings that differ from row to row."""
    numbers = random.Random(0)
    return [
        a_record(
            name=f"preset{place % 34}",
            seed=place // 34,
            seconds=40 + place % 34 + numbers.gauss(0, 0.5),
            final=1.54 + numbers.gauss(0, 0.003),
            points=150,
            steps=3000 + 7 * (place % 34),
            created=f"2026-11-{1 + place % 28:02}T12:30:{place % 60:02}Z",
        )
        for place in range(100)
    ]


def page(records: list[Record], **options: Any) -> str:
    return render_page([build_table(SOTU, records)], **options)


def test_the_table_holds_a_sortable_line_for_each_row():
    outline = Outline(page(two_rows()))
    heads = outline.all("th", scope="col")
    titles = [
        "#",
        "name",
        "optimizer",
        "n",
        "seconds",
        "first crossing",
        "steps",
        "tokens",
        "final loss",
        "p",
    ]
    assert [text for _, text in heads] == [*titles, "counts", "date"]
    assert [attributes.get("aria-sort") for attributes, _ in heads] == ["ascending"] + [None] * 11
    assert len(outline.all("thead")[0][0]) == 0
    assert [text.strip() for _, text in outline.all("th", scope="row")] == ["muon", "adamw"]
    keys = [attributes["data-key"] for attributes, _ in outline.all("td") if "data-key" in attributes]
    assert keys[:2] == ["1", "muon + adamw"]
    assert float(keys[3]) == pytest.approx(31.4)


def test_sort_keys_are_empty_where_there_is_no_value():
    outline = Outline(page(seeds(1, final=1.7)))
    keys = [attributes["data-key"] for attributes, _ in outline.all("td")]
    assert keys[0] == ""
    assert keys[4] == ""


def test_without_script_the_table_the_curves_and_the_history_are_there():
    outline = Outline(page(two_rows()))
    lines = [
        attributes for attributes, _ in outline.all("path") if attributes.get("class", "").startswith("line ")
    ]
    drawn = [attributes for attributes in lines if len(attributes["d"]) > 20]
    assert len(drawn) == 3, "two curves and one staircase"
    assert len([a for a, _ in outline.all("path") if a.get("class", "").startswith("band ")]) == 2
    assert len(outline.all("path", class_="target")) == 1
    assert all(
        "disabled" in attributes for attributes, text in outline.all("button") if attributes.get("data-line")
    )
    assert len(outline.all("details", class_="card")) == 6
    assert "record.json" in outline.all("noscript")[0][1]


def test_every_chart_tells_in_words_what_it_shows():
    outline = Outline(page(two_rows()))
    ids = {
        attributes["id"]: text
        for _, attributes, texts in outline.elements
        if "id" in attributes
        for text in ["".join(texts)]
    }
    drawings = outline.all("svg", role="img")
    assert len(drawings) == 2
    for attributes, _ in drawings:
        assert ids[attributes["aria-labelledby"]]
        assert ids[attributes["aria-describedby"]]
    assert (
        "muon: from 5.500 at 0.0 s to 1.5410 at 31.4 s, under the target from 25.1 s on"
        in ids["curves-0-text"]
    )
    assert (
        "adamw: 45.4 s (2026-11-20 12:00 UTC); muon: 31.4 s (2026-11-24 12:30 UTC)" in ids["history-0-text"]
    )


def test_ids_are_unique_and_every_reference_has_its_target():
    outline = Outline(page(two_rows()))
    ids = [attributes["id"] for _, attributes, _ in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in outline.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0]) in ids
        href = attributes.get("href", "")
        assert not href.startswith("#") or href[1:] in ids


def test_the_policy_allows_this_style_and_this_script_and_nothing_else():
    text = page(two_rows())
    ((policy, _),) = Outline(text).all("meta", http__equiv="Content-Security-Policy")
    wanted = ["default-src 'none'"]
    for kind, found in (
        ("style", re.findall(r"<style>(.*?)</style>", text, re.S)),
        ("script", re.findall(r"<script>(.*?)</script>", text, re.S)),
    ):
        assert len(found) == 1
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        wanted.append(f"{kind}-src 'sha256-{digest}'")
    assert policy["content"].split("; ") == [
        *wanted,
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def test_nothing_is_loaded_and_nothing_is_run_from_an_attribute():
    outline = Outline(page(two_rows()))
    for tag, attributes, _ in outline.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "img", "image", "use")
        assert not {"src", "style", "srcset", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith(("#", "data:image/svg+xml,"))
    for name in ("page.css", "page.js"):
        content = (FILES / name).read_text(encoding="utf-8")
        assert not re.search(
            r"url\((?!#)|@import|fetch\(|XMLHttpRequest|innerHTML|outerHTML|insertAdjacentHTML|eval\(|import\(",
            content,
        )


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_record_is_text_wherever_it_is_shown(text):
    content = a_dict()
    hostile = a_dict(
        name=text,
        optimizer=text,
        hardware={**content["hardware"], "cpu_name": text},
        software={**content["software"], "torch": text, "platform": text, "python": text, "numpy": text},
        code={**content["code"], "commit": text, "version": text, "outside": text},
        corpus={**content["corpus"], "name": text, "tokenizer": text, "manifest_sha256": text},
        config={text: {text: [text, 1]}, "name": text},
        clock={**content["clock"], f"{text}_seconds": 1.0},
        initial_weights_sha256=text,
        final_weights_sha256=text,
    )
    plain = a_dict()
    plain["name"] = "muon"
    honest = Outline(page([Record.from_dict(plain)]))
    whole = page([Record.from_dict(hostile)], summaries={"sotu": text})
    outline = Outline(whole)
    tags = [tag for tag, _, _ in outline.elements]
    # The notes differ, and what stands in them.
    assert set(tags) <= {*(tag for tag, _, _ in honest.elements), "details", "summary", "p"}
    assert tags.count("script") == 2
    for char in "\x1b\x07\x00‮⁦\u2028\u2029":
        assert char not in whole
    data = outline.data()
    shown = json.dumps(data, ensure_ascii=False)
    assert not re.search("[\x00-\x1f‪-‮⁦-⁩]", shown)
    name = "".join(char if char.isprintable() else "?" for char in text)
    assert any(name[:29] in body for _, body in outline.all("th", scope="row"))
    assert "49" not in outline.all("th", scope="row")[0][1]


def test_a_hostile_skipped_folder_is_text(tmp_path):
    folder = tmp_path / "sotu" / "<script>alert(1)<‮"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("{")
    text = report_text(tmp_path, track="sotu", form="html", since=None, hardware=None, console=Console())
    outline = Outline(text)
    assert [tag for tag, _, _ in outline.elements].count("script") == 2
    assert any("<script>alert(1)<?" in body for _, body in outline.all("li"))


def test_imported_logs_stand_apart_and_are_text(tmp_path):
    put_import(
        tmp_path, a_logged_run(machine=LoggedMachine(gpu=HOSTILE[1], world_size=8), source_sha256=None)
    )
    text = report_text(
        tmp_path, track="sotu", form="html", since=None, hardware=None, console=Console(quiet=True)
    )
    assert "Imported logs" in text
    assert HOSTILE[1] not in text
    cells = ["".join(texts) for tag, _, texts in Outline(text).elements if tag == "bdi"]
    assert any(HOSTILE[1][:20] in cell for cell in cells), cells


def test_the_data_of_the_script_cannot_end_it():
    text = page(seeds(name="</script><!--<script>&"))
    ((_, data),) = re.findall(r'(<script type="application/json" id="data">)(.*?)</script>', text, re.S)
    assert not re.search(r"[<>&\u2028\u2029]", data)
    assert data.isascii()


def test_a_hundred_records_stay_under_a_megabyte_and_a_half():
    text = page(a_hundred())
    assert len(Outline(text).all("details", class_="card")) == 100
    assert len(text.encode()) < 1_500_000


def test_a_hundred_records_with_large_configs_stay_under_it_too():
    config = a_dict()["config"] | {f"key{place}": "x" * 300 for place in range(150)}
    records = [
        a_record(seed=place, config={**config, "place": place}, points=500, steps=4990)
        for place in range(100)
    ]
    assert len(page(records).encode()) < 1_500_000


def test_the_same_records_give_the_same_bytes_in_whatever_order_they_come():
    records = a_hundred()
    text = page(records)
    shuffled = records[::-1]
    assert page(shuffled) == text


def test_a_card_holds_config_hardware_clock_and_curve():
    outline = Outline(
        page(two_rows(), states={state_key(two_rows()[-1]): ("reproduced", "reproduced by somebody")})
    )
    data = outline.data()
    cards = outline.all("details", class_="card")
    assert [attributes["data-run"] for attributes, _ in cards] == list("012345")
    assert [("reproduced" in text, "claimed" in text) for _, text in cards] == [(False, True)] * 2 + [
        (True, False)
    ] + [(False, True)] * 3
    facts = {title: dict(pairs) for title, pairs in data["runs"][2]["facts"]}
    assert facts["Result"]["state"] == "reproduced by somebody"
    assert facts["Clock"] == {
        "training, counted": "31.8 s",
        "checkpoint": "0.5 s",
        "compile": "0.0 s",
        "validation": "4.0 s",
        "in all": "37.8 s",
    }
    assert next(iter(facts["Clock"])) == "training, counted"
    assert facts["Machine"]["hardware"] == "Intel Xeon @ 2.80GHz, 2 of 2 cores"
    assert facts["Data and code"]["commit"] == "a" * 40
    assert "optim.matrix.lr = 0.02" in data["configs"][data["runs"][0]["config"]].split("\n")
    assert len(data["configs"]) == 2, "runs of one row share their config"
    (line,) = data["runs"][2]["chart"]["lines"]
    assert line["y"][-1] == pytest.approx(1.542)


def test_a_card_says_what_mix_a_run_trained_on():
    for record, said in ((a_record(**on_a_mix()), True), (a_record(), False)):
        facts = {title: dict(pairs) for title, pairs in Outline(page([record])).data()["runs"][0]["facts"]}
        assert ("trained on a mix" in facts["Data and code"]) is said
    facts = dict(dict(Outline(page([a_record(**on_a_mix())])).data()["runs"][0]["facts"])["Data and code"])
    assert facts["trained on a mix"].startswith("sotu:0.7 (cccc")


def test_a_contested_record_says_so_on_its_card(tmp_path):
    for record in two_rows():
        write_record(tmp_path, record, config_toml="", source_patch=None)
    contest(two_rows()[0].id, records=tmp_path, reason="it saw <b>the</b> answers", by="Eve")
    text = report_text(tmp_path, track=None, form="html", since=None, hardware=None, console=Console())
    outline = Outline(text)
    states = [
        body for attributes, body in outline.all("span") if attributes.get("class", "").startswith("state ")
    ]
    assert sorted(states) == ["claimed"] * 5 + ["contested"]
    (place,) = [
        int(a["data-run"]) for a, body in outline.all("details", class_="card") if "contested" in body
    ]
    facts = dict(outline.data()["runs"][place]["facts"][0][1])
    assert facts["state"].startswith("contested by Eve")
    assert "it saw <b>the</b> answers" in facts["state"]


def test_a_curve_is_the_mean_over_seeds_with_their_range():
    (point, *_, last) = charts.mean_curve(seeds())
    assert (point.step, point.low, point.high) == (0, 5.5, 5.5)
    assert last.loss == pytest.approx(1.541)
    assert (last.low, last.high) == (1.54, pytest.approx(1.542))
    assert last.seconds == pytest.approx(31.4)
    assert last.tokens == 4_096_000


def test_a_repeated_seed_weighs_once():
    records = [*seeds(2), a_record(seed=0, seconds=39.0, final=1.56)]
    last = charts.mean_curve(records)[-1]
    assert last.loss == pytest.approx(((1.54 + 1.56) / 2 + 1.541) / 2)
    assert last.high == pytest.approx(1.55)


def test_a_run_that_ended_early_does_not_bend_the_mean():
    early = a_record(seed=7, completed=False, steps=900, declared_steps=1000, final=2.0)
    assert charts.mean_curve([*seeds(), early]) == charts.mean_curve(seeds())
    assert charts.mean_curve([early])


def test_long_curves_are_thinned_and_keep_their_first_crossing_best_and_last_points():
    record = a_record(points=3001, steps=3000)
    points = charts.mean_curve([record])
    kept = charts.thinned(points, TARGET)
    crossing = next(point for point in points if point.loss <= TARGET)
    assert len(kept) <= charts.MOST_POINTS + 2
    assert {points[0], points[-1], crossing, min(points, key=lambda point: point.loss)} <= set(kept)
    assert kept == sorted(kept)


def test_near_the_target_the_first_fall_is_cut_off_and_the_end_is_not():
    chart = charts.curves_chart(SOTU, *_rows_and_runs(two_rows()))
    assert chart is not None
    assert chart.extents == ["near", "whole"]
    near, whole = chart.views["seconds.near"][1], chart.views["seconds.whole"][1]
    assert near.low < 1.54 < TARGET < near.high < 1.8
    assert whole.high > 5.5
    assert all(axis.low <= value <= axis.high for axis in (near, whole) for value, _ in axis.ticks)
    assert len(near.ticks) >= 3


def _rows_and_runs(records: list[Record]):
    table = build_table(SOTU, records)
    return table.rows, table.runs


def test_the_history_falls_with_each_record_and_shows_what_came_too_late_as_dots():
    late = seeds(name="soap", seconds=40.0, created="2026-11-25T09:00:00Z")
    chart = charts.history_chart(SOTU, *_rows_and_runs([*two_rows(), *late]))
    assert chart is not None
    staircase, dots = chart.lines
    assert staircase.y == pytest.approx([45.4, 31.4, 31.4])
    assert list(staircase.notes) == [
        "adamw: 45.4 s (2026-11-20 12:00 UTC)",
        "muon: 31.4 s (2026-11-24 12:30 UTC)",
    ]
    assert (dots.mode, list(dots.notes)) == ("dots", ["soap: 40.4 s (2026-11-25 09:00 UTC)"])


def test_a_row_stands_in_the_history_from_the_run_with_which_it_first_counted():
    created = [f"2026-11-2{day}T00:00:00Z" for day in range(5)]
    runs = [a_record(seed=day, final=1.54 + 0.001 * day, created=created[day]) for day in range(5)]
    rows, groups = _rows_and_runs(runs)
    chart = charts.history_chart(SOTU, rows, groups)
    assert chart is not None
    assert chart.lines[0].notes[0].endswith("(2026-11-22 00:00 UTC)")


def test_rows_that_do_not_count_make_no_history():
    assert charts.history_chart(SOTU, *_rows_and_runs(seeds(2))) is None
    assert "Record history" not in page(seeds(2))


def test_seconds_of_two_machines_are_two_staircases():
    records = [*seeds(), *seeds(seconds=9.0, hardware=GPU)]
    chart = charts.history_chart(SOTU, *_rows_and_runs(records))
    assert chart is not None
    assert [line.name for line in chart.lines] == ["1 × NVIDIA H100", "Intel Xeon @ 2.80GHz, 2 of 2 cores"]


def test_profiles_are_drawn_over_two_tracks_and_not_over_one():
    other = TrackView("other", TARGET, "seconds", SOTU.rule)
    records = [*two_rows(), *seeds(track="other")]
    text = render_page([build_table(SOTU, records), build_table(other, records)])
    outline = Outline(text)
    assert "Performance profiles" in text
    (caption,) = [body for _, body in outline.all("figcaption") if "Score" in body]
    assert re.search(r"muon 1\.0000; adamw 0\.42\d\d", caption)
    lines = outline.data()["charts"]["profiles"]["lines"]
    assert [(line["name"], line["y"][0], line["y"][-1]) for line in lines] == [
        ("muon", 1, 1),
        ("adamw", 0, 0.5),
    ]
    assert "Performance profiles" not in page(two_rows())


def test_profiles_of_two_machines_are_refused_in_words():
    other = TrackView("other", TARGET, "seconds", SOTU.rule)
    records = [*seeds(), *seeds(track="other", hardware=GPU)]
    text = render_page([build_table(SOTU, records), build_table(other, records)])
    assert "No performance profiles: the records are of 2 machines" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"validation": []},
        {"validation": [], "reached": None, "final_val_loss": 9e49},
        {"final": 0.0},
        {"seconds": 0.0},
        {"seconds": 9e49},
        {
            "validation": [{"step": 2**62, "tokens": 2**62, "train_seconds": 9e49, "val_loss": 1e-320}],
            "final_val_loss": 2.0,
            "steps": 1,
        },
        {"target_val_loss": 1e-300},
        {"created": "0001-01-01T00:00:00Z"},
        {"created": "9999-12-31T23:59:59Z"},
    ],
)
def test_absurd_readings_make_a_page_all_the_same(changes):
    records = []
    for seed in range(3):
        content = a_dict(seed=seed)
        content = a_dict(**{"seed": seed, "final": 1.54 + seed / 1000, **changes})
        points = content["validation"]
        crossing = next((p for p in points if p["val_loss"] <= content["target_val_loss"]), None)
        content["reached"] = crossing and {"step": crossing["step"], "seconds": crossing["train_seconds"]}
        records.append(Record.from_dict(content))
    text = page([*records, *seeds(name="adamw", seconds=45.0)])
    outline = Outline(text)
    assert len(outline.all("details", class_="card")) == 6
    assert not re.search(
        r"\b(NaN|Infinity|nan|inf)\b", "".join(a.get("d", "") for a, _ in outline.all("path"))
    )
    json.dumps(outline.data(), allow_nan=False)


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("2026-11-24T12:30:00Z", "2026-11-24T12:31:00Z"),
        ("2026-11-24T12:30:00Z", "2026-11-24T18:31:00Z"),
        ("2026-11-24T22:30:00Z", "2026-11-25T18:31:00Z"),
        ("2026-11-24T12:30:00Z", "2026-12-24T12:30:00Z"),
        ("2026-01-24T12:30:00Z", "2028-12-24T12:30:00Z"),
        ("0001-01-01T00:00:00Z", "9999-12-31T00:00:00Z"),
    ],
)
def test_times_have_a_few_round_ticks_within_their_range(first, last):
    records = [*seeds(created=last), *seeds(name="adamw", seconds=45.0, created=first)]
    chart = charts.history_chart(SOTU, *_rows_and_runs(records))
    assert chart is not None
    axis, _ = chart.views["time.near"]
    assert 2 <= len(axis.ticks) <= 12
    assert all(axis.low <= moment <= axis.high for moment, _ in axis.ticks)
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)


def test_no_records_make_a_page_that_says_what_to_do():
    text = page([])
    assert "nanorun train --track sotu" in text
    Outline(text)


def test_report_writes_the_page_of_all_tracks_or_of_one(tmp_path):
    for record in [*two_rows(), *seeds(track="shakespeare")]:
        write_record(tmp_path, record, config_toml="", source_patch=None)
    given = {"form": "html", "since": None, "hardware": None, "console": Console()}
    everything = report_text(tmp_path, track=None, **given)
    one = report_text(tmp_path, track="shakespeare", **given)
    assert [body for _, body in Outline(everything).all("h2")][:2] == ["sotu", "shakespeare"]
    assert [body for _, body in Outline(one).all("h2")] == ["shakespeare"]


def test_every_colour_of_text_has_the_contrast_of_aa_and_every_line_three_to_one():
    style = (FILES / "page.css").read_text(encoding="utf-8")
    found = dict(re.findall(r"--([\w-]+): light-dark\((#\w{6}, #\w{6})\)", style))
    colors = {name: pair.split(", ") for name, pair in found.items()}
    assert {"paper", "raised", "ink", "muted", "accent", "good", "c0", "c7"} <= colors.keys()
    for theme in (0, 1):
        for name in ("ink", "muted", "accent", "good", "c4"):
            for ground in ("paper", "raised"):
                assert _contrast(colors[name][theme], colors[ground][theme]) >= 4.5, (name, ground, theme)
        for name in ("control", *(f"c{place}" for place in range(charts.N_COLORS))):
            assert _contrast(colors[name][theme], colors["paper"][theme]) >= 3.0, (name, theme)


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    shares = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear))
