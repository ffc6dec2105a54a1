"""The HTML report: one file with tables, charts and a card for each record, that asks nothing of any network.

Everything shown comes from files that anyone may have written. Every text loses its control characters and
direction marks, jinja2 escapes what becomes HTML, and what the script reads is JSON without a `<`, which the
script only ever sets as text. The page's own policy forbids whatever would slip through: it runs one script and
one style, named by their hashes, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nanorun.errors import UserError
from nanorun.records import page_charts as charts
from nanorun.records.imported_table import NUMBERS, TITLES, ImportedTable, lines_under, row_texts
from nanorun.records.profiles import performance_profiles
from nanorun.records.record import Record
from nanorun.records.report import (
    SHOWN_SKIPS,
    Row,
    Table,
    clean,
    comparison_line,
    empty_line,
    row_cells,
    rule_line,
)
from nanorun.records.states import state_key
from nanorun.records.times import of_records
from nanorun.tables import flattened

FILES = Path(__file__).parent / "page"
LONGEST_LINE = 600
"""Characters of a note."""
LONGEST_CONFIG = 4000
"""Characters of a config in a card; the whole one lies beside the record."""
CLAIMED = ("claimed", "claimed, not made again yet")
TEXT_COLUMNS = ("name", "optimizer", "date", "counts", "hw")


def render_page(
    tables: Sequence[Table],
    *,
    summaries: Mapping[str, str] | None = None,
    states: Mapping[str, tuple[str, str]] | None = None,
    imports: Mapping[str, ImportedTable] | None = None,
) -> str:
    """Return the whole page as text; the same records give the same text.

    `summaries` says in a sentence what each track is. `states` says of a record, by `state_key`, in a word and in a
    sentence whether it was reproduced or contested; a record that it does not name is claimed.
    `imports` holds the table of foreign logs of a track.
    """
    data: dict[str, Any] = {"charts": {}, "runs": [], "configs": {}}
    tracks = [
        _track(table, index, (summaries or {}).get(table.track.name, ""), data, states or {})
        for index, table in enumerate(tables)
    ]
    for shown, table in zip(tracks, tables):
        shown["imported"] = _imported((imports or {}).get(table.track.name))
    # Runs of one row share their config, so each text is kept once.
    data["configs"] = list(data["configs"])
    profiles = _profiles(tables, data)
    style, script = ((FILES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    runs = [record for table in tables for group in table.runs for record in group]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2").render(
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_script_json(data)),
        tracks=tracks,
        profiles=profiles,
        n_records=len(runs),
        latest=max((record.created[:10] for record in runs), default=None),
    )


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy: nothing from anywhere, but this style, this script and the icon in the page."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _script_json(data: object) -> str:
    """JSON that no HTML parser can take for the end of its script or the start of anything else."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _profiles(tables: Sequence[Table], data: dict[str, Any]) -> dict[str, Any] | None:
    """AlgoPerf's profiles over the tracks that have records, or why there are none; None for fewer than two."""
    kept = [table for table in tables if table.rows]
    if len(kept) < 2:
        return None
    records = [record for table in kept for group in table.runs for record in group]
    try:
        studied = of_records([table.track for table in kept], records, hardware=None)
    except UserError as error:
        return {"figure": None, "why": _line(str(error)), "scores": [], "notes": []}
    found = performance_profiles(studied.times, {})
    return {
        "figure": _figure("profiles", charts.profiles_chart(found), data),
        "why": None,
        "scores": [
            (clean(name, longest=40), f"{found.scores[name]:.4f}") for name in charts.by_score(found.scores)
        ],
        "notes": [clean(note, longest=LONGEST_LINE) for note in studied.notes],
    }


def _track(
    table: Table, index: int, summary: str, data: dict[str, Any], states: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    """What the template shows of a track; what its script reads goes into `data`."""
    track = table.track
    machines = list(dict.fromkeys(row.hardware for row in table.rows))
    best = next((row for row in table.rows if row.counts), None)
    return {
        "key": f"t{index}",
        "name": clean(track.name),
        "summary": clean(summary, longest=200),
        "target": f"{track.target_val_loss:g}",
        "scored_in": track.scored_in,
        "rule": clean(rule_line(table), longest=LONGEST_LINE),
        "finding": _line(comparison_line(table)),
        "empty": _line(empty_line(table)),
        "best": _best(best, track.scored_in) if best else None,
        "n_rows": len(table.rows),
        "n_runs": sum(map(len, table.runs)),
        "machines": [
            (chr(ord("A") + place) if place < 26 else str(place + 1), clean(name))
            for place, name in enumerate(machines)
        ],
        "columns": _columns(table, machines),
        "rows": [_row(row, place, table, machines) for place, row in enumerate(table.rows)],
        "notes": [clean(note, longest=LONGEST_LINE) for note in table.notes],
        "skipped": [
            clean(f"{one.path}: {one.why}", longest=LONGEST_LINE) for one in table.skipped[:SHOWN_SKIPS]
        ],
        "n_skipped": len(table.skipped),
        "curves": _figure(f"curves-{index}", charts.curves_chart(track, table.rows, table.runs), data),
        "history": _figure(f"history-{index}", charts.history_chart(track, table.rows, table.runs), data),
        "groups": [
            _group(row, group, place, table, data, states)
            for place, (row, group) in enumerate(zip(table.rows, table.runs))
        ],
    }


def _imported(table: ImportedTable | None) -> dict[str, Any] | None:
    """What the template shows of foreign logs; None where there are none."""
    if table is None or not (table.rows or table.skipped):
        return None
    return {
        "columns": [(title, title in NUMBERS) for title in TITLES],
        "rows": [row_texts(row) for row in table.rows],
        "notes": [clean(line, longest=LONGEST_LINE) for line in lines_under(table)],
    }


def _line(text: str | None) -> str | None:
    return None if text is None else clean(text, longest=LONGEST_LINE)


def _best(row: Row, scored_in: str) -> dict[str, str]:
    """The score of the first row that counts, large, and whose it is."""
    score = {"seconds": row.seconds_mean, "steps": row.steps_mean, "tokens": row.tokens_mean}[scored_in]
    assert score is not None
    shown = f"{score:,.1f}" if scored_in == "seconds" else f"{score:,.0f}"
    spread = f"±{row.seconds_std:,.1f}" if scored_in == "seconds" and row.seconds_std is not None else ""
    return {"score": shown, "spread": spread, "unit": scored_in, "name": clean(row.name, longest=32)}


def _columns(table: Table, machines: Sequence[str]) -> list[dict[str, Any]]:
    """The columns' titles, and whether they hold texts or numbers."""
    if not table.rows:
        return []
    titles = list(row_cells(table.rows[0], machines))
    return [
        {"title": title.replace("_", " "), "kind": _kind(title), "classes": _classes(title)}
        for title in titles
    ]


def _kind(title: str) -> str:
    return "text" if title in TEXT_COLUMNS else "number"


def _classes(title: str) -> str:
    """The classes of a column's cells."""
    extra = {
        "name": " name",
        "seconds": " with-spread",
        "final_loss": " with-spread fine",
        "first_crossing": " with-aside",
    }
    return _kind(title) + extra.get(title, "")


def _row(row: Row, place: int, table: Table, machines: Sequence[str]) -> dict[str, Any]:
    """One row's cells, each with the value it is sorted by: empty where there is none."""
    keys: dict[str, float | str | None] = {
        "#": row.rank,
        "n": row.n,
        "seconds": row.seconds_mean,
        "first_crossing": row.reached_seconds_mean,
        "steps": row.steps_mean,
        "tokens": row.tokens_mean,
        "final_loss": row.loss_mean,
        "p": row.p_value,
    }
    cells = []
    for title, text in row_cells(row, machines).items():
        shown, plus_minus, rest = text.partition(" ±")
        spread, _, aside = rest.partition(" ") if title == "first_crossing" else (rest, "", "")
        if title == "first_crossing" and not plus_minus:
            shown, _, aside = text.partition(" ")
        key = keys.get(title, text.lower() if title not in keys else None)
        cells.append(
            {
                "title": title,
                "text": clean(shown),
                "spread": f"±{spread}" if plus_minus else "",
                "has_spread": title in ("seconds", "first_crossing", "final_loss"),
                "aside": clean(aside),
                "key": "" if key is None else key,
                "classes": _classes(title),
            }
        )
    return {"cells": cells, "counts": row.counts, "mark": _mark(place), "place": place}


def _mark(place: int) -> str:
    """The classes that give a row the same colour and dash wherever it is shown."""
    return f"k{place % charts.N_COLORS} d{place // charts.N_COLORS % charts.N_DASHES}"


def _figure(key: str, chart: charts.Chart | None, data: dict[str, Any]) -> dict[str, Any] | None:
    """What the template draws of a chart; its data goes to the script."""
    if chart is None:
        return None
    data["charts"][key] = charts.to_json(chart)
    drawn = charts.still(chart)
    names = list(chart.x_names.items())
    return {
        "key": key,
        "kind": chart.kind,
        "title": clean(chart.title),
        "alternative": clean(chart.alternative, longest=None),
        "axes": names if len(names) > 1 else [],
        "extents": chart.extents if len(chart.extents) > 1 else [],
        "x_name": names[0][1],
        "y_name": chart.y_name,
        "target": None if chart.target is None else f"{chart.target:g}",
        "still": drawn,
        "bands": [(_mark(mark), path) for mark, path in drawn.bands],
        "paths": [(_mark(mark), path) for mark, path in drawn.paths],
        "dots": [(_mark(mark), x, y) for mark, x, y in drawn.dots],
        "frame": (
            charts.LEFT,
            charts.TOP,
            charts.STILL_WIDTH - charts.RIGHT,
            charts.STILL_HEIGHT - charts.BOTTOM,
        ),
        "legend": [
            {
                "name": line.name,
                "mark": _mark(line.mark),
                "mode": line.mode,
                "shown": place < charts.SHOWN_AT_FIRST,
            }
            for place, line in enumerate(chart.lines)
        ],
    }


def _group(
    row: Row,
    group: Sequence[Record],
    place: int,
    table: Table,
    data: dict[str, Any],
    states: Mapping[str, tuple[str, str]],
) -> dict[str, Any]:
    """A row's cards: what stands on each, and in `data` what opening it shows."""
    return {
        "name": clean(row.name, longest=60),
        "optimizer": clean(row.optimizer, longest=60),
        "differs": clean(row.differs, longest=LONGEST_LINE),
        "mark": _mark(place),
        "place": place,
        "cards": [
            _card(record, place, table.track.target_val_loss, data, states.get(state_key(record), CLAIMED))
            for record in sorted(group, key=lambda record: (record.seed, record.created, record.id))
        ],
    }


def _card(
    record: Record, place: int, target: float, data: dict[str, Any], state: tuple[str, str]
) -> dict[str, Any]:
    line = charts.run_line(record, place)
    configs = data["configs"]
    data["runs"].append(
        {
            "facts": [[title, [list(fact) for fact in facts]] for title, facts in _facts(record, state[1])],
            "config": configs.setdefault(_config_text(record), len(configs)),
            "chart": line
            and {
                "kind": "run",
                "x": {"seconds": "counted seconds"},
                "y": "validation loss",
                "views": charts.views_json(charts.run_views(line, target)),
                "target": target,
                "lines": [charts.line_json(line)],
            },
        }
    )
    return {
        "run": len(data["runs"]) - 1,
        "id": f"{record.track}/{record.id}",
        "seed": record.seed,
        "loss": f"{record.final_val_loss:{'.4f' if record.final_val_loss < 1e6 else '.3g'}}",
        "seconds": _seconds(record.clock["train_seconds"]),
        "at_target": record.final_val_loss <= target,
        "created": _minute(record.created),
        "state": clean(state[0]),
    }


def _minute(created: str) -> str:
    return created[:16].replace("T", " ")


def _seconds(value: float) -> str:
    return f"{value:,.1f} s" if value < 1e9 else f"{value:.3g} s"


def _config_text(record: Record) -> str:
    """The config, one key a line, without the seed, which the card says."""
    lines = [
        f"{key} = {json.dumps(value)}" for key, value in flattened(record.config).items() if key != "seed"
    ]
    cleaned = "\n".join(clean(line, longest=400) for line in lines)
    return (
        cleaned
        if len(cleaned) <= LONGEST_CONFIG
        else cleaned[:LONGEST_CONFIG] + "\n… the rest is in config.toml"
    )


def _facts(record: Record, state: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Title and (name, value) pairs of each part of a card, every text cleaned."""
    for title, facts in (
        ("Result", _result_facts(record, state)),
        ("Clock", _clock_facts(record.clock)),
        ("Machine", _machine_facts(record)),
        ("Data and code", _origin_facts(record)),
    ):
        yield title, [(clean(name, longest=40), clean(value, longest=400)) for name, value in facts]


def _result_facts(record: Record, state: str) -> list[tuple[str, str]]:
    reached, bits = record.reached, record.bits_per_byte
    ending = "stopped itself at the target" if record.stop_at_target else "ran to its declared last step"
    return [
        ("state", state),
        ("seed", str(record.seed)),
        ("final loss", f"{record.final_val_loss:.6g} nats a token"),
        ("bits per byte", "not known" if bits is None else f"{bits:.4g}"),
        (
            "first at its target",
            f"step {reached.step:,}, {_seconds(reached.seconds)}" if reached else "never",
        ),
        ("its target", f"{record.target_val_loss:g}"),
        ("steps", f"{record.steps:,} of {record.declared_steps:,}"),
        ("tokens", f"{record.tokens:,}"),
        ("ending", ending if record.completed or record.stop_at_target else "ended early"),
        ("resumed", f"{record.resumed} times" if record.resumed else "never"),
        *([("bits differ", record.inexact)] if record.inexact else []),
        *([("steps not finite, left out", str(record.skipped_steps))] if record.skipped_steps else []),
        ("made", f"{_minute(record.created)} UTC"),
    ]


def _clock_facts(clock: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every total, the counted one first and the sum of all last."""
    order = {"train_seconds": 0, "total_seconds": 2}
    names = {"train_seconds": "training, counted", "total_seconds": "in all"}
    return [
        (names.get(key, key.removesuffix("_seconds").replace("_", " ")), _seconds(clock[key]))
        for key in sorted(clock, key=lambda key: (order.get(key, 1), key))[:24]
    ]


def _machine_facts(record: Record) -> list[tuple[str, str]]:
    software = record.software
    ran = ", compiled" if software.compiled else ", not compiled"
    ran += ", deterministic" if software.deterministic else ""
    ran += ", with kernels" if software.kernels else ""
    return [
        ("hardware", record.hardware.label),
        ("memory", f"{record.hardware.memory_gib:.4g} GiB"),
        (
            "peak memory",
            f"{record.peak_memory_mib:,.0f} MiB" if record.peak_memory_mib < 1e12 else "not known",
        ),
        ("optimizer state", f"{record.optimizer_state_bytes / 2**20:,.1f} MiB"),
        ("platform", software.platform),
        ("python, numpy", f"{software.python}, {software.numpy}"),
        ("torch", software.torch + ran),
    ]


def _origin_facts(record: Record) -> list[tuple[str, str]]:
    corpus, code = record.corpus, record.code
    mixed = [("trained on a mix", corpus.mix_label)] if corpus.mix else []
    facts = [
        ("corpus", f"{corpus.name}, {corpus.tokenizer}, {corpus.vocab_size:,} tokens in the vocabulary"),
        *mixed,
        ("training tokens", f"{corpus.train_tokens:,}"),
        ("validation tokens", f"{record.validation_tokens:,} of {corpus.val_tokens:,}"),
        ("corpus manifest", corpus.manifest_sha256[:16]),
        ("parameters", f"{record.n_parameters:,}"),
        ("first weights", record.initial_weights_sha256[:16]),
        ("last weights", record.final_weights_sha256[:16]),
        ("nanorun", code.version),
        ("commit", (code.commit or "not known") + (", changed: source.patch" if code.dirty else "")),
    ]
    return [*facts, ("optimizer from outside", code.outside)] if code.outside else facts
