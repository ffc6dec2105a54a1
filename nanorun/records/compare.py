"""Two sets of runs against each other: losses, time and steps to the target, and what differs between them.

A is compared with B as it is given: a difference is A's less B's, a ratio A's over B's. Nothing is averaged over
what sets the runs of one side apart, and losses that were measured on different data are refused, unless asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanorun.errors import UserError
from nanorun.records.report import LATER_KEYS
from nanorun.records.runs import (
    VAL_LOSS,
    ComparedRun,
    RunGroup,
    RunsRead,
    by_seed,
    group_runs,
    read_runs,
    shown,
)
from nanorun.records.significance import (
    DifferenceEstimate,
    RatioEstimate,
    compare_means,
    compare_seconds,
    mean,
    std,
)
from nanorun.records.verify import LeftOut, require_loss, require_runs, seconds_of, split_runs

if TYPE_CHECKING:
    from rich.console import Console

SLOPE_SHARE = 0.1
"""The slope of a curve near its end is taken over this share of its steps."""
SHOWN_DIFFERENCES = 12
MOST_SOURCE_LINES = 100
"""Lines of code told of each side."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two sets."""

    name: str
    """As it was given."""
    group: RunGroup
    judged: tuple[tuple[ComparedRun, int], ...]
    """The runs whose loss is a fair sample, each with the step it is read at."""
    left_out: tuple[LeftOut, ...]
    losses: tuple[float, ...]
    found: RunsRead

    @property
    def step(self) -> int | None:
        """The step that the losses are of; None where they are of several."""
        steps = {step for _, step in self.judged}
        return steps.pop() if len(steps) == 1 else None


@dataclasses.dataclass(frozen=True)
class Crossings:
    """When one side's runs were first at or under the target: seconds and steps, one for each seed."""

    runs: int
    reached: int
    seconds: tuple[float, ...]
    steps: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What the difference of the losses is worth in steps of A."""

    slope: float
    """Nats a step, of A's mean curve near its end."""
    from_step: int
    to_step: int
    steps: float
    """Steps by which A would have to go on (or, below 0, could stop sooner) to have B's loss."""
    low: float | None
    high: float | None
    net_steps: float | None
    """The same plus the steps that B declares fewer than A."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that is told of A and B."""

    a: Side
    b: Side
    loss: str
    target: float | None
    difference: DifferenceEstimate
    crossings: tuple[Crossings, Crossings] | None
    ratios: Mapping[str, RatioEstimate | None]
    """Of seconds and steps to the target, and of seconds at the step compared."""
    exchange: Exchange | None
    differs: Mapping[str, Mapping[str, tuple[Any, Any]]]
    source_diff: tuple[str, ...]
    weaknesses: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """What `nanorun compare --json` prints."""
        crossings = self.crossings or (None, None)
        return {
            "a": _side_dict(self.a, self.loss, crossings[0]),
            "b": _side_dict(self.b, self.loss, crossings[1]),
            "loss": self.loss,
            "target": self.target,
            "difference": dataclasses.asdict(self.difference),
            "ratios": {key: one and dataclasses.asdict(one) for key, one in self.ratios.items()},
            "exchange": self.exchange and dataclasses.asdict(self.exchange),
            "differs": {
                part: {key: {"a": a, "b": b} for key, (a, b) in found.items()}
                for part, found in self.differs.items()
            },
            "source_diff": list(self.source_diff),
            "weaknesses": list(self.weaknesses),
            "test": TEST,
            "skipped": [
                {"file": one.file, "why": one.why} for side in (self.a, self.b) for one in side.found.skipped
            ],
        }


TEST = (
    "test: Welch's t-test of the losses, two-sided, 95 % interval, and Hedges' g over the pooled spread; seconds and "
    "steps by Welch's t-test on their logarithms; assumes independent runs, none left away for its loss, and normal "
    "losses (log-normal seconds); the exchange takes A's slope near its end as exact, and that A would go on along it"
)


def _side_dict(side: Side, loss: str, crossings: Crossings | None) -> dict[str, Any]:
    seconds = seconds_of(side.judged, loss)
    return {
        "name": side.name,
        "label": side.group.label,
        "n": len(side.losses),
        "step": side.step,
        "mean_loss": mean(side.losses) if side.losses else None,
        "std_loss": std(side.losses),
        "losses": list(side.losses),
        "seconds_mean": mean(seconds) if seconds else None,
        "to_target": crossings
        and {
            "runs": crossings.runs,
            "reached": crossings.reached,
            "seconds_mean": mean(crossings.seconds) if crossings.seconds else None,
            "steps_mean": mean(crossings.steps) if crossings.steps else None,
        },
        "files": [run.file for run, _ in side.judged],
        "labels": [run.label for run, _ in side.judged],
        "left_out": [dataclasses.asdict(one) for one in side.left_out],
    }


def compare(
    a: str,
    b: str,
    *,
    loss: str = VAL_LOSS,
    step: int | None = None,
    target: float | None = None,
    pool: bool = False,
    force: bool = False,
    records: Path = Path("records"),
) -> Comparison:
    """Return the comparison of the runs at `a` with those at `b`.

    Raises UserError where a side is no single group of runs, or the two were measured on different data.
    """
    if target is not None and not 0 < target < math.inf:
        raise UserError(f"--target is {target:g}; wanted a loss in nats above 0")
    sides = [_side(name, loss, step, pool, records) for name in (a, b)]
    one, other = sides
    if not force:
        _refuse_other_data(one, other)
    runs = [*one.group.runs, *other.group.runs]
    targets = {run.target for run in runs}
    if target is None and len(targets) == 1:
        target = targets.pop()
    crossings = None if target is None else (_crossings(one, loss, target), _crossings(other, loss, target))
    difference = compare_means(one.losses, other.losses)
    differs = {part: found for part, values in PARTS.items() if (found := _differences(one, other, values))}
    same_machine = force or "hardware" not in differs
    return Comparison(
        a=one,
        b=other,
        loss=loss,
        target=target,
        difference=difference,
        crossings=crossings,
        ratios=_ratios(one, other, loss, crossings, same_machine),
        exchange=_exchange(one, other, loss, difference),
        differs=differs,
        source_diff=_source_diff(one, other),
        weaknesses=tuple(_weaknesses(one, other, crossings, same_machine)),
    )


def _side(name: str, loss: str, step: int | None, pool: bool, records: Path) -> Side:
    """Return the one group of runs at `name`; raises UserError where there are several, or none to compare."""
    found = read_runs([name], records=records)
    require_runs(found, [name])
    require_loss(found.runs, loss)
    groups = group_runs(found.runs, pool=pool)
    if len(groups) > 1:
        listed = "; ".join(
            f"{group.label}, n = {len(group.runs)}{f' ({group.apart})' if group.apart else ''}"
            for group in groups[:8]
        )
        more = f"; and {len(groups) - 8} more" if len(groups) > 8 else ""
        raise UserError(
            f"{name} holds {len(groups)} groups of runs that are never averaged in silence: {listed}{more}. Choose one "
            f"by a narrower path (such as {groups[0].runs[0].file}), a pattern such as 'logs/a*.txt' or "
            "track:optimizer; or average them all the same with --pool"
        )
    judged, left_out = split_runs(groups[0].runs, loss, step)
    if not judged:
        why = "; ".join(f"{one.file}: {one.why}" for one in left_out[:3])
        raise UserError(f"{name}: no run to compare ({why}); --step N compares at a step that the runs have")
    readings = [(run, reading.loss) for run, at in judged if (reading := run.at(loss, at))]
    return Side(name, groups[0], tuple(judged), tuple(left_out), tuple(by_seed(readings)), found)


def _refuse_other_data(a: Side, b: Side) -> None:
    """Raise UserError where the runs are known to differ in corpus or in validation tokens."""
    runs = [*a.group.runs, *b.group.runs]
    for what, values in (
        ("corpora", {run.corpus["manifest_sha256"] for run in runs if "manifest_sha256" in run.corpus}),
        ("validation tokens", {run.validation_tokens for run in runs if run.validation_tokens is not None}),
    ):
        if len(values) > 1:
            raise UserError(
                f"{a.name} and {b.name} were measured on different {what} ({', '.join(sorted(map(shown, values)))}), "
                "so their losses are different measurements; --force compares them all the same"
            )


def _crossings(side: Side, loss: str, target: float) -> Crossings:
    """Return when each run of a side first read `target` or less, complete or not."""
    found = []
    for run in side.group.runs:
        reading = next((one for one in run.curves.get(loss, ()) if one.loss <= target), None)
        if reading:
            found.append((run, reading))
    return Crossings(
        runs=len(side.group.runs),
        reached=len(found),
        seconds=tuple(by_seed((run, one.seconds) for run, one in found if one.seconds is not None)),
        steps=tuple(by_seed((run, float(one.step)) for run, one in found)),
    )


def _ratios(
    a: Side, b: Side, loss: str, crossings: tuple[Crossings, Crossings] | None, same_machine: bool
) -> dict[str, RatioEstimate | None]:
    """A's over B's: seconds and steps to the target, seconds at the step compared. Seconds only on one machine."""
    out: dict[str, RatioEstimate | None] = {"steps_to_target": None, "seconds_to_target": None}
    if crossings:
        out["steps_to_target"] = _ratio(crossings[0].steps, crossings[1].steps)
        if same_machine:
            out["seconds_to_target"] = _ratio(crossings[0].seconds, crossings[1].seconds)
    out["seconds"] = _ratio(seconds_of(a.judged, loss), seconds_of(b.judged, loss)) if same_machine else None
    return out


def _ratio(a: Sequence[float], b: Sequence[float]) -> RatioEstimate | None:
    try:
        return compare_seconds(a, b)
    except ValueError:  # nothing there, or a time or step of 0
        return None


def _exchange(a: Side, b: Side, loss: str, difference: DifferenceEstimate) -> Exchange | None:
    """Return what the difference is worth in steps; None where A's curve is not known to fall near its end."""
    if a.step is None:
        return None
    runs = [run for run, _ in a.judged]
    curves = [{reading.step: reading.loss for reading in run.curves[loss]} for run in runs]
    common = sorted(step for step in set.intersection(*(set(one) for one in curves)) if step <= a.step)
    near = [step for step in common if step >= a.step * (1 - SLOPE_SHARE)]
    near = near if len(near) >= 2 else common[-2:]
    if len(near) < 2:
        return None
    losses = [mean(by_seed((run, one[step]) for run, one in zip(runs, curves))) for step in near]
    slope = _slope(near, losses)
    if not slope < 0:
        return None

    def worth(nats: float | None) -> float | None:
        return None if nats is None else nats / -slope

    steps = difference.difference / -slope
    net = None if b.step is None else steps + a.step - b.step
    return Exchange(slope, near[0], near[-1], steps, worth(difference.low), worth(difference.high), net)


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of the line of least squares."""
    x_mean, y_mean = mean(x), mean(y)
    across = math.fsum((one - x_mean) ** 2 for one in x)
    return math.fsum((one - x_mean) * (other - y_mean) for one, other in zip(x, y)) / across


def _config_of(run: ComparedRun) -> Mapping[str, Any]:
    if run.config is None:
        return {}
    return {key: value for key, value in {**LATER_KEYS, **run.config}.items() if key != "seed"}


PARTS: dict[str, Callable[[ComparedRun], Mapping[str, Any]]] = {
    "config": _config_of,
    "code": lambda run: run.code,
    "corpus": lambda run: {**run.corpus, "validation tokens": run.validation_tokens},
    "hardware": lambda run: run.hardware,
    "software": lambda run: run.software,
}
"""What may differ between two sides: the parts of a run, each as keys and values."""


def _differences(
    a: Side, b: Side, values_of: Callable[[ComparedRun], Mapping[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which the sides are not alike, with both sides' values (a list where a side has several)."""
    sides = [[values_of(run) for run in side.group.runs] for side in (a, b)]
    found = {}
    for key in dict.fromkeys(key for side in sides for values in side for key in values):
        one, other = ({repr(values.get(key)): values.get(key) for values in side} for side in sides)
        if set(one) != set(other):
            found[key] = (_one_or_all(list(one.values())), _one_or_all(list(other.values())))
    return found


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _source_diff(a: Side, b: Side) -> tuple[str, ...]:
    """Return the lines of embedded code that only one side's first log has, `-` A's and then `+` B's.

    Lines are counted and not aligned: that takes no longer for code which somebody made hard to align.
    """
    sources = [side.group.runs[0].source for side in (a, b)]
    if sources[0] is None or sources[1] is None or sources[0] == sources[1]:
        return ()
    one, other = ([line.rstrip() for line in source.splitlines()] for source in sources if source is not None)
    only_a, only_b = _lines_only_in(one, other), _lines_only_in(other, one)
    if not only_a and not only_b:
        return ("the same lines, in another order or spaced in another way",)
    return (*_marked("-", only_a), *_marked("+", only_b))


def _lines_only_in(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """The lines of `one`, in their order, that `other` does not have as often."""
    left = Counter(other)
    found = []
    for line in one:
        if left[line] > 0:
            left[line] -= 1
        else:
            found.append(line)
    return found


def _marked(sign: str, lines: Sequence[str]) -> list[str]:
    extra = len(lines) - MOST_SOURCE_LINES
    cut = [f"{sign} and {extra} more lines"] if extra > 0 else []
    return [*(f"{sign}{line}" for line in lines[:MOST_SOURCE_LINES]), *cut]


def _weaknesses(
    a: Side, b: Side, crossings: tuple[Crossings, Crossings] | None, same_machine: bool
) -> Iterator[str]:
    """What a reader has to know before believing the comparison."""
    if a.step != b.step or a.step is None:
        yield f"the losses are of different steps: {_step(a)} and {_step(b)}"
    for name, side in (("A", a), ("B", b)):
        for key, values in side.group.differs.items():
            yield f"{name} is pooled over {len(values)} values of {key}: {', '.join(map(shown, values))}"
        if side.left_out:
            yield f"{name}: {len(side.left_out)} of {len(side.group.runs)} runs are left out of the losses"
        repeats = len(side.judged) - len(side.losses)
        if repeats:
            yield f"{name}: a repeated seed counts once, by its mean"
        if len(side.losses) < 2:
            yield f"{name} has one run, so there is no interval"
    shared = {(run.file, run.place) for run in a.group.runs} & {(run.file, run.place) for run in b.group.runs}
    if shared:
        yield f"{len(shared)} run{'s' * (len(shared) != 1)} on both sides: they are no independent samples"
    runs = [*a.group.runs, *b.group.runs]
    if any(run.validation_tokens is None or "manifest_sha256" not in run.corpus for run in runs):
        yield "some runs do not say their corpus or validation tokens: that they are the same is taken for granted"
    if crossings:
        for name, one in zip("AB", crossings):
            if one.reached < one.runs:
                yield (
                    f"{name} reached the target in {one.reached} of {one.runs} runs: seconds and steps to it are of "
                    "those alone"
                )
    unsaid = any(not run.hardware for run in runs)
    if not same_machine:
        which = "hardware that is not known to be the same" if unsaid else "different hardware"
        yield f"on {which}, so no ratio of seconds; --force gives it"
    elif unsaid:
        yield "some runs do not say their hardware: that their seconds are of one machine is taken for granted"


def _step(side: Side) -> str:
    return "several" if side.step is None else f"{side.step:,}"


def print_comparison(result: Comparison, console: Console) -> None:
    """Print the comparison for people."""
    from nanorun.records.terminal import print_grid, say

    rows = [
        _cells(name, side, result, place)
        for place, (name, side) in enumerate(zip("AB", (result.a, result.b)))
    ]
    titles = ["", "runs", "n", "step", result.loss, "seconds", "steps to target", "seconds to target"]
    print_grid(console, titles, rows, left=("", "runs"))
    for line in _lines(result):
        say(console, line)
    for part, found in result.differs.items():
        told = [f"{key}: {shown(one)} | {shown(other)}" for key, (one, other) in found.items()]
        more = [f"and {len(told) - SHOWN_DIFFERENCES} more"] if len(told) > SHOWN_DIFFERENCES else []
        say(
            console,
            f"differs in {part} (A | B): {'; '.join([*told[:SHOWN_DIFFERENCES], *more])}",
            longest=1200,
        )
    for sign in "-+":
        lines = [line for line in result.source_diff if line.startswith(sign)]
        for line in lines[: SHOWN_DIFFERENCES // 2]:
            say(console, f"  {line}", "dim", longest=120)
        if len(lines) > SHOWN_DIFFERENCES // 2:
            say(console, f"  {sign} and more lines of code; --json tells more of them", "dim")
    for line in result.weaknesses:
        say(console, f"weak: {line}", "yellow")
    for side in (result.a, result.b):
        for left in side.left_out[:10]:
            say(console, f"left out {left.file}: {left.why}", "yellow")
        for skip in side.found.skipped[:10]:
            say(console, f"skipped {skip.file}: {skip.why}", "yellow")
    say(console, TEST, "dim", longest=600)


def _cells(name: str, side: Side, result: Comparison, place: int) -> list[str]:
    spread = std(side.losses)
    seconds = seconds_of(side.judged, result.loss)
    crossings = result.crossings[place] if result.crossings else None
    return [
        name,
        side.group.label,
        str(len(side.losses)),
        _step(side),
        f"{mean(side.losses):.5f}" + ("" if spread is None else f" ±{spread:.5f}"),
        f"{mean(seconds):,.1f}" if seconds else "-",
        f"{mean(crossings.steps):,.0f}" if crossings and crossings.steps else "-",
        f"{mean(crossings.seconds):,.1f}" if crossings and crossings.seconds else "-",
    ]


def _lines(result: Comparison) -> Iterator[str]:
    """The difference, the ratios and the exchange, a sentence each."""
    found = result.difference
    sides = "higher" if found.difference > 0 else "lower"
    start = (
        f"A's {result.loss} is {abs(found.difference):.5f} nats {sides}"
        if found.difference
        else "no difference"
    )
    if found.low is None or found.high is None or found.p_value is None:
        yield f"{start} (no interval: too few runs or no spread; n = {found.n_a} and {found.n_b})"
    else:
        effect = "" if found.effect_size is None else f", Hedges' g = {found.effect_size:.2f}"
        verdict = "" if found.low > 0 or found.high < 0 else "; no difference can be told"
        yield (
            f"{start} (A - B: 95 % interval {found.low:+.5f} to {found.high:+.5f}, p = {found.p_value:.2g}{effect}, "
            f"n = {found.n_a} and {found.n_b}){verdict}"
        )
    for key, what in (
        ("seconds_to_target", f"seconds to {result.target:g}" if result.target else ""),
        ("steps_to_target", f"steps to {result.target:g}" if result.target else ""),
        ("seconds", "seconds at the step compared"),
    ):
        ratio = result.ratios[key]
        if ratio:
            interval = (
                "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.3f} to {ratio.high:.3f})"
            )
            yield f"{what}: A takes {ratio.ratio:.3f} times B's{interval}"
    yield _exchange_line(result)


def _exchange_line(result: Comparison) -> str:
    found = result.exchange
    if found is None:
        return "step exchange: A's curve does not fall near its end, or has too few readings there"
    slope = f"A falls by {-found.slope * 100:.4f} nats in 100 steps, over steps {found.from_step} to {found.to_step}"
    who = "has to go on for" if found.steps > 0 else "can stop sooner by"
    interval = "" if found.low is None or found.high is None else f" ({found.low:+.0f} to {found.high:+.0f})"
    worth = f"to have B's loss A {who} {abs(found.steps):.0f} steps{interval}"
    net = ""
    if found.net_steps is not None and result.a.step != result.b.step:
        saves = "saves" if found.net_steps >= 0 else "takes more, by"
        net = f"; with {_step(result.b)} declared steps against {_step(result.a)}, B {saves} "
        net += f"{abs(found.net_steps):.0f} steps of A's in all"
    return f"step exchange: {worth}; {slope}{net}"
