"""Records made up for tests and benchmarks: whole, plausible, and different only where asked."""

from __future__ import annotations

import hashlib
from typing import Any

from nanorun.records.record import Record, record_id

TARGET = 1.55
A_MIX = [
    {"name": "sotu", "share": 0.7, "manifest_sha256": "c" * 64},
    {"name": "novels", "share": 0.3, "manifest_sha256": "d" * 64},
]
"""What the corpus of a record holds of a run on a mix."""


def a_dict(
    *,
    name: str = "muon",
    seed: int = 0,
    seconds: float = 31.2,
    final: float = 1.54,
    points: int = 11,
    steps: int = 1000,
    **changes: Any,
) -> dict[str, Any]:
    """Return a record's content: a curve from 5.5 nats down to `final` in `points` readings."""
    every = steps // (points - 1)
    curve = [
        {
            "step": steps if index == points - 1 else index * every,
            "tokens": (steps if index == points - 1 else index * every) * 4096,
            "train_seconds": seconds * index / (points - 1),
            "val_loss": final + (5.5 - final) * (1 - index / (points - 1)) ** 4,
        }
        for index in range(points)
    ]
    target = changes.get("target_val_loss", TARGET)
    crossing = next((point for point in curve if point["val_loss"] <= target), None)
    content = {
        "format_version": 1,
        "track": "sotu",
        "name": name,
        "optimizer": "muon + adamw" if name == "muon" else "adamw",
        "created": "2026-11-24T12:30:00Z",
        "seed": seed,
        "config": {
            "track": "sotu",
            "name": name,
            "seed": seed,
            "data": {"corpus": "sotu", "tokenizer": "byte"},
            "model": {"arch": "modern", "n_layer": 4, "n_head": 4, "n_embd": 128},
            "train": {"steps": steps, "batch_tokens": 4096, "micro_batch_rows": 0, "compile": "auto"},
            "checkpoint": {"every_steps": 0, "keep": 2},
            "log": {"every_steps": 10},
            "optim": {"default": {"name": "adamw", "lr": 0.004}, "matrix": {"name": name, "lr": 0.02}},
        },
        "n_parameters": 1_300_000,
        "initial_weights_sha256": hashlib.sha256(f"initial {seed}".encode()).hexdigest(),
        "final_weights_sha256": hashlib.sha256(f"final {name} {seed} {final}".encode()).hexdigest(),
        "corpus": {
            "name": "sotu",
            "tokenizer": "byte",
            "vocab_size": 257,
            "manifest_sha256": "c" * 64,
            "train_tokens": 9_000_000,
            "val_tokens": 500_000,
        },
        "code": {"version": "0.1.0", "commit": "a" * 40, "dirty": False, "patch": None},
        "hardware": {
            "device": "cpu",
            "device_name": "Intel(R) Xeon(R) CPU @ 2.80GHz",
            "n_devices": 1,
            "cpu_name": "Intel(R) Xeon(R) CPU @ 2.80GHz",
            "n_cpus": 2,
            "n_threads": 2,
            "memory_gib": 7.8,
        },
        "software": {
            "python": "3.11.9",
            "platform": "Linux x86_64",
            "torch": "2.9.0",
            "numpy": "2.1.0",
            "compiled": False,
        },
        "target_val_loss": target,
        "validation_tokens": 499_999,
        "stop_at_target": False,
        "completed": True,
        "declared_steps": steps,
        "steps": steps,
        "tokens": steps * 4096,
        "validation": curve,
        "reached": crossing and {"step": crossing["step"], "seconds": crossing["train_seconds"]},
        "final_val_loss": final,
        "bits_per_byte": final / 0.6931471805599453,
        "clock": {
            "train_seconds": seconds,
            "compile_seconds": 0.0,
            "validation_seconds": 4.0,
            "checkpoint_seconds": 0.5,
            "total_seconds": seconds + 6.0,
        },
        "peak_memory_mib": 812.5,
        "resumed": 0,
        "optimizer_state_bytes": 10_400_000,
        **changes,
    }
    return {"id": record_id(content["created"], name, content), **content}


def on_a_mix(mix: Any = A_MIX, shares: Any = None) -> dict[str, Any]:
    """Return what sets a run on a mix apart: its corpus, and a config that calls the corpora as somebody did."""
    content = a_dict()
    data = {**content["config"]["data"], "mix": shares or {"sotu": 0.7, "./novels": 0.3}}
    return {"config": {**content["config"], "data": data}, "corpus": {**content["corpus"], "mix": mix}}


def a_record(**changes: Any) -> Record:
    """Return a record; see `a_dict` for what can be asked."""
    return Record.from_dict(a_dict(**changes))
