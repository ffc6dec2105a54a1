"""Whether runs prove what is claimed of them: the mean loss of each group against a target, by a stated rule.

Groups are never averaged over what sets their runs apart unless `pool` asks for it, and then it is named. What
weakens a claim is named as well, and never repaired in silence.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanorun.errors import RunFailed, UserError, nearest
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
from nanorun.records.significance import Rule, Verdict, judge, mean, std

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_ALPHA = 0.01


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is to be verified."""

    target: float
    rule: Rule
    step: int | None
    """The claimed step; the declared last one where it is None."""
    loss: str
    track: str | None
    """The track that target or rule were taken from."""


@dataclasses.dataclass(frozen=True)
class RuleOptions:
    """What the command line says of the rule; None where it says nothing."""

    rule: str | None = None
    alpha: float | None = None
    margin: float | None = None
    sigma: float | None = None
    n: int | None = None


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A run that no mean includes, and why."""

    file: str
    why: str


@dataclasses.dataclass(frozen=True)
class GroupVerdict:
    """One group, judged."""

    label: str
    apart: str
    """What sets it apart from groups called the same, but for a number."""
    n: int
    """Losses judged: one for each seed of ours, or for each run of foreign logs."""
    step: int | None
    """None where pooled runs end at different steps."""
    mean_loss: float | None
    std_loss: float | None
    p_value: float | None
    margin: float | None
    """(target - mean)·√n, in nats."""
    passes: bool
    why: str
    earliest_passing_step: int | None
    """The first step read in every run that is judged at which the rule passes."""
    holds_on: bool | None
    """Whether the rule passes at every later step too."""
    seconds_mean: float | None
    seconds_std: float | None
    losses: tuple[float, ...]
    files: tuple[str, ...]
    """The file or folder of each run that is judged; a file of several runs stands once for each."""
    labels: tuple[str, ...]
    """The same, with the place in the file."""
    left_out: tuple[LeftOut, ...]
    weaknesses: tuple[str, ...]
    notes: tuple[str, ...]
    identity: dict[str, Any]
    """What all its runs have in common."""


def resolve_rule(options: RuleOptions, track_rule: Rule | None) -> Rule:
    """Return the rule that the options ask for, the track's where they are silent.

    Raises UserError for options that contradict one another or lack something.
    """
    kind = options.rule or _implied_kind(options) or (track_rule.rule if track_rule else "t")
    takes = {"t": ("alpha",), "z": ("alpha", "sigma"), "margin": ("margin",)}
    if kind not in takes:
        raise UserError(f"--rule {kind}: wanted t, z or margin.{nearest(kind, list(takes))}")
    given = {key: getattr(options, key) for key in ("alpha", "margin", "sigma")}
    for key, value in given.items():
        if value is not None and key not in takes[kind]:
            raise UserError(
                f"--{key} has no place in the rule {kind!r}, which takes "
                f"{' and '.join(f'--{name}' for name in takes[kind])}: leave it out, or choose another --rule"
            )
    same = track_rule if track_rule and track_rule.rule == kind else None
    values = {}
    for key in takes[kind]:
        values[key] = given[key] if given[key] is not None else getattr(same, key, None)
        if values[key] is None and key == "alpha":
            values[key] = DEFAULT_ALPHA
        if values[key] is None:
            raise UserError(f"the rule {kind!r} needs --{key}")
    # Whoever states a rule of their own is not held to the number of seeds that the track's rule asks for.
    is_own = any(value is not None for value in (options.rule, *given.values()))
    n = options.n if options.n is not None else track_rule.n if track_rule and not is_own else 1
    try:
        return Rule(kind, n, **values)
    except ValueError as error:
        raise UserError(str(error).replace("significance.", "--")) from None


def _implied_kind(options: RuleOptions) -> str | None:
    if options.margin is not None and options.sigma is not None:
        raise UserError("--margin and --sigma belong to different rules: choose --rule margin or --rule z")
    return "margin" if options.margin is not None else "z" if options.sigma is not None else None


def resolve_claim(
    runs: Sequence[ComparedRun],
    options: RuleOptions,
    *,
    target: float | None,
    track: str | None,
    step: int | None,
    loss: str,
) -> Claim:
    """Return the claim; target and rule come from `track`, or from the one track that all runs are records of."""
    from nanorun.records.report import TrackView
    from nanorun.tracks import load_track

    view = TrackView.of(load_track(track)) if track else None
    if view is None and len({run.track for run in runs}) == 1 and runs[0].track:
        try:
            view = TrackView.of(load_track(runs[0].track))
        except UserError:
            if target is None:
                raise
    if target is None:
        if view is None:
            raise UserError("no target to verify against: add --target LOSS (such as 3.28), or --track NAME")
        target = view.target_val_loss
    if not 0 < target < math.inf:
        raise UserError(f"--target is {target:g}; wanted a loss in nats above 0")
    rule = resolve_rule(options, view.rule if view else None)
    return Claim(target, rule, step, loss, view.name if view else None)


def judge_group(group: RunGroup, claim: Claim) -> GroupVerdict:
    """Return what the claim's rule says of a group, and all that weakens it."""
    judged, left_out = split_runs(group.runs, claim.loss, claim.step)
    pairs = [(run, reading.loss) for run, step in judged if (reading := run.at(claim.loss, step))]
    losses = by_seed(pairs)
    verdict = judge(claim.rule, losses, claim.target)
    steps = {step for _, step in judged}
    seconds = seconds_of(judged, claim.loss)
    earliest, holds_on = _earliest([run for run, _ in judged], claim)
    runs = [run for run, _ in judged]
    return GroupVerdict(
        label=group.label,
        apart=group.apart,
        n=verdict.n,
        step=steps.pop() if len(steps) == 1 else None,
        mean_loss=verdict.mean,
        std_loss=verdict.std,
        p_value=verdict.p_value,
        margin=verdict.margin,
        passes=verdict.passes,
        why=verdict.why,
        earliest_passing_step=earliest,
        holds_on=holds_on,
        seconds_mean=mean(seconds) if seconds else None,
        seconds_std=std(seconds),
        losses=tuple(losses),
        files=tuple(run.file for run in runs),
        labels=tuple(run.label for run in runs),
        left_out=tuple(left_out),
        weaknesses=tuple(_weaknesses(group, judged, verdict, claim)),
        notes=tuple(f"{run.label}: {note}" for run in group.runs for note in run.notes),
        identity=dict(group.identity),
    )


def split_runs(
    runs: Sequence[ComparedRun], loss: str, step: int | None
) -> tuple[list[tuple[ComparedRun, int]], list[LeftOut]]:
    """Return the runs whose loss is a fair sample, each with the step it is read at, and the others with why.

    `step` None is each run's declared last step.
    """
    judged, left_out = [], []
    for run in runs:
        at = run.last_step if step is None else step
        if run.stops_on_loss:
            left_out.append(LeftOut(run.label, "it could stop on its own validation loss"))
        elif step is None and not run.complete:
            declared = "its last step" if run.declared_steps is None else f"step {run.declared_steps}"
            left_out.append(LeftOut(run.label, f"its last validation is of step {at}, before {declared}"))
        elif loss not in run.curves:
            left_out.append(LeftOut(run.label, f"it has no {loss}, only {', '.join(sorted(run.curves))}"))
        elif run.at(loss, at) is None:
            last = f"; its last one is of step {run.last_step}"
            left_out.append(LeftOut(run.label, f"it has no reading of {loss} at step {at}{last}"))
        else:
            judged.append((run, at))
    return judged, left_out


def seconds_of(judged: Sequence[tuple[ComparedRun, int]], loss: str) -> list[float]:
    """The counted seconds at the step judged, one for each seed; of the runs that have a clock."""
    return by_seed(
        (run, reading.seconds)
        for run, step in judged
        if (reading := run.at(loss, step)) and reading.seconds is not None
    )


def _earliest(runs: Sequence[ComparedRun], claim: Claim) -> tuple[int | None, bool | None]:
    """(the first step read in all runs at which the rule passes, whether it passes at all later ones)."""
    if not runs:
        return None, None
    losses = [{reading.step: reading.loss for reading in run.curves[claim.loss]} for run in runs]
    common = sorted(set.intersection(*(set(one) for one in losses)))
    passes = {
        step: judge(
            claim.rule, by_seed((run, one[step]) for run, one in zip(runs, losses)), claim.target
        ).passes
        for step in common
    }
    first = next((step for step in common if passes[step]), None)
    return first, None if first is None else all(passes[step] for step in common if step >= first)


def _weaknesses(
    group: RunGroup, judged: Sequence[tuple[ComparedRun, int]], verdict: Verdict, claim: Claim
) -> Iterator[str]:
    """What a reader must know before believing the group's verdict, one sentence each."""
    runs = [run for run, _ in judged]
    for key, values in group.differs.items():
        yield f"pooled over {len(values)} values of {key}: {', '.join(map(shown, values))}"
    if len({step for _, step in judged}) > 1:
        yield "the runs end at different steps: --step N reads all of them at one"
    yield from _seed_weaknesses(runs)
    if 0 < verdict.n < claim.rule.n:
        yield f"{verdict.n} seed{'s' * (verdict.n != 1)} of the {claim.rule.n} asked for"
    added = _added_seeds(judged, verdict, claim)
    if added:
        yield added
    stopped = sum(run.stops_on_loss for run in group.runs)
    if stopped:
        yield f"{stopped} of {len(group.runs)} runs could stop on their own validation loss, and are left out"
    mixed = sum("mix" in run.corpus for run in runs)
    if mixed:
        yield (
            f"{mixed} of {len(runs)} runs trained on a mix of corpora, which a track that fixes its corpus does not "
            "count"
        )
    early = _ended_at_the_target(group.runs, claim)
    if early:
        yield (
            f"{early} of {len(group.runs)} runs end at their first {claim.loss} at or under the target, at different "
            "steps: they may have been stopped on their own loss"
        )
    for what, kinds in (
        ("states of the code", {repr(sorted(run.code.items())) for run in runs if run.kind != "log"}),
        ("versions of torch", {run.software["torch"] for run in runs if "torch" in run.software}),
        ("corpora", {run.corpus.get("manifest_sha256") for run in runs}),
        ("numbers of validation tokens", {run.validation_tokens for run in runs}),
    ):
        if len(kinds) > 1:
            yield f"averages runs of {len(kinds)} {what}"


def _seed_weaknesses(runs: Sequence[ComparedRun]) -> Iterator[str]:
    seeds = [run.seed for run in runs if run.seed is not None]
    repeats = len(seeds) - len(set(seeds))
    if repeats:
        counted = (
            "counts as a run of its own, though only rounding may set it apart"
            if runs[0].kind == "log"
            else "counts once, by its mean"
        )
        yield f"{repeats} of {len(runs)} runs repeat{'s' * (repeats == 1)} a seed; a repeated seed {counted}"
    first: dict[str, int | None] = {}
    weights = [run for run in runs if run.final_weights_sha256]
    if any(first.setdefault(str(run.final_weights_sha256), run.seed) != run.seed for run in weights):
        yield "different seeds ended with the same weights, so they are no independent runs"


def _added_seeds(judged: Sequence[tuple[ComparedRun, int]], verdict: Verdict, claim: Claim) -> str | None:
    """A sentence where the first seeds made fail the rule, as many as it asks for or more, and all of them pass."""
    asked = max(claim.rule.n, 2)
    if not verdict.passes or claim.rule.n < 2 or any(run.created is None for run, _ in judged):
        return None
    in_order = sorted(judged, key=lambda pair: pair[0].created or "")
    seeds = list(dict.fromkeys(run.seed for run, _ in in_order))
    for count in range(asked, len(seeds)):
        first = set(seeds[:count])
        pairs = [
            (run, at.loss) for run, step in in_order if run.seed in first and (at := run.at(claim.loss, step))
        ]
        earlier = judge(claim.rule, by_seed(pairs), claim.target)
        if not earlier.passes:
            return (
                f"the first {count} seeds made did not pass ({earlier.why}), and all {len(seeds)} do: seeds added "
                "after a failed test pass too easily"
            )
    return None


def _ended_at_the_target(runs: Sequence[ComparedRun], claim: Claim) -> int:
    """How many runs end early, at their first loss at or under the target, where the group's last steps differ."""
    if len({run.last_step for run in runs}) < 2:
        return 0
    count = 0
    for run in runs:
        curve = run.curves.get(claim.loss, ())
        below = [reading.step for reading in curve if reading.loss <= claim.target]
        count += not run.complete and not run.stops_on_loss and below == [run.last_step]
    return count


def line_of_test(claim: Claim) -> str:
    """One line: the test that was used, and what it takes for granted."""
    rule, target = claim.rule, f"{claim.target:g}"
    if rule.rule == "margin":
        test = f"margin rule: ({target} - mean)·√n ≥ {rule.margin:g}, compared to within 1e-9"
        assumes = "a spread known beforehand that the margin stands for"
    elif rule.rule == "z":
        test = f"one-sided z-test, mean below {target}, sigma = {rule.sigma:g}, p < {rule.alpha:g}"
        assumes = "normal losses whose spread is sigma"
    else:
        test = f"one-sided one-sample t-test, mean below {target}, p < {rule.alpha:g}"
        assumes = "normal losses"
    where = "the declared last step of full runs" if claim.step is None else f"step {claim.step}"
    seeds = f", n ≥ {rule.n}" if rule.n > 1 else ""
    source = f" (track {claim.track})" if claim.track else ""
    return (
        f"test: {test}{seeds}{source}, {claim.loss} at {where}; assumes independent runs, none left away for its loss, "
        f"all measured on the same validation tokens, {assumes}"
    )


def across_groups(found: RunsRead) -> list[str]:
    """What has to be said where groups were measured differently."""
    out = []
    tokens = {run.validation_tokens for run in found.runs if run.validation_tokens is not None}
    corpora = {run.corpus["manifest_sha256"] for run in found.runs if "manifest_sha256" in run.corpus}
    if len(tokens) > 1:
        numbers = ", ".join(f"{count:,}" for count in sorted(tokens))
        out.append(f"losses on different validation tokens ({numbers}) are different measurements")
    if len(corpora) > 1:
        out.append(f"losses on {len(corpora)} different corpora are different measurements")
    return out


@dataclasses.dataclass(frozen=True)
class Verification:
    """All groups, judged by one claim."""

    claim: Claim
    groups: tuple[GroupVerdict, ...]
    found: RunsRead

    def to_dict(self) -> dict[str, Any]:
        """What `nanorun verify --json` prints."""
        claim = self.claim
        return {
            "target": claim.target,
            "rule": dataclasses.asdict(claim.rule),
            "step": claim.step,
            "loss": claim.loss,
            "track": claim.track,
            "test": line_of_test(claim),
            "groups": [dataclasses.asdict(group) for group in self.groups],
            "weaknesses": across_groups(self.found),
            "notes": list(self.found.notes),
            "skipped": [{"file": one.file, "why": one.why} for one in self.found.skipped],
        }


def verify(
    paths: Sequence[str | Path],
    options: RuleOptions,
    *,
    target: float | None = None,
    track: str | None = None,
    step: int | None = None,
    loss: str = VAL_LOSS,
    pool: bool = False,
    records: Path = Path("records"),
) -> Verification:
    """Return the verdict on each group of the runs at `paths`. Raises UserError where there is no run to judge."""
    found = read_runs(paths, records=records)
    require_runs(found, paths)
    require_loss(found.runs, loss)
    claim = resolve_claim(found.runs, options, target=target, track=track, step=step, loss=loss)
    groups = group_runs(found.runs, pool=pool)
    return Verification(claim, tuple(judge_group(group, claim) for group in groups), found)


def require_all(result: Verification) -> None:
    """Raise RunFailed unless every group passes."""
    failing = sum(not group.passes for group in result.groups)
    if failing:
        raise RunFailed(f"{failing} of {len(result.groups)} groups of runs do not pass")


def require_runs(found: RunsRead, paths: Sequence[str | Path]) -> None:
    """Raise UserError where nothing was read, with the first reasons."""
    if found.runs:
        return
    reasons = "; ".join(f"{one.file}: {one.why}" for one in found.skipped[:3])
    more = f"; and {len(found.skipped) - 3} more" if len(found.skipped) > 3 else ""
    where = ", ".join(map(str, paths[:3]))
    raise UserError(
        f"{where}: no run that can be read{f' ({reasons}{more})' if reasons else ''}; wanted records, runs' folders "
        "or training logs"
    )


def require_loss(runs: Sequence[ComparedRun], key: str) -> None:
    """Raise UserError where no run has that loss."""
    keys = sorted({name for run in runs for name in run.curves})
    if key not in keys:
        raise UserError(f"--loss {key}: no run has it; there are {', '.join(keys)}.{nearest(key, keys)}")


def print_verification(result: Verification, console: Console) -> None:
    """Print the groups as a table, and under it all that has to be said of them."""
    from nanorun.records.terminal import print_grid, say

    rows = [_cells(group) for group in result.groups]
    titles = ["group", "n", "step", "mean loss", "p", "margin", "passes", "earliest", "seconds"]
    print_grid(console, titles, rows, left=("group",))
    for group in result.groups:
        say(console, f"{group.label}: {'passes' if group.passes else 'does not pass'}: {group.why}")
        if group.apart:
            say(console, f"{group.label}: {group.apart}", "dim")
        if group.earliest_passing_step is not None and not group.holds_on:
            say(
                console,
                f"{group.label}: it passes first at {group.earliest_passing_step}, and not at every later step",
            )
        for line in group.weaknesses:
            say(console, f"{group.label}: weak: {line}", "yellow")
        for line in _shortened([f"left out {one.file}: {one.why}" for one in group.left_out]):
            say(console, f"{group.label}: {line}", "yellow")
        for line in _shortened(_alike_once(group.notes)):
            say(console, line, "dim")
    for line in across_groups(result.found):
        say(console, f"weak: {line}", "yellow")
    for line in result.found.notes:
        say(console, line, "dim")
    for line in _shortened([f"skipped {one.file}: {one.why}" for one in result.found.skipped]):
        say(console, line, "yellow")
    if len(result.groups) > 1:
        say(
            console,
            f"{len(result.groups)} groups, never averaged unasked; --pool does, and names what differs",
            "dim",
        )
    say(console, line_of_test(result.claim), "dim", longest=600)


def _alike_once(notes: Sequence[str]) -> list[str]:
    """The notes, those that differ in their file and numbers alone told once; `file: note` each."""
    alike: dict[str, list[str]] = {}
    for note in notes:
        alike.setdefault(re.sub(r"[0-9]+", "0", note.partition(": ")[2]), []).append(note)
    return [
        one[0] + (f" (and {len(one) - 1} more run{'s' * (len(one) > 2)} alike)" if len(one) > 1 else "")
        for one in alike.values()
    ]


def _shortened(lines: Sequence[str], most: int = 10) -> list[str]:
    extra = len(lines) - most
    return [*lines[:most], f"and {extra} more; --json names them all"] if extra > 0 else list(lines)


def _cells(group: GroupVerdict) -> list[str]:
    loss = "-" if group.mean_loss is None else f"{group.mean_loss:.6f}"
    if group.std_loss is not None:
        loss += f" ±{group.std_loss:.5f}"
    earliest = "-" if group.earliest_passing_step is None else f"{group.earliest_passing_step:,}"
    return [
        group.label,
        str(group.n),
        "-" if group.step is None else f"{group.step:,}",
        loss,
        "-" if group.p_value is None else f"{group.p_value:.2g}",
        "-" if group.margin is None else f"{group.margin:.5f}",
        "yes" if group.passes else "no",
        earliest,
        "-" if group.seconds_mean is None else f"{group.seconds_mean:,.1f}",
    ]
