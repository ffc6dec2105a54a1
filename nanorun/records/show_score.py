"""score as a person asks for it: a table, a document, or one of two pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanorun.errors import UserError
from nanorun.records.profiles import TAU_MAX, TAUS, Profiles, held_out_pairs, performance_profiles
from nanorun.records.report import csv_cell, encodable, markdown_text
from nanorun.records.scales import Series
from nanorun.records.times import Studied, medians, of_records, read_timings

if TYPE_CHECKING:
    from rich.console import Console

STUDIES, TRIALS = 5, 5
"""What the benchmark's first competition asked for on each workload."""
ASKED = {
    "external": f"{STUDIES} studies of {TRIALS} trials, the fastest trial of each",
    "self": f"{STUDIES} studies of one trial, with three times the runtime budget",
}
METHOD = (
    f"score: area under the performance profile for tau from 1 to {TAU_MAX:g} ({len(TAUS)} points, trapezoids) over "
    f"{TAU_MAX - 1:g}; medians over studies; a time above {TAU_MAX:g} times the best is a miss"
)


@dataclass(frozen=True)
class Scored:
    """Everything that the forms tell."""

    profiles: Profiles
    studied: Studied
    ruleset: str
    held_out: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def best_first(self) -> list[str]:
        scores = self.profiles.scores
        return sorted(scores, key=lambda name: (-scores[name], name))


def score_text(
    times: Path | None,
    *,
    tracks: Sequence[str],
    held_out: Sequence[str],
    ruleset: str,
    form: str,
    plot: str,
    records: Path,
    hardware: str | None,
    curves: bool | None,
    console: Console,
) -> str:
    """Return the scores of a file of times, or of our own records of some tracks.

    `form` is `table` (for this console), `markdown`, `csv`, `json` or `svg`; `plot` is `profiles` or `tau-max`.
    """
    if (times is None) == (not tracks):
        raise UserError(
            "wanted either a file of times or --track, not "
            + ("both; leave one out" if tracks else "neither; for example: nanorun score times.csv")
        )
    if times is None:
        studied = _of_tracks(tracks, records, hardware)
    elif hardware is not None:
        raise UserError("--hardware beside a file of times: it chooses among records; leave it out")
    else:
        studied = medians(read_timings(times), ruleset)
    scored = scored_times(studied, ruleset=ruleset, held_out=held_out)
    if form == "json":
        return json.dumps(to_dict(scored), indent=1, allow_nan=False) + "\n"
    if form == "svg":
        return to_svg(scored, plot)
    if form == "csv":
        return to_csv(scored)
    if form == "markdown":
        return to_markdown(scored)
    with console.capture() as captured:
        print_terminal(scored, console, plot=plot, curves=curves)
    return captured.get()


def _of_tracks(tracks: Sequence[str], root: Path, hardware: str | None) -> Studied:
    from nanorun.records.index import indexed_records
    from nanorun.records.report import SHOWN_SKIPS, TrackView
    from nanorun.records.show import target_of
    from nanorun.tracks import load_track

    if len(set(tracks)) < len(tracks):
        raise UserError("--track names a track twice; name each track once")
    views = [TrackView.of(load_track(name)) for name in tracks]
    found = [indexed_records(root, name, target_of) for name in tracks]
    studied = of_records(views, [record for records, _ in found for record in records], hardware=hardware)
    skipped = [f"skipped {path}: {why}" for _, broken in found for path, why in broken]
    if len(skipped) > SHOWN_SKIPS:
        skipped[SHOWN_SKIPS:] = [
            f"skipped {len(skipped) - SHOWN_SKIPS} more; nanorun report --json names them all"
        ]
    return replace(studied, notes=(*studied.notes, *skipped))


def scored_times(studied: Studied, *, ruleset: str, held_out: Sequence[str]) -> Scored:
    """Return the scores of medians, with all that has to be said about them."""
    workloads = [workload for row in studied.times.values() for workload in row]
    pairs = held_out_pairs(held_out, workloads)
    profiles = performance_profiles(studied.times, pairs)
    notes = [METHOD, _studies_note(studied, ruleset), *studied.notes]
    for base in profiles.workloads:
        if all(math.isinf(row[base]) for row in profiles.ratios.values()):
            notes.append(f"no submission keeps {base}; it counts among the workloads all the same")
    notes += [f"{one.submission} loses {one.workload}: it misses {one.variant}" for one in profiles.lost]
    return Scored(profiles, studied, ruleset, pairs, tuple(notes))


def _studies_note(studied: Studied, ruleset: str) -> str:
    counts = sorted({n for row in studied.n_studies.values() for n in row.values()})
    found = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{ruleset} tuning: AlgoPerf asks {ASKED[ruleset]}; these times have {found} a workload"


def to_dict(scored: Scored) -> dict[str, Any]:
    """The scores as JSON has them; a ratio that does not exist is null."""
    profiles = scored.profiles
    return {
        "scores": {name: profiles.scores[name] for name in scored.best_first},
        "profiles": {
            name: {"tau": list(TAUS), "fraction": list(profiles.fractions[name])}
            for name in scored.best_first
        },
        "tau": list(TAUS),
        "scores_by_tau_max": {name: profiles.score_by_tau_max(name) for name in scored.best_first},
        "ratios": {
            name: {
                workload: ratio if math.isfinite(ratio) else None
                for workload, ratio in profiles.ratios[name].items()
            }
            for name in scored.best_first
        },
        "workloads": list(profiles.workloads),
        "held_out": dict(scored.held_out),
        "ruleset": scored.ruleset,
        "studies": scored.studied.n_studies,
        "notes": list(scored.notes),
    }


TITLES = ("Rank", "Submission", "Score", "Workloads", "Fastest")


def _cells(scored: Scored) -> list[tuple[str, str, str, str, str]]:
    """Rank, submission, score, workloads kept of all, and on how many it is the fastest."""
    rows = []
    ranks: dict[float, int] = {}
    for place, name in enumerate(scored.best_first, 1):
        score, ratios = scored.profiles.scores[name], scored.profiles.ratios[name].values()
        kept, fastest = sum(map(math.isfinite, ratios)), sum(ratio <= 1 for ratio in ratios)
        rank = ranks.setdefault(score, place)
        rows.append((str(rank), name, f"{score:.4f}", f"{kept} of {len(ratios)}", str(fastest)))
    return rows


def to_csv(scored: Scored) -> str:
    """Submission, score and the ratio on each base workload, empty for a miss."""
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    workloads = scored.profiles.workloads
    writer.writerow(["submission", "score", *(csv_cell(f"ratio {workload}") for workload in workloads)])
    for name in scored.best_first:
        ratios = (scored.profiles.ratios[name][workload] for workload in workloads)
        cells = (ratio if math.isfinite(ratio) else "" for ratio in ratios)
        writer.writerow([csv_cell(name), scored.profiles.scores[name], *cells])
    return out.getvalue()


def to_markdown(scored: Scored) -> str:
    """The table as GitHub's Markdown, with the notes under it."""
    lines = [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    lines += [f"| {' | '.join(map(markdown_text, row))} |" for row in _cells(scored)]
    lines += ["", *(f"- {markdown_text(note, longest=400)}" for note in scored.notes)]
    return "\n".join(lines) + "\n"


def print_terminal(scored: Scored, console: Console, *, plot: str, curves: bool | None) -> None:
    """Print the table for people, and small curves under it: always, never, or (None) on a terminal alone."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from nanorun.records.report import clean
    from nanorun.records.terminal_plot import marks_for, small_multiples

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for title in TITLES:
        grid.add_column(title.lower(), justify="left" if title == "Submission" else "right", overflow="fold")
    for row in _cells(scored):
        grid.add_row(*(Text(encodable(clean(cell, longest=60), console.encoding)) for cell in row))
    console.print(grid)
    for note in scored.notes:
        console.print(Text(encodable(clean(note, longest=400), console.encoding), style="dim"))
    marks = marks_for(console.encoding, os.environ.get("TERM"))
    if marks is None or not (console.is_terminal if curves is None else curves):
        return
    x_label, y_label, series = _plot(scored, plot)
    lines = small_multiples(
        series,
        columns=console.width,
        marks=marks,
        x_label=x_label.replace("τ", "tau"),
        y_label=y_label,
        x_range=(1, TAU_MAX),
        y_range=(0, 1),
    )
    for line in lines:
        console.print(Text(encodable(line, console.encoding)), no_wrap=True, overflow="crop")


def to_svg(scored: Scored, plot: str) -> str:
    """One of the two pictures: the profiles, or the score against where the profile ends."""
    from nanorun.records.svg import line_chart

    x_label, y_label, series = _plot(scored, plot)
    title = {"profiles": "Performance profiles", "tau-max": "Score against τ max"}[plot]
    names = scored.profiles
    described = "; ".join(f"{name}: score {names.scores[name]:.4f}" for name in scored.best_first)
    return line_chart(
        series,
        title=f"{title}, {len(names.workloads)} workloads",
        x_label=x_label,
        y_label=y_label,
        x_range=(1, TAU_MAX),
        y_range=(0, 1),
        description=f"{y_label} against {x_label}. {described}.",
    )


def _plot(scored: Scored, plot: str) -> tuple[str, str, list[Series]]:
    """Labels of x and y, and a curve for each submission."""
    profiles, names = scored.profiles, scored.best_first
    if plot == "tau-max":
        curves = [Series(name, TAUS, profiles.score_by_tau_max(name)) for name in names]
        return "τ max, where the profile ends", "score", curves
    curves = [Series(name, TAUS, profiles.fractions[name]) for name in names]
    return "τ, time over the best time", "share of workloads", curves
