"""The records table: runs grouped into rows, rows judged and ranked, and the table told in four formats.

Everything here comes from files that anyone may have written, so every text is cleaned before a terminal sees
it, and escaped for the format it goes into.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanorun.errors import UserError, shown
from nanorun.records.record import Record, Skipped
from nanorun.records.significance import Rule, Verdict, compare_seconds, judge, mean, std
from nanorun.records.states import State, state_key

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

MACHINE_ONLY = ("seed", "train.micro_batch_rows", "train.compile", "train.checkpoint_activations")
"""Config keys that change how a run is computed and not what it computes, up to rounding."""
MACHINE_ONLY_TABLES = ("checkpoint.", "log.")
LATER_KEYS: dict[str, Any] = {
    "data.mix": {},
    "train.cycles": 1,
    "train.length_schedule": [],
    "average.kind": "none",
    "average.every_steps": 10,
    "average.from_step": 0,
    "average.snapshots": 5,
    "average.beta": 0.9,
}
"""Config keys that came after the first records, and what a record without them ran with."""
LONGEST_TEXT = 80
SHOWN_SKIPS = 10


@dataclasses.dataclass(frozen=True)
class TrackView:
    """What a report has to know of a track."""

    name: str
    target_val_loss: float
    scored_in: str
    """`seconds`, `steps` or `tokens` at the declared last step."""
    rule: Rule
    mixes_count: bool = False
    """Runs on a mix of corpora may count: the track leaves the corpus free, or fixes the mix."""

    @classmethod
    def of(cls, track: Any) -> TrackView:
        """The view of anything with the attributes of `nanorun.tracks.Track`."""
        asked = track.significance
        rule = Rule(rule=asked.rule, n=asked.n, alpha=asked.alpha, margin=asked.margin, sigma=asked.sigma)
        data = getattr(track, "fixed", {"data": {"corpus": ""}}).get("data", {})
        mixes_count = "corpus" not in data or bool(data.get("mix"))
        return cls(track.name, track.target_val_loss, track.scored_in, rule, mixes_count)


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seeds, as one line of the table.

    Means and spreads are over seeds; a seed that ran several times gives its mean. What is told at the
    declared last step comes from full runs alone: completed, and not allowed to stop on their own loss.
    """

    rank: int | None
    """Only for rows that count."""
    name: str
    """The preset's name, told apart as `muon (2)` where several rows share it."""
    preset: str
    differs: str
    """Where rows share a name: what sets this one apart."""
    optimizer: str
    counts: bool
    why: str
    """Why it counts, or why not."""
    n: int
    """Distinct seeds with full runs: what the rule counts."""
    seeds: int
    """Distinct seeds with any run."""
    runs: int
    seconds_mean: float | None
    """Counted training seconds at the declared last step."""
    seconds_std: float | None
    steps_mean: float | None
    tokens_mean: float | None
    loss_mean: float | None
    loss_std: float | None
    p_value: float | None
    margin: float | None
    """(target - mean)·√n, in nats."""
    reached_n: int
    """Seeds that crossed the target at some validation."""
    reached_seconds_mean: float | None
    """At the first crossing, over the seeds that crossed."""
    reached_seconds_std: float | None
    reached_step_mean: float | None
    distance: float | None
    """Where no seed crossed: the best validation loss less the target, in nats."""
    hardware: str
    date: str
    """Day of the latest run, UTC."""
    seconds: tuple[float, ...]
    """The seconds of each seed, in order of the seeds."""
    next_seed: int
    """One more than the largest seed that ran."""
    compile_seconds_mean: float | None = None
    """Compiling and warming up before the first step, of the runs with compiled code; no part of `seconds`."""
    reproduced: int = 0
    """Records of the row that somebody made again, and found to agree."""
    contested: int = 0
    """Records of the row that somebody found not to agree, or objected to."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A track's rows, best first, with all that has to be said about them."""

    track: TrackView
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    filtered_out: int
    """Records of this track that `hardware` and `since` left out."""
    runs: tuple[tuple[Record, ...], ...] = dataclasses.field(default=(), compare=False, repr=False)
    """What each row is made of, oldest first; from the index, with curves thinned."""


def build_table(
    track: TrackView,
    records: Iterable[Record],
    *,
    hardware: str | None = None,
    since: str | None = None,
    skipped: Iterable[Skipped] = (),
    states: Mapping[str, State] | None = None,
) -> Table:
    """Return the table of a track's records; records of other tracks are passed over.

    `states` are those of the records that are more than claimed, by `state_key`.

    `hardware` keeps the machines whose label contains it, `since` (a day or an ISO 8601 time, UTC where it
    names no zone) the runs made then or later. Raises UserError for a `since` that is neither.
    """
    start = moment(since)
    of_track = [record for record in records if record.track == track.name]
    kept = [
        record
        for record in of_track
        if (hardware is None or hardware.lower() in record.hardware.label.lower())
        and (start is None or datetime.datetime.fromisoformat(record.created) >= start)
    ]
    states = states or {}
    pairs = [(_with_states(row, group, states), group) for row, group in ranked_groups(track, kept)]
    notes = [note for row, group in pairs for note in _notes(row, group, track)]
    notes += [note for row, group in pairs for note in _state_notes(row, group, states)]
    rows = tuple(row for row, _ in pairs)
    if track.scored_in == "seconds" and len({row.hardware for row in rows if row.counts}) > 1:
        notes.append("ranks compare seconds of different hardware; --hardware keeps one machine")
    runs = tuple(tuple(group) for _, group in pairs)
    return Table(track, rows, tuple(notes), tuple(skipped), len(of_track) - len(kept), runs)


def ranked_groups(track: TrackView, records: Iterable[Record]) -> list[tuple[Row, list[Record]]]:
    """Return the rows of a track, best first, each with the records that it sums up, oldest first."""
    of_track = [record for record in records if record.track == track.name]
    usual = _usual_measurement(of_track)
    pairs = [(_summarized(group, track, usual), group) for group in row_groups(of_track)]
    pairs.sort(key=lambda pair: _order(pair[0], track.scored_in))
    return _told_apart(pairs)


def moment(since: str | None) -> datetime.datetime | None:
    """Return the time that `--since` says, or None without one; UserError where it is none."""
    if since is None:
        return None
    try:
        start = datetime.datetime.fromisoformat(since)
    except ValueError:
        raise UserError(
            f"--since {clean(since)!r} is no time; wanted a day such as 2026-11-24 or a time such as "
            "2026-11-24T12:30:00Z"
        ) from None
    return start if start.tzinfo else start.replace(tzinfo=datetime.UTC)


def row_groups(records: Iterable[Record]) -> list[list[Record]]:
    """Records that may be averaged with one another, oldest first in each group."""
    groups: dict[str, list[Record]] = {}
    known: dict[tuple[object, ...], str] = {}
    for record in sorted(records, key=lambda record: (record.created, record.id)):
        alike = _shared_parts(record)
        if alike not in known:
            known[alike] = json.dumps([record.name, record.optimizer, identity(record)], sort_keys=True)
        groups.setdefault(known[alike], []).append(record)
    return list(groups.values())


def _shared_parts(record: Record) -> tuple[object, ...]:
    """Equal only for records of one identity, and quick: tables that are one object are told by their address.

    Records from the index share theirs, so that thousands of runs are told apart without going through each config.
    """
    config = (
        (key, id(value) if isinstance(value, dict | list) else repr(value))
        for key, value in record.config.items()
        if key not in MACHINE_ONLY
    )
    parts = (record.code, record.hardware, record.corpus)
    numbers = (record.declared_steps, record.validation_tokens, record.target_val_loss)
    return record.name, record.optimizer, *map(id, parts), *numbers, *config


def identity(record: Record) -> dict[str, Any]:
    """All that two runs of one row have in common, the name aside, under dotted names."""
    outside = {"outside optimizer": record.code.outside} if record.code.outside else {}
    return {
        **with_mix(config_identity(record.config), record.corpus.mix_label),
        **outside,
        "train.steps": record.declared_steps,
        "hardware": record.hardware.label,
        "corpus manifest": record.corpus.manifest_sha256,
        "validation tokens": record.validation_tokens,
        "target": record.target_val_loss,
    }


def with_mix(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return a config's identity with its mix by what the corpora hold: their names and folders may differ."""
    if not label:
        return dict(config)
    return {key: value for key, value in config.items() if not key.startswith("data.mix.")} | {
        "data.mix": label
    }


def config_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config has in common with those of other seeds and machines, under dotted names."""
    kept = {
        key: value
        for key, value in _flat(config)
        if key not in MACHINE_ONLY and not key.startswith(MACHINE_ONLY_TABLES)
    }
    return {**LATER_KEYS, **kept}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _measurement(record: Record) -> tuple[str, int]:
    """What decides whether two validation losses are the same measurement."""
    return record.corpus.manifest_sha256, record.validation_tokens


def _usual_measurement(records: Sequence[Record]) -> tuple[str, int] | None:
    """The measurement of most records; of two as frequent, the one made last."""
    counts = Counter(map(_measurement, records))
    latest = {_measurement(record): record.created for record in sorted(records, key=lambda r: r.created)}
    return max(counts, key=lambda kind: (counts[kind], latest[kind]), default=None)


def is_full(record: Record) -> bool:
    """Whether the run's last loss is a fair sample at the declared last step."""
    return record.completed and not record.stop_at_target


def why_not_its_corpus(record: Record, track: TrackView) -> str:
    """Return why a run does not count on a track for what it trained on; empty where that is no reason."""
    if not record.corpus.mix or track.mixes_count:
        return ""
    ordered = sorted(record.corpus.mix, key=lambda one: (-one.share, one.name))
    parts = ", ".join(f"{one.name} {100 * one.share:.4g} %" for one in ordered)
    return f"trained on a mix of corpora ({parts}), and the track fixes its corpus"


def final_losses(records: Iterable[Record]) -> list[float]:
    """What a track's rule judges: the last loss of each seed's full runs, in order of the seeds."""
    return _by_seed((record for record in records if is_full(record)), lambda record: record.final_val_loss)


def _by_seed(records: Iterable[Record], value: Callable[[Record], float]) -> list[float]:
    """One value for each seed, in order of the seeds: the mean of its runs."""
    values: dict[int, list[float]] = {}
    for record in records:
        values.setdefault(record.seed, []).append(value(record))
    return [mean(values[seed]) for seed in sorted(values)]


def crossing_of(record: Record, target: float) -> tuple[int, float] | None:
    """Return (step, seconds) of the first validation at or under the track's target."""
    if record.target_val_loss == target:
        return (record.reached.step, record.reached.seconds) if record.reached else None
    points = (point for point in record.validation if point.val_loss <= target)
    return next(((point.step, point.train_seconds) for point in points), None)


def _summarized(group: Sequence[Record], track: TrackView, usual: tuple[str, int] | None) -> Row:
    """One group as a row, without its rank and with its preset's name."""
    target = track.target_val_loss
    full = [record for record in group if is_full(record)]
    losses = final_losses(group)
    seconds = _by_seed(full, lambda record: record.clock["train_seconds"])
    crossings = {record.id: crossing for record in group if (crossing := crossing_of(record, target))}
    crossed = [record for record in group if record.id in crossings]
    crossing_seconds = _by_seed(crossed, lambda record: crossings[record.id][1])
    best = min(min((p.val_loss for p in r.validation), default=r.final_val_loss) for r in group)
    verdict = _verdict(group, losses, track, usual)
    compiled = [record for record in full if record.software.compiled]
    return Row(
        rank=None,
        name=group[-1].name,
        preset=group[-1].name,
        differs="",
        optimizer=group[-1].optimizer,
        counts=verdict.passes,
        why=verdict.why,
        n=verdict.n,
        seeds=len({record.seed for record in group}),
        runs=len(group),
        seconds_mean=_mean_or_none(seconds),
        seconds_std=std(seconds),
        steps_mean=_mean_or_none(_by_seed(full, lambda record: record.steps)),
        tokens_mean=_mean_or_none(_by_seed(full, lambda record: record.tokens)),
        loss_mean=verdict.mean,
        loss_std=verdict.std,
        p_value=verdict.p_value,
        margin=verdict.margin,
        reached_n=len(crossing_seconds),
        reached_seconds_mean=_mean_or_none(crossing_seconds),
        reached_seconds_std=std(crossing_seconds),
        reached_step_mean=_mean_or_none(_by_seed(crossed, lambda record: crossings[record.id][0])),
        distance=None if crossed else best - target,
        hardware=group[-1].hardware.label,
        date=max(record.created for record in group)[:10],
        seconds=tuple(seconds),
        next_seed=max(record.seed for record in group) + 1,
        compile_seconds_mean=_mean_or_none(
            _by_seed(compiled, lambda record: record.clock["compile_seconds"])
        ),
    )


def _mean_or_none(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _verdict(
    group: Sequence[Record], losses: Sequence[float], track: TrackView, usual: tuple[str, int] | None
) -> Verdict:
    """The rule's verdict, and never a pass for other training data than the track's, nor for losses of another
    measurement than its other rows."""
    verdict = judge(track.rule, losses, track.target_val_loss)
    mixed = why_not_its_corpus(group[0], track)
    if mixed:
        return dataclasses.replace(verdict, passes=False, why=mixed)
    if _measurement(group[0]) == usual:
        return verdict
    return dataclasses.replace(
        verdict, passes=False, why="measured on another corpus or other validation tokens than most runs here"
    )


def _order(row: Row, scored_in: str) -> tuple[Any, ...]:
    """Sort key: rows that count by the track's score, then rows with a loss by it, then the rest."""
    score = {"seconds": row.seconds_mean, "steps": row.steps_mean, "tokens": row.tokens_mean}[scored_in]
    if row.counts:
        return 0, score, row.loss_mean, row.preset, row.date
    if row.loss_mean is not None:
        return 1, row.loss_mean, 0, row.preset, row.date
    return 2, 0, 0, row.preset, row.date


def _told_apart(pairs: Sequence[tuple[Row, list[Record]]]) -> list[tuple[Row, list[Record]]]:
    """The sorted rows with ranks, and with names and differences that tell rows of one preset apart."""
    taken = {row.preset for row, _ in pairs}
    by_preset: dict[str, list[int]] = {}
    for index, (row, _) in enumerate(pairs):
        by_preset.setdefault(row.preset, []).append(index)
    named = [row for row, _ in pairs]
    for preset, indices in by_preset.items():
        if len(indices) == 1:
            continue
        differences = _differences([pairs[index][1][0] for index in indices])
        number = 1
        for place, index in enumerate(indices):
            name = preset
            while place and name in taken:
                number += 1
                name = f"{preset} ({number})"
            taken.add(name)
            named[index] = dataclasses.replace(named[index], name=name, differs=differences[place])
    ranks = iter(range(1, len(pairs) + 1))
    ranked = [dataclasses.replace(row, rank=next(ranks) if row.counts else None) for row in named]
    return [(row, group) for row, (_, group) in zip(ranked, pairs)]


def _differences(records: Sequence[Record]) -> list[str]:
    """For each record, its values of the keys in which the records are not all alike."""
    absent = object()
    identities = [{"optimizer": record.optimizer, **identity(record)} for record in records]
    keys = list(dict.fromkeys(key for one in identities for key in one))
    first = identities[0]
    differing = [
        key for key in keys if any(one.get(key, absent) != first.get(key, absent) for one in identities[1:])
    ]
    return [
        "; ".join(f"{key} = {_value(one[key])}" for key in differing if key in one) or "fewer keys"
        for one in identities
    ]


def _value(value: object) -> str:
    """A config value in few characters; hashes by their first eight."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:8] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _notes(row: Row, group: Sequence[Record], track: TrackView) -> Iterator[str]:
    """All that a reader of this row has to know and the columns do not say."""
    if row.differs and row.differs != f"hardware = {row.hardware}":
        yield f"{row.name}: {row.differs}"
    if row.compile_seconds_mean is not None:
        spent = _seconds(row.compile_seconds_mean)
        yield f"{row.name}: compiled code; compiling and warming up took {spent} s a run, which seconds leave out"
    stopped = sum(record.stop_at_target for record in group)
    if stopped:
        yield f"{row.name}: {_runs(stopped)} could stop at the target: first crossing only, no final loss"
    broken = sum(not record.completed and not record.stop_at_target for record in group)
    if broken:
        yield f"{row.name}: {_runs(broken)} ended before the declared last step: first crossing only"
    skipped = sum(record.skipped_steps for record in group)
    if skipped:
        yield f"{row.name}: {skipped} step{_s(skipped)} not finite, whose updates were left out"
    inexact = sum(bool(record.inexact) for record in group)
    if inexact:
        yield f"{row.name}: {_runs(inexact)} taken up again elsewhere than begun, with other bits"
    repeats = row.runs - row.seeds
    if repeats:
        runs_and_seeds = f"{_runs(row.runs)} of {row.seeds} seed{_s(row.seeds)}"
        yield f"{row.name}: {runs_and_seeds}; a repeated seed counts once, by its mean"
    if group[0].target_val_loss != track.target_val_loss:
        made_for = group[0].target_val_loss
        yield f"{row.name}: made for the target {made_for:g}, judged here by {track.target_val_loss:g}"
    first_seeds: dict[str, int] = {}
    if any(first_seeds.setdefault(r.final_weights_sha256, r.seed) != r.seed for r in group if is_full(r)):
        yield f"{row.name}: different seeds ended with the same weights, so they are no independent runs"
    for what, kinds in _mixtures(group):
        if kinds > 1:
            yield f"{row.name}: averages runs of {kinds} {what}"
    if not row.counts:
        yield f"{row.name} does not count: {row.why}"


def _with_states(row: Row, group: Sequence[Record], states: Mapping[str, State]) -> Row:
    names = [states[key].name for key in map(state_key, group) if key in states]
    return dataclasses.replace(row, reproduced=names.count("reproduced"), contested=names.count("contested"))


def _state_notes(row: Row, group: Sequence[Record], states: Mapping[str, State]) -> Iterator[str]:
    """How many of the row's records are more than claimed, with the newest word on one; and broken files."""
    found = [(record, states[state_key(record)]) for record in group if state_key(record) in states]
    for name, count in (("contested", row.contested), ("reproduced", row.reproduced)):
        if count:
            record, state = [pair for pair in found if pair[1].name == name][-1]
            of = f"{count} of {row.runs} record{_s(row.runs)} {name}"
            yield f"{row.name}: {of}; {record.id}: {state.describe()}"
    for record, state in found:
        for path, why in state.broken[:SHOWN_SKIPS]:
            yield f"{row.name}: {record.id}/{path.parent.name}/{path.name} is passed over: {why}"


def _mixtures(group: Sequence[Record]) -> Iterator[tuple[str, int]]:
    """Differences that are averaged over all the same, and therefore named."""
    yield "states of the code", len({(r.code.version, r.code.commit, r.code.dirty) for r in group})
    yield "versions of torch", len({r.software.torch for r in group})
    yield "kinds, compiled and not", len({r.software.compiled for r in group})
    yield "kinds, deterministic and not", len({r.software.deterministic for r in group})
    yield "kinds, with kernels and without", len({r.software.kernels for r in group})


def _runs(count: int) -> str:
    return f"{count} run{_s(count)}"


def _s(count: int) -> str:
    return "s" if count != 1 else ""


def comparison_line(table: Table) -> str | None:
    """One line: which of the best two presets is sooner at the target, by how much, and how sure that is.

    None where there are fewer than two presets. It claims no ratio where a row does not count or the machines
    differ, and no sureness where the interval includes 1 or cannot be had.
    """
    best: dict[str, Row] = {}
    for row in table.rows:
        best.setdefault(row.preset, row)
    if len(best) < 2:
        return None
    first, second = list(best.values())[:2]
    target = f"{table.track.target_val_loss:g}"
    if first.counts and second.counts and table.track.scored_in != "seconds":
        return _comparison_of_counts(first, second, table.track)
    first, second = _on_one_machine(table, first, second)
    where = f", on {first.hardware}" if len({row.hardware for row in table.rows}) > 1 else ""
    if not (first.counts and second.counts):
        return _comparison_without_verdict(first, second, target)
    if first.hardware != second.hardware:
        return (
            f"{first.name} and {second.name} both count at {target}, on different hardware "
            f"({first.hardware}; {second.hardware}): their seconds are not compared"
        )
    return _comparison_of_seconds(first, second, target) + where


def _on_one_machine(table: Table, first: Row, second: Row) -> tuple[Row, Row]:
    """The best rows of the same two presets on one machine, the sooner first; as they came if there are none.

    Rows that do not count take no place of rows that do.
    """
    pairs = [
        (one, other)
        for one in table.rows
        for other in table.rows
        if (one.preset, other.preset) == (first.preset, second.preset)
        and one.hardware == other.hardware
        and (one.counts, other.counts) >= (first.counts, second.counts)
    ]
    if not pairs:
        return first, second
    one, other = pairs[0]
    later = (one.seconds_mean or 0) > (other.seconds_mean or 0)
    return (other, one) if one.counts and other.counts and later else (one, other)


def _comparison_of_seconds(first: Row, second: Row, target: str) -> str:
    """Both count, on one machine; `first` ranks before `second`."""
    assert first.seconds_mean is not None
    assert second.seconds_mean is not None
    if min(*first.seconds, *second.seconds) <= 0:
        return f"{first.name} and {second.name} both count at {target}, without seconds to compare"
    found = compare_seconds(second.seconds, first.seconds)
    start = (
        f"{first.name} reaches {target} in {_seconds(first.seconds_mean)} s, "
        f"{second.name} in {_seconds(second.seconds_mean)} s: "
    )
    ends = f"n = {found.n_b} and {found.n_a}"
    if found.low is None or found.high is None or found.p_value is None:
        return f"{start}{found.ratio:.2f} times sooner, too few runs to tell how sure that is ({ends})"
    test = (
        f"95 % interval {found.low:.2f} to {found.high:.2f}, Welch's t-test on log seconds, "
        f"{_p_equals(found.p_value)}, {ends}"
    )
    if found.low <= 1:
        return f"{start}no difference can be told (ratio {found.ratio:.2f}, {test})"
    return f"{start}{found.ratio:.2f} times sooner ({test})"


def _comparison_of_counts(first: Row, second: Row, track: TrackView) -> str:
    """Both count in a track scored in steps or tokens: declared numbers, no sample of anything."""
    what = track.scored_in
    mine, other = (
        (first.steps_mean, second.steps_mean) if what == "steps" else (first.tokens_mean, second.tokens_mean)
    )
    assert mine is not None
    assert other is not None
    ratio = f"{other / mine:.2f} times as many" if mine else "no ratio"
    return (
        f"{first.name} counts at {track.target_val_loss:g} after {mine:,.0f} {what}, {second.name} after "
        f"{other:,.0f}: {ratio} (declared numbers; each passed the rule, n = {first.n} and {second.n})"
    )


def _comparison_without_verdict(first: Row, second: Row, target: str) -> str:
    """At least one of the two does not count, so no ratio is claimed; first crossings are told as such."""
    wanting = [f"{row.name} does not count ({row.why})" for row in (first, second) if not row.counts]
    crossings = [
        f"{row.name} first crossed {target} at {_seconds(row.reached_seconds_mean)} s "
        f"in {row.reached_n} of {row.seeds} seeds"
        if row.reached_seconds_mean is not None
        else f"{row.name} came within {row.distance:.4f} of {target}"
        for row in (first, second)
    ]
    where = "" if first.hardware == second.hardware else ", on different hardware"
    return f"no ratio yet: {' and '.join(wanting)}; {', '.join(crossings)}{where}"


def rule_line(table: Table) -> str:
    """The sentence that says what counts in this track and how it is ranked."""
    return (
        f"counts: {table.track.rule.describe(table.track.target_val_loss)}; "
        f"ranked by {table.track.scored_in} there"
    )


def next_command(table: Table, presets: Sequence[str], place: str = "") -> str:
    """The command that this table asks for: a seed or a preset that is missing, else a run to beat the best.

    `place` is the option that says where records lie, if they lie elsewhere.
    """
    name, wanted = clean(table.track.name), table.track.rule.n
    may_count = [
        row for row, group in zip(table.rows, table.runs) if not why_not_its_corpus(group[0], table.track)
    ]
    lacking = next((row for row in may_count if row.n < wanted and row.preset in presets), None)
    absent = [preset for preset in presets if preset not in {row.preset for row in table.rows}]
    if lacking:
        more = f"--seed {lacking.next_seed} --seeds {wanted - lacking.n}"
        command = f"nanorun train --track {name} --optim {_as_word(lacking.preset)} {more}{place}"
        return f"{command}  # with the same --set, if there was one"
    if absent:
        return f"nanorun train --track {name} --optim {_as_word(absent[0])} --seeds {wanted}{place}"
    best = _as_word(next((row.preset for row in table.rows if row.preset in presets), "PRESET"))
    return (
        f"nanorun train --track {name} --optim {best} --seeds {wanted}{place} --set KEY=VALUE  # to beat it"
    )


def _as_word(name: str) -> str:
    """Return a file's name as one harmless word of a command that people copy into a shell."""
    return shlex.quote(shown(name))


def empty_line(table: Table) -> str | None:
    """For a table without rows: why, and the next command."""
    if table.rows:
        return None
    name = clean(table.track.name)
    if table.filtered_out:
        return f"None of the {_records(table.filtered_out)} of track {name} fits --hardware and --since."
    return f"No records of track {name} yet. Make one: nanorun train --track {name}"


def _records(count: int) -> str:
    return f"{count} record{_s(count)}"


def to_dict(table: Table) -> dict[str, Any]:
    """The table as JSON has it; a number that does not exist is null."""
    return {
        "track": table.track.name,
        "target_val_loss": table.track.target_val_loss,
        "scored_in": table.track.scored_in,
        "rule": dataclasses.asdict(table.track.rule),
        "rows": [dataclasses.asdict(row) for row in table.rows],
        "comparison": comparison_line(table),
        "notes": list(table.notes),
        "skipped": [{"path": str(path), "why": why} for path, why in table.skipped],
        "filtered_out": table.filtered_out,
    }


def to_csv(table: Table) -> str:
    """The rows as CSV; a text that a spreadsheet would take for a formula gets an apostrophe."""
    import csv
    import io

    names = [field.name for field in dataclasses.fields(Row) if field.name not in ("seconds", "next_seed")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in table.rows:
        writer.writerow([csv_cell(getattr(row, name)) for name in names])
    return out.getvalue()


def csv_cell(value: object) -> object:
    """Return what a CSV cell holds: nothing for None, and no formula."""
    if not isinstance(value, str):
        return "" if value is None else value
    text = clean(value, longest=None)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def to_markdown(table: Table) -> str:
    """The table as GitHub's Markdown, with the rule, the comparison and the notes under it."""
    lines = [f"### {markdown_text(table.track.name)}: validation loss {table.track.target_val_loss:g}", ""]
    empty = empty_line(table)
    if empty:
        lines += [markdown_text(empty), ""]
    else:
        titles = ["Rank", "Name", "Optimizer", "n", "Seconds", "First crossing", "Steps", "Tokens"]
        titles += ["Final loss", "p", "Counts", "Hardware", "Date"]
        lines.append(f"| {' | '.join(titles)} |")
        lines.append("|" + "---|" * len(titles))
        for row in table.rows:
            cells = [_rank(row), row.name, row.optimizer, str(row.n)]
            cells += [_spread(_seconds(row.seconds_mean), row.seconds_std, _seconds), _crossed(row, " ")]
            cells += [_count(row.steps_mean), _large(row.tokens_mean)]
            cells += [_spread(_loss(row.loss_mean), row.loss_std, _loss), _p(row.p_value)]
            cells += ["yes" if row.counts else "no", row.hardware, row.date]
            lines.append(f"| {' | '.join(map(markdown_text, cells))} |")
        lines.append("")
    for line in _lines_under(table):
        lines.append(f"- {markdown_text(line, longest=400)}")
    return "\n".join(lines) + "\n"


def markdown_text(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return text that Markdown shows as it is, HTML and links included."""
    return re.sub(r"([\\`*_\[\]|~<>&#!])", r"\\\1", clean(text, longest=longest))


def _lines_under(table: Table) -> Iterator[str]:
    """What stands under the table in every format for people, the hardware aside; the comparison is last."""
    if table.rows:
        yield rule_line(table)
    yield from table.notes
    for path, why in table.skipped[:SHOWN_SKIPS]:
        yield f"skipped {path}: {why}"
    if len(table.skipped) > SHOWN_SKIPS:
        yield f"skipped {len(table.skipped) - SHOWN_SKIPS} more; --json names them all"
    comparison = comparison_line(table)
    if comparison:
        yield comparison


def print_terminal(table: Table, console: Console) -> None:
    """Print the table for people, with three lines a row where one line does not fit."""
    from nanorun.records.terminal import say

    say(console, f"{table.track.name}: validation loss {table.track.target_val_loss:g}", "bold")
    empty = empty_line(table)
    if empty:
        say(console, empty)
    machines = list(dict.fromkeys(row.hardware for row in table.rows))
    if table.rows:
        wide = _rich_table(table, machines, console, narrow=False)
        unbound = console.options.update(max_width=10_000)
        fits = console.measure(wide, options=unbound).maximum <= console.width
        console.print(wide if fits else _rich_table(table, machines, console, narrow=True))
    for index, machine in enumerate(machines):
        say(
            console,
            f"hardware: {machine}" if len(machines) == 1 else f"hardware {_letter(index)}: {machine}",
            "dim",
        )
    comparison = comparison_line(table)
    for line in _lines_under(table):
        style = "bold" if line == comparison else "yellow" if line.startswith("skipped ") else "dim"
        say(console, line, style)


def _rich_table(table: Table, machines: Sequence[str], console: Console, *, narrow: bool) -> RichTable:
    """The rows as a rich table; nothing in it is markup, because every cell is a Text."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    texts = {"name", "optimizer", "date"}
    cells = [row_cells(row, machines, narrow) for row in table.rows]
    for title in cells[0]:
        grid.add_column(
            title.replace("_", " " if not narrow else "\n"),
            justify="left" if title in texts else "right",
            overflow="fold",
        )
    for row, values in zip(table.rows, cells):
        style = "" if row.counts else "dim"
        grid.add_row(*(Text(encodable(value, console.encoding)) for value in values.values()), style=style)
    return grid


def row_cells(row: Row, machines: Sequence[str], narrow: bool = False) -> dict[str, str]:
    """Title to text of one row; `_` in a title is where it may break."""
    joint = "\n" if narrow else " "
    name, optimizer = clean(row.name, longest=32), clean(row.optimizer, longest=32)
    cells = {"#": _rank(row), "name": f"{name}\n{optimizer}\n{row.date}" if narrow else name}
    if not narrow:
        cells["optimizer"] = optimizer
    cells |= {
        "n": str(row.n),
        "seconds": _spread(_seconds(row.seconds_mean), row.seconds_std, _seconds, joint),
        "first_crossing": _crossed(row, joint),
        "steps": _count(row.steps_mean),
        "tokens": _large(row.tokens_mean),
        "final_loss": _spread(_loss(row.loss_mean), row.loss_std, _loss, joint),
    }
    counts = "yes" if row.counts else "no"
    if narrow:
        cells["p,_counts"] = f"{_p(row.p_value)}\n{counts}"
    else:
        cells |= {"p": _p(row.p_value), "counts": counts, "date": row.date}
    if len(machines) > 1:
        cells["hw"] = _letter(machines.index(row.hardware))
    return cells


def clean(text: str, longest: int | None = LONGEST_TEXT) -> str:
    """Text without control characters or direction marks, cut to a length fit for a table."""
    shown = "".join(char if char.isprintable() else "?" for char in text)
    return shown if longest is None or len(shown) <= longest else shown[: longest - 3] + "..."


def encodable(text: str, encoding: str) -> str:
    """Return text that a terminal of this encoding can show."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        for sign, plain in {"±": "+-", "≥": ">=", "√": "sqrt", "×": "x", "·": "*"}.items():
            text = text.replace(sign, plain)
        return text.encode("ascii", "replace").decode("ascii")
    return text


def _letter(index: int) -> str:
    """A, B, … Z, then 27, 28, …"""
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _rank(row: Row) -> str:
    return "-" if row.rank is None else str(row.rank)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _large(value: float | None) -> str:
    """A count in three digits or so: 8.19M."""
    if value is None:
        return "-"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.0f}"


def _spread(shown: str, deviation: float | None, form: Callable[[float], str], joint: str = " ") -> str:
    return shown if deviation is None else f"{shown}{joint}±{form(deviation)}"


def _crossed(row: Row, joint: str) -> str:
    """Seconds and step of the first crossing, over how many seeds; or how far from the target it ended."""
    if row.reached_seconds_mean is None:
        return "-" if row.distance is None else f"{row.distance:+.4f}{joint}away"
    share = "" if row.reached_n == row.seeds else f"{joint}({row.reached_n} of {row.seeds})"
    spread = _spread(_seconds(row.reached_seconds_mean), row.reached_seconds_std, _seconds, joint)
    return f"{spread}{joint}step {_count(row.reached_step_mean)}{share}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _p_equals(value: float) -> str:
    return f"p {_p(value)}".replace("<", "< ") if value < 0.0001 else f"p = {_p(value)}"
