"""A law of the training step: what a step has to do, each part at a rate of its own; its tables and charts.

Seconds are a sum of amounts (FLOP of matrix products, bytes moved, ...) times what one of each costs. The costs are
fitted by least squares of the relative error, none below 0. The passes and the update are timed apart and so fitted
apart; a step's seconds are their sum. Points that are held out check it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scaling_on_paper import on_paper
from scipy.optimize import nnls

from nanorun.records.svg import Series, line_chart

HELD_OUT = ("14M-1024-adamw", "38M-256-muon", "350M-256-adamw")
"""One between points that are fitted, one at the end of Muon's, one far beyond all."""
BEGIN, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"

Row = Mapping[str, Any]


class Term(NamedTuple):
    """One amount of a law."""

    amount: str
    meaning: str
    unit: str = ""
    """Of the rate; "" for what is counted, whose cost is told in milliseconds each."""


PASSES = (
    Term("layer_passes", "each block in each micro-batch, forward and backward"),
    Term("matmul_flops", "matrix products, 6 FLOP a weight and token", "GFLOP/s"),
    Term("attention_flops", "attention, 12·layers·width·context FLOP a token", "GFLOP/s"),
    Term("stream_bytes", "residual stream, 4 bytes a token, layer and channel", "GB/s"),
    Term("logits_bytes", "logits, 4 bytes a token and word of the vocabulary", "GB/s"),
    Term("gradient_bytes", "weights and gradients, 4 bytes a parameter and micro-batch", "GB/s"),
)
UPDATE = (
    Term("tensors", "each parameter tensor"),
    Term(
        "update_bytes",
        "weights, gradients and moments, 28 bytes a parameter of AdamW's, 20 of Muon's",
        "GB/s",
    ),
    Term("newton_schulz_flops", "Newton–Schulz products", "GFLOP/s"),
)
MEMORY = (
    Term("process", "the process with torch", "MiB"),
    Term("micro_stream_bytes", "each token, layer and channel of a micro-batch", "bytes"),
    Term("micro_logits_bytes", "each logit of a micro-batch", "bytes"),
)


@dataclass(frozen=True)
class Law:
    """What one of each term's amounts costs."""

    terms: Sequence[Term]
    costs: Sequence[float]

    def __call__(self, amounts: Mapping[str, float]) -> float:
        return sum(self.parts(amounts).values())

    def parts(self, amounts: Mapping[str, float]) -> dict[str, float]:
        """Return what each term adds."""
        return {term.amount: cost * amounts[term.amount] for term, cost in zip(self.terms, self.costs)}


def fit(terms: Sequence[Term], amounts: Sequence[Mapping[str, float]], found: Sequence[float]) -> Law:
    """Return the law with the least squares of the relative error, no cost below 0."""
    relative = np.array([[one[term.amount] / value for term in terms] for one, value in zip(amounts, found)])
    # Columns differ by ten orders of magnitude, and a tolerance inside nnls does not.
    size = np.maximum(relative.max(axis=0), np.finfo(float).tiny)
    costs, _ = nnls(relative / size, np.ones(len(found)))
    return Law(terms, [float(cost) for cost in costs / size])


class Agreement(NamedTuple):
    r_squared: float
    """Of the logarithms."""
    largest: float
    """Relative error."""


def agreement(predicted: Sequence[float], found: Sequence[float]) -> Agreement:
    """Return how well predictions agree with what was found."""
    off = [math.log(one / other) for one, other in zip(predicted, found)]
    logs = np.log(found)
    rest = sum(one**2 for one in off) / max(float(((logs - logs.mean()) ** 2).sum()), 1e-300)
    return Agreement(1 - rest, max(abs(one / other - 1) for one, other in zip(predicted, found)))


class Laws(NamedTuple):
    passes: Law
    update: Law
    beside_states: Law
    """MiB at the peak beside weights, gradients and the optimizer's state, which are counted."""

    def seconds(self, row: Row) -> float:
        return self.passes(row["amounts"]) + self.update(row["amounts"])

    def peak_mib(self, row: Row) -> float:
        return states_mib(row) + self.beside_states(row["amounts"])


def alone(document: Mapping[str, Any]) -> list[Row]:
    """Return the rows of one rank, smallest first."""
    rows = [row for row in document["rows"] if row["n_ranks"] == 1]
    return sorted(rows, key=lambda row: (row["n_parameters"], row["context_len"], row["optim"]))


def fit_all(document: Mapping[str, Any]) -> Laws:
    """Return the laws of a sweep, from the rows of one rank that are not held out."""
    rows = [row for row in alone(document) if row["name"] not in HELD_OUT]
    amounts = [row["amounts"] for row in rows]
    passes = fit(PASSES, amounts, [row["step_seconds"] - row["update_seconds"] for row in rows])
    update = fit(UPDATE, amounts, [row["update_seconds"] for row in rows])
    beside_states = fit(MEMORY, amounts, [peak_mib(row) - states_mib(row) for row in rows])
    return Laws(passes, update, beside_states)


def states_mib(row: Row) -> float:
    """Return what weights, fp32 gradients and the optimizer's state hold on one rank."""
    return float(8 * row["n_parameters"] + row["ranks"][0]["state_bytes"]) / 2**20


def peak_mib(row: Row) -> float:
    """Return the largest peak of any rank."""
    return max(float(one["peak_mib"]) for one in row["ranks"])


def summary(document: Mapping[str, Any]) -> str:
    """Return the section of docs/performance.md that a sweep's figures make."""
    laws = fit_all(document)
    about = document["hardware"]
    name = f"{about['n_cpus']} cores, {about['device_name']}, torch {document['software']['torch']}"
    parts = [
        f"`{document['command']}` ({name}); every point a process of its own, medians of the steps after the first. "
        "The largest models take few tokens a step, to be measured at all: a run's steps have more, and the update, "
        "which costs the same whatever their number, is a smaller part of them.",
        _points_table(alone(document), laws),
        "The law, fitted to the rows that are not held out (non-negative least squares of the relative error): a "
        "step's seconds are the sum of these amounts, each over its rate.",
        _law_table(laws),
        "Where a step's time goes by the law:",
        _shares_table(alone(document), laws),
        _quality(alone(document), laws),
        "![tokens a second by size](scaling.svg)\n![tokens a second by context](scaling-context.svg)",
        _ranks_text(document),
        on_paper(),
    ]
    return "\n\n".join(parts)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a Markdown table, all but the first `left` columns set to the right."""
    marks = ["---"] * left + ["--:"] * (len(heads) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, marks, *rows))


def _points_table(rows: Sequence[Row], laws: Laws) -> str:
    heads = (
        "point",
        "parameters",
        "tokens a step",
        "step s",
        "law s",
        "off",
        "update s",
        "tokens/s",
        "peak MiB",
    )
    return table(
        heads,
        [
            (
                row["name"] + (" (held out)" if row["name"] in HELD_OUT else ""),
                f"{row['n_parameters'] / 1e6:.1f}M",
                f"{row['batch_tokens']:,}",
                f"{row['step_seconds']:.3f}",
                f"{laws.seconds(row):.3f}",
                f"{laws.seconds(row) / row['step_seconds'] - 1:+.0%}",
                f"{row['update_seconds']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{peak_mib(row):,.0f}",
            )
            for row in rows
        ],
    )


def _law_table(laws: Laws) -> str:
    cells = []
    for law, part in ((laws.passes, "passes"), (laws.update, "update")):
        for term, cost in zip(law.terms, law.costs):
            if not cost:
                rate = "nothing that could be told from 0"
            else:
                rate = f"{1e-9 / cost:.3g} {term.unit}" if term.unit else f"{1e3 * cost:.2f} ms"
            cells.append((part, term.meaning, rate))
    cells += [
        # The amounts are bytes of fp32 numbers, so a number costs four times what a byte does.
        (
            "peak beside states",
            term.meaning,
            f"{cost * (2**22 if term.unit == 'bytes' else 1):,.1f} {term.unit}",
        )
        for term, cost in zip(laws.beside_states.terms, laws.beside_states.costs)
    ]
    return table(("part", "amount", "rate or cost"), cells, left=2)


def _shares_table(rows: Sequence[Row], laws: Laws) -> str:
    """Return the share of each term that costs anything."""
    terms = [t for law in (laws.passes, laws.update) for t, cost in zip(law.terms, law.costs) if cost]
    cells = []
    for row in rows:
        seconds = {**laws.passes.parts(row["amounts"]), **laws.update.parts(row["amounts"])}
        shares = [seconds[term.amount] / sum(seconds.values()) for term in terms]
        cells.append((row["name"], *(f"{share:.0%}" for share in shares)))
    return table(
        ("point", *(term.amount.rpartition("_")[0].replace("_", " ") or term.amount for term in terms)), cells
    )


def _quality(rows: Sequence[Row], laws: Laws) -> str:
    lines = []
    for held_out, what in ((False, "fitted"), (True, "held out")):
        chosen = [row for row in rows if (row["name"] in HELD_OUT) == held_out]
        of_time = agreement([laws.seconds(r) for r in chosen], [r["step_seconds"] for r in chosen])
        of_memory = agreement([laws.peak_mib(r) for r in chosen], [peak_mib(r) for r in chosen])
        lines.append(
            f"- {len(chosen)} points {what}: largest error of the seconds {of_time.largest:.0%} (R² of their "
            f"logarithms {of_time.r_squared:.3f}), of the memory {of_memory.largest:.0%} ({of_memory.r_squared:.3f})"
        )
    lines.append(
        "- The points held out were named before the first sweep. They check the law of seconds, whose terms were "
        "too; that the states are counted and not fitted was decided after seeing them, so they check the memory less."
    )
    return "\n".join(lines)


def _ranks_text(document: Mapping[str, Any]) -> str:
    """Return the table of many ranks, beside one rank of the same size."""
    many = [row for row in document["rows"] if row["n_ranks"] > 1]
    if not many:
        return "One device was there: nothing is told of many ranks."
    compared = [
        row
        for row in alone(document)
        if any(
            (row["size"], row["context_len"], row["optim"]) == (m["size"], m["context_len"], m["optim"])
            for m in many
        )
    ]
    cells = []
    for row in sorted(
        [*compared, *many],
        key=lambda row: (row["n_parameters"], row["optim"], row["shard"] == "fsdp", row["n_ranks"]),
    ):
        grown = max(one["peak_mib"] - one["before_mib"] for one in row["ranks"])
        cells.append(
            (
                row["name"],
                f"{row['step_seconds']:.2f}",
                f"{max(one['state_bytes'] for one in row['ranks']) / 1e6:.1f}",
                f"{grown:,.0f}",
                _travel(row, "sum"),
                _travel(row, "broadcast"),
            )
        )
    heads = ("point", "step s", "state MB a rank", "peak MiB above start", "sum alone", "broadcast alone")
    on_cpu = document["hardware"]["device"] == "cpu"
    shared = (
        "gloo on one machine's shared cores: the step's time holds all ranks' arithmetic on the same cores and tells "
        "nothing of many machines, while what a rank sends, the sum of all gradients and the owners' broadcasts with "
        "nothing beside them, and what a rank holds do tell. NCCL runs the same code and is not verified here"
    )
    return f"Ranks ({shared if on_cpu else 'NCCL'}):\n\n{table(heads, cells)}"


def _travel(row: Row, kind: str) -> str:
    if not row.get(f"{kind}_bytes"):
        return "–"
    return f"{row[f'{kind}_bytes'] / 1e6:.1f} MB in {1e3 * row[f'{kind}_seconds']:.0f} ms"


def charts(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the two charts as SVG by file name: tokens/s by parameters and by context, as found and by the law."""
    laws, rows = fit_all(document), alone(document)
    by_size = [
        (f"{optim}, context 256", [r for r in rows if r["optim"] == optim and r["context_len"] == 256])
        for optim in ("adamw", "muon")
    ]
    by_context = [
        (f"{size}, adamw", [r for r in rows if r["size"] == size and r["optim"] == "adamw"])
        for size in dict.fromkeys(r["size"] for r in rows)
    ]
    by_context = [(name, chosen) for name, chosen in by_context if len(chosen) > 1]
    drawn = {
        "scaling": (by_size, "n_parameters", "size", "parameters"),
        "scaling-context": (by_context, "context_len", "context", "context, tokens"),
    }
    return {
        f"{scope}.svg": line_chart(
            _series(chosen, x, laws),
            title=f"The training step by {what}",
            x_label=x_label,
            y_label="tokens a second, one device",
            x_log=True,
            y_log=True,
            scope=scope,
        )
        for scope, (chosen, x, what, x_label) in drawn.items()
    }


def _series(chosen: Sequence[tuple[str, Sequence[Row]]], x: str, laws: Laws) -> list[Series]:
    made = []
    for name, rows in chosen:
        xs = [row[x] for row in rows]
        made.append(Series(name, xs, [row["tokens_per_second"] for row in rows]))
        made.append(Series(f"{name}: the law", xs, [row["batch_tokens"] / laws.seconds(row) for row in rows]))
    return made


def write_docs(document: Mapping[str, Any], path: Path) -> None:
    """Write the section between the marks in a document, and the charts beside it."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(
            f"{path}: wanted one line {BEGIN} and after it one line {END} to write between; put them in"
        )
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{summary(document)}\n{END}{after}", encoding="utf-8")
    for name, chart in charts(document).items():
        (path.parent / name).write_text(chart, encoding="utf-8")
