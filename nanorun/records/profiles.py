"""AlgoPerf's benchmark score: performance profiles of times to a target, and the area under them.

As in the rules of the benchmark (Dahl et al. 2023, https://arxiv.org/abs/2306.07179, section 4) and of its first
competition (Kasimbeg et al. 2025, https://arxiv.org/abs/2502.15015), whose leaderboard the tests reproduce to
four decimals. A time is seconds until the target was reached, and infinite for a miss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nanorun.errors import UserError, nearest

TAU_MAX = 4.0
"""A time beyond this many times the best is a miss, and the profile ends here."""
N_POINTS = 100
TAUS = tuple(1 + (TAU_MAX - 1) * index / (N_POINTS - 1) for index in range(N_POINTS))

Times = Mapping[str, Mapping[str, float]]
"""Submission, then workload, to seconds."""


@dataclass(frozen=True)
class Lost:
    """A base workload that a submission reached and lost for its held-out variant."""

    submission: str
    workload: str
    variant: str


@dataclass(frozen=True)
class Profiles:
    """The profiles and scores of all submissions, in the order in which they came."""

    workloads: tuple[str, ...]
    """Base workloads: what fractions are fractions of."""
    ratios: dict[str, dict[str, float]]
    """Submission, then base workload, to its time over the best that survives; infinite for a miss."""
    fractions: dict[str, tuple[float, ...]]
    """For each submission and each of `TAUS`, the share of workloads whose ratio is at most that."""
    scores: dict[str, float]
    lost: tuple[Lost, ...]

    def score_by_tau_max(self, submission: str) -> list[float]:
        """Return what the score would be if the profile ended at each of `TAUS`; at 1, the fraction there."""
        fractions = self.fractions[submission]
        return [fractions[0], *(_area(fractions[: n + 1]) / (TAUS[n] - 1) for n in range(1, N_POINTS))]


def held_out_pairs(pairs: Iterable[str], workloads: Iterable[str]) -> dict[str, str]:
    """Return held-out variant to base workload, from texts such as `fastmri_tanh=fastmri`.

    Raises UserError for a text of another form, a workload that no time is of, a variant that is named twice or
    is a base as well.
    """
    known = sorted(set(workloads))
    found: dict[str, str] = {}
    for pair in pairs:
        variant, equals, base = (part.strip() for part in pair.partition("="))
        if not (equals and variant and base):
            raise UserError(f"--held-out {pair!r}: wanted VARIANT=BASE, for example fastmri_tanh=fastmri")
        for name in (variant, base):
            if name not in known:
                raise UserError(
                    f"--held-out {pair!r}: no time is of workload {name!r}; there are {_some(known)}."
                    f"{nearest(name, known)}"
                )
        if variant in found:
            raise UserError(f"--held-out names {variant!r} twice; name each variant once")
        found[variant] = base
    for variant, base in found.items():
        if base in found:
            raise UserError(
                f"--held-out {variant}={base}: {base!r} is itself a held-out variant of {found[base]!r}; a base "
                "workload is no variant"
            )
    return found


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(name[:40] for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


def performance_profiles(times: Times, held_out: Mapping[str, str]) -> Profiles:
    """Return the profiles of `times`; `held_out` maps a variant to its base workload.

    In this order: a time above `TAU_MAX` times the best of its workload becomes a miss; a base workload is lost
    whose variant is missed or absent; what is left is divided by the best that is left of each base workload.
    A workload that nobody reaches still counts among the workloads.
    """
    names = dict.fromkeys(workload for by_workload in times.values() for workload in by_workload)
    near = {workload: _near_the_best(times, workload) for workload in names}
    bases = tuple(workload for workload in names if workload not in held_out)
    lost = tuple(
        Lost(submission, base, variant)
        for submission in times
        for variant, base in held_out.items()
        if submission in near[base] and submission not in near[variant]
    )
    gone = {(one.submission, one.workload) for one in lost}
    ratios: dict[str, dict[str, float]] = {submission: {} for submission in times}
    for base in bases:
        left = {name: seconds for name, seconds in near[base].items() if (name, base) not in gone}
        best = min(left.values(), default=math.inf)
        for submission in times:
            ratios[submission][base] = _ratio(left.get(submission, math.inf), best)
    fractions = {
        submission: tuple(sum(ratio <= tau for ratio in row.values()) / len(bases) for tau in TAUS)
        for submission, row in ratios.items()
    }
    scores = {submission: _area(row) / (TAU_MAX - 1) for submission, row in fractions.items()}
    return Profiles(bases, ratios, fractions, scores, lost)


def _ratio(seconds: float, best: float) -> float:
    """A time over the best one; 1 for the best itself, even if that is 0 seconds."""
    return 1.0 if seconds == best < math.inf else seconds / best if seconds < math.inf else math.inf


def _near_the_best(times: Times, workload: str) -> dict[str, float]:
    """The submissions that reach a workload's target within `TAU_MAX` times the best, with their seconds."""
    reached = {
        submission: row[workload]
        for submission, row in times.items()
        if math.isfinite(row.get(workload, math.inf))
    }
    limit = TAU_MAX * min(reached.values(), default=0.0)
    return {submission: seconds for submission, seconds in reached.items() if seconds <= limit}


def _area(fractions: Sequence[float]) -> float:
    """The area under a profile that begins at τ = 1, by trapezoids between neighbouring points."""
    inner = math.fsum(fractions) - (fractions[0] + fractions[-1]) / 2
    return inner * (TAU_MAX - 1) / (N_POINTS - 1)
