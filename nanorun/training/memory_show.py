"""The account of a run's memory as `nanorun memory` prints it: foreseen, measured, and the lecture's example."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nanorun import kernels
from nanorun.config import RunConfig, resolve
from nanorun.data.prepare import default_out, prepare_command
from nanorun.data.shards import load_manifest
from nanorun.data.tokenizers.plain import ByteTokenizer
from nanorun.errors import UserError
from nanorun.model import CHEAPEST_FIRST
from nanorun.tracks import load_track
from nanorun.training import distributed, machine
from nanorun.training.memory import (
    Account,
    Choice,
    Rehearsal,
    Stopwatch,
    account,
    choose,
    foreseeing,
    measuring,
    memory_at_hand,
    rehearse,
)
from nanorun.training.run import configs_of
from nanorun.training.step import chosen_precision, first_micro_batch
from nanorun.training.trust import check_trusted, names_on_the_command_line

VOCABULARIES = {"byte": ByteTokenizer.vocab_size, "gpt2": 50257}
"""Of tokenizers whose vocabulary is no matter of the corpus."""
OVERHEAD = {"cpu": (12 * 2**20, 0.5), "cuda": (0, 0.1)}
"""What the process holds beyond what the allocator gave out: so many bytes, and a share of activations and buffers,
which come and go; states stay where they are. On a CPU as `nanorun memory --measure` finds it for muon and ngram of the
tracks on embedded corpora, 2 to 185 MiB of activations, 54 % off at most; on CUDA a guess."""
TIMED_ROUNDS = 3
"""Passes timed each way, in turns: one alone is a matter of luck."""

LECTURE = (
    "model.arch=gpt2",
    "model.n_layer=48",
    "model.n_head=25",
    "model.n_embd=1600",
    "model.context_len=1024",
    "train.batch_tokens=32768",
    "train.micro_batch_rows=32",
    "train.precision=bf16_master",
    "validation.stride=0",
)
LECTURE_PARAMETERS = 1.5e9


def account_of(
    track: str | None, optim: str | None, settings: list[str], device_name: str, data: Path, measure: bool
) -> dict[str, Any]:
    """Return what a run of that preset will hold, as plain data; with `measure` what two steps took beside it."""
    of_track, (config,) = configs_of(track, optim, settings, None, 1)
    where = f"preset {config.name!r} of track {of_track.name!r}"
    check_trusted(config, named=names_on_the_command_line(optim, settings), trust_code=False, where=where)
    device = distributed.pick_device(device_name)
    vocab_size = _vocab_size(config, data)
    asked = first_micro_batch(config, device, config.rows_per_step)
    choice = choose(config, vocab_size, device, asked, memory_at_hand(device))
    with foreseeing() as meter:
        rehearsal = rehearse(config, vocab_size, device, meter, choice.rows)
        n_parameters = rehearsal.stepper.model.n_parameters()
        foreseen = _lines(account(meter.readings, CHEAPEST_FIRST), rehearsal.by_optimizer(), choice, device)
    page = {
        "track": config.track,
        "preset": config.name,
        "parameters": n_parameters,
        "device": str(device),
        "precision": chosen_precision(config.train.precision, device),
        "micro_batch_rows": choice.rows,
        "micro_batch_rows_asked": asked,
        "context_len": config.model.context_len,
        "checkpoint_activations": choice.way,
        "fits": choice.fits,
        "at_hand_bytes": choice.room,
        "lines": [{"what": what, "predicted_bytes": n_bytes} for what, n_bytes in foreseen.items()],
    }
    if measure:
        _set_beside(page, *_measured(config, vocab_size, device, choice))
    return page


def _vocab_size(config: RunConfig, data: Path) -> int:
    """Return how many tokens there are: as the prepared corpus says, else as the tokenizer has them."""
    corpus, tokenizer = config.data.corpus, config.data.tokenizer
    for folder in (data, default_out(corpus, tokenizer, root=data)):
        if (folder / "manifest.json").exists():
            return load_manifest(folder).vocab_size
    if tokenizer not in VOCABULARIES:
        raise UserError(
            f"how many tokens {tokenizer!r} has depends on the corpus, and there is none in {data}: make it with "
            f"{prepare_command(corpus, tokenizer)}"
        )
    return VOCABULARIES[tokenizer]


def _lines(
    found: Account, by_optimizer: dict[str, int], choice: Choice, device: torch.device
) -> dict[str, int]:
    """Return the account line by line, in bytes; nothing for what a run does not have."""
    mine, (fixed, share) = found.passes[choice.way], OVERHEAD[device.type]
    states = found.parameters + found.copy + found.gradients + found.state + found.average
    peak = max(mine.peak, found.update_peak)
    optional = {
        "parameters, bf16 copy": found.copy,
        "gradients": found.gradients,
        **{f"state of {name}": n_bytes for name, n_bytes in by_optimizer.items()},
        "average of the weights": found.average,
    }
    return {
        "parameters": found.parameters,
        **{what: n_bytes for what, n_bytes in optional.items() if n_bytes},
        "states together": states,
        **{f"activations, {way}": passes.activations for way, passes in found.passes.items()},
        **{f"buffers of the passes, {way}": passes.buffers for way, passes in found.passes.items()},
        "buffers of the update": found.update_buffers,
        **{f"most in the passes, {way}": passes.peak for way, passes in found.passes.items()},
        "most in the update": found.update_peak,
        f"most in a step, {choice.way}": peak,
        "allocator: rounding, fragmentation": round(fixed + share * (mine.activations + mine.buffers)),
        "kept by the warm-up to put back": found.parameters,
        "a checkpoint's copies, on the host": found.parameters + found.state + found.average,
    }


def _measured(
    config: RunConfig, vocab_size: int, device: torch.device, choice: Choice
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the account of a rehearsal for real, line by line, and the seconds of the passes each way."""
    # First without a profiler, which takes memory and time of its own.
    machine.forget_peak_memory(device)
    before = machine.peak_memory_mib(device)
    watch = Stopwatch(device)
    rehearsal = rehearse(config, vocab_size, device, watch, choice.rows)
    most = round((machine.peak_memory_mib(device) - before) * 2**20)
    seconds = _seconds_of_passes(rehearsal, watch)
    del rehearsal
    with measuring(device) as meter:
        rehearsal = rehearse(config, vocab_size, device, meter, choice.rows)
        by_optimizer = rehearsal.by_optimizer()
    found = account(meter.readings, CHEAPEST_FIRST)
    lines = _lines(found, by_optimizer, choice, device)
    if device.type == "cuda":
        most = torch.cuda.memory_reserved(device)
    given_out = max(found.update_peak, *(passes.peak for passes in found.passes.values()))
    lines["allocator: rounding, fragmentation"] = max(0, most - given_out)
    for what in ("kept by the warm-up to put back", "a checkpoint's copies, on the host"):
        del lines[what]  # no step takes them
    return lines, seconds


def _seconds_of_passes(rehearsal: Rehearsal, watch: Stopwatch) -> dict[str, float]:
    """Return the median seconds of a micro-batch's passes each way, the ways taking turns."""
    last = max(n for n in (1, 2) if f"none pass {n} ends" in watch.seconds)
    times: dict[str, list[float]] = {way: [] for way in CHEAPEST_FIRST}
    for _ in range(TIMED_ROUNDS):
        for way in CHEAPEST_FIRST:
            rehearsal.passes(way)
            began, ended = (watch.seconds[f"{way} pass {last} {edge}"] for edge in ("begins", "ends"))
            times[way].append(ended - began)
    return {way: statistics.median(some) for way, some in times.items()}


def _set_beside(page: dict[str, Any], lines: dict[str, int], seconds: dict[str, float]) -> None:
    """Set what was measured beside what was foreseen."""
    for line in page["lines"]:
        line["measured_bytes"] = lines.get(line["what"])
    page["seconds_of_a_pass"] = seconds


def lecture_account() -> dict[str, Any]:
    """Return the lecture's example by the lecture's own formulas, beside nanorun's model of that shape."""
    config = resolve(load_track("fineweb-small"), "adamw", LECTURE)
    # The lecture's is a GPU's memory: it is none of this machine's C compiler.
    with kernels.allowed(False), foreseeing() as meter:
        rehearsal = rehearse(config, VOCABULARIES["gpt2"], torch.device("cpu"), meter)
        n_parameters = rehearsal.stepper.model.n_parameters()
    ours = account(meter.readings, CHEAPEST_FIRST)
    shape, n = config.model, LECTURE_PARAMETERS
    numbers = 12 * shape.n_embd * config.train.batch_tokens * shape.n_layer
    # What the masters hold, less than the parameters by the tables of positions, is fp32; what computes is bf16.
    rows = [
        ("parameters, bf16", "2 N", 2 * n, ours.copy),
        ("gradients, bf16", "2 N", 2 * n, ours.gradients),
        ("master weights and moments, fp32", "12 N", 12 * n, ours.parameters + ours.state),
        ("states together", "16 N", 16 * n, ours.parameters + ours.copy + ours.gradients + ours.state),
        ("fp32 buffers of the update", "4 N", 4 * n, ours.update_buffers),
        ("activations", "2 · 12 · C · B · T · L", 2.0 * numbers, ours.passes["none"].activations),
        ("activations, selective", "", None, _held(ours, "selective")),
        (
            "activations, block",
            "those, over √L",
            2 * numbers / math.sqrt(shape.n_layer),
            _held(ours, "block"),
        ),
    ]
    return {
        "example": "a GPT-2 of 48 layers, 1,600 wide; rows of 1,024 tokens, 32 at once; mixed-precision Adam",
        "parameters": n_parameters,
        "lecture_parameters": n,
        "rows": [
            {"what": what, "formula": formula, "lecture_bytes": lecture, "nanorun_bytes": mine}
            for what, formula, lecture, mine in rows
        ],
    }


def _held(found: Account, way: str) -> int:
    """Return the most activations at once: what is kept, and what is computed again for the backward pass."""
    mine = found.passes[way]
    return mine.activations + mine.buffers


def show(page: dict[str, Any], console: Console) -> None:
    """Print an account."""
    for line in _head(page):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_lecture_table(page) if "example" in page else _table(page))
    for line in _foot(page):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _head(page: dict[str, Any]) -> list[str]:
    if "example" in page:
        return [f"{page['example']}; nanorun's has {page['parameters']:,} parameters"]
    lines = [
        f"track {page['track']}, {page['preset']}: {page['parameters']:,} parameters on {page['device']}, "
        f"{page['precision']}; micro-batches of {page['micro_batch_rows']} rows of {page['context_len']:,} tokens, "
        f"activations {page['checkpoint_activations']}"
    ]
    if page["micro_batch_rows"] != page["micro_batch_rows_asked"]:
        lines.append(
            f"{page['micro_batch_rows_asked']:,} rows at once do not fit: halved, and the step's tokens stay"
        )
    if not page["fits"]:
        lines.append("this does not fit the memory at hand")
    return lines


def _table(page: dict[str, Any]) -> Table:
    measured = any("measured_bytes" in line for line in page["lines"])
    table = Table(box=None, pad_edge=False)
    for heading in ("MiB", "foreseen", *(("measured", "off by") if measured else ())):
        table.add_column(heading, justify="left" if heading == "MiB" else "right", no_wrap=True)
    for line in page["lines"]:
        foreseen, found = line["predicted_bytes"], line.get("measured_bytes")
        beside = ["", ""]
        if found is not None:
            beside = [f"{found / 2**20:,.2f}", f"{foreseen / found - 1:+.1%}" if found else ""]
        table.add_row(line["what"], f"{foreseen / 2**20:,.2f}", *(beside if measured else ()))
    return table


def _lecture_table(page: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("GB (10⁹ bytes)", "formula", "lecture's", "nanorun's"):
        table.add_column(
            heading, justify="right" if "'s" in heading else "left", no_wrap=heading != "formula"
        )
    for row in page["rows"]:
        lecture = "" if row["lecture_bytes"] is None else f"{row['lecture_bytes'] / 1e9:.1f}"
        table.add_row(row["what"], row["formula"], lecture, f"{row['nanorun_bytes'] / 1e9:.1f}")
    return table


def _foot(page: dict[str, Any]) -> list[str]:
    if "example" in page:
        return [
            "the lecture's: its own formulas, for N = 1.5·10⁹ parameters, C channels, B rows, T tokens, L layers; it "
            "rounds 8.7 to about 8",
            "nanorun's: two steps of its own model on stand-ins that hold no memory, attention fused; with a block or "
            "a part of it computed again, the most held at once",
        ]
    lines = [
        "activations: held when a micro-batch's forward pass ends. Buffers: the most beyond that, which for a step of "
        "one micro-batch has gradients in it. The most is what is held at one moment, so the lines do not add up to it"
    ]
    if seconds := page.get("seconds_of_a_pass"):
        plain = seconds["none"]
        lines.append(
            f"a micro-batch's passes took, in the median of {TIMED_ROUNDS}, "
            + ", ".join(f"{way} {1000 * one:,.0f} ms ({one / plain:.2f})" for way, one in seconds.items())
        )
    return lines
