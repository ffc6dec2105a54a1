"""Run the CUDA tests and the benchmarks of one GPU, in one command, under nine minutes and without a network.

    python scripts/gpu_suite.py                     all sections, in order of what matters, while the budget lasts
    python scripts/gpu_suite.py --only speed,golden some of them
    python scripts/gpu_suite.py --dry-run           the same code on a CPU with tiny shapes, whose figures mean nothing

Where Python packages are missing (pydantic above all), they can be brought along as wheels: with a network

    python scripts/gpu_suite.py --fetch-wheels .wheels --python 3.12

downloads them for the machine's Python, and `--wheels .wheels` there installs them into a folder of its own first.

A section that the budget has no room for is left out and named. Figures are written after each, as JSON, to `--out`, or
under $OUT where that is set; a table of them is printed last. Alternatives take turns, step by step, and the medians
are told. Model FLOPs are GPT.flops_per_token for every model; the rate they are set against is the best bf16 product
of this run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = {
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("schedulefree", "prodigyopt"),
}
"""What the package imports that a machine with torch may lack, in the versions of constraints.txt."""
BUDGET_SECONDS = 525.0
GPT2_SMALL = {"n_layer": 12, "n_head": 6, "n_embd": 768, "context_len": 1024}
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "context_len": 32}


class Suite:
    """What the sections share: the device, the shapes, the budget and where figures go."""

    def __init__(self, dry: bool, out: Path, budget: float) -> None:
        import torch

        self.dry, self.out, self.budget = dry, out, budget
        self.device = torch.device("cpu" if dry else "cuda")
        self.shape = TINY if dry else GPT2_SMALL
        self.rows, self.steps = (4, 2) if dry else (8 * 64, 6)
        self.vocab_size = 65 if dry else 50257
        self.began = time.monotonic()
        self.found: dict[str, Any] = {}

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def keep(self, name: str, figures: dict[str, Any]) -> None:
        self.found[name] = figures
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu_suite.json").write_text(json.dumps(self.found, indent=1) + "\n")

    def synchronise(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Return what a call takes until the device is done with it."""
        self.synchronise()
        began = time.perf_counter()
        call()
        self.synchronise()
        return time.perf_counter() - began

    def in_turns(self, calls: dict[str, Callable[[], object]], rounds: int = 0) -> dict[str, float]:
        """Return the median seconds of each call, the calls taking turns, after one of each that is not counted."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range((rounds or self.steps) + 1):
            for name, call in calls.items():
                taken = self.seconds(call)
                if turn:
                    times[name].append(taken)
        return {name: statistics.median(some) for name, some in times.items()}

    def held(self) -> int:
        """Return the bytes of device memory that are allocated; 0 on a CPU."""
        import gc

        import torch

        if self.device.type != "cuda":
            return 0
        # What is garbage now would else be freed, and counted as another's, later.
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak_gib(self, call: Callable[[], object], before: int) -> float | None:
        """Return the most device memory allocated in a call beside the bytes that `held` told before; None on a CPU.

        Told before a contender was made, they are what the others hold, so that what is left is the contender's alone.
        """
        import torch

        call()  # the first makes what stays, such as the optimizers' state
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def stepper(self, *settings: str, preset: str = "muon", rows: int = 0, compile: bool = False) -> Any:
        """Return a Stepper on made-up tokens, warmed up; `compile` on CUDA alone."""
        import numpy as np

        from nanorun.config import resolve
        from nanorun.data.batches import token_set
        from nanorun.head import refuse_without_fp8
        from nanorun.model import GPT
        from nanorun.optim.build import build_optimizers
        from nanorun.tracks import load_track
        from nanorun.training.distributed import Ranks
        from nanorun.training.step import Stepper

        rows = rows or self.rows
        shape = [f"model.{key}={value}" for key, value in self.shape.items()]
        batch = f"train.batch_tokens={rows * self.shape['context_len']}"
        config = resolve(load_track("fineweb-small"), preset, [*shape, batch, "train.steps=1000", *settings])
        numbers = np.random.default_rng(0).integers(
            0, self.vocab_size, (rows * 4 + 1) * config.model.context_len
        )
        # A little can be learned: the smaller of two neighbours.
        tokens = token_set([np.minimum(numbers, np.roll(numbers, 1)).astype(np.uint16)])
        model = GPT(config.model, self.vocab_size)
        model.initialise(0)
        model.to(self.device)
        model.checkpoint_activations = config.train.checkpoint_activations
        if config.train.fp8_head and not self.dry:
            refuse_without_fp8(self.device, config.model.n_embd)
        model.fp8_head, model.document_token = config.train.fp8_head, 0
        optimizers = build_optimizers(model, config.optim_by_role)
        stepper = Stepper(model, optimizers, tokens, config, device=self.device, ranks=Ranks())
        stepper.warm_up()
        if compile and self.device.type == "cuda":
            stepper.compile()
            stepper.warm_up()
        return stepper


def gemm(suite: Suite) -> dict[str, Any]:
    """The rates that all shares are told against: a bf16 product and a copy."""
    import torch

    size = 256 if suite.dry else 8192
    dtype = torch.bfloat16
    a, b = torch.randn(2, size, size, device=suite.device).to(dtype)
    large = torch.empty(size * size * 8, dtype=dtype, device=suite.device)
    other = torch.empty_like(large)
    best = min(suite.seconds(lambda: a @ b) for _ in range(4 if suite.dry else 20))
    copy = min(suite.seconds(lambda: other.copy_(large)) for _ in range(4 if suite.dry else 20))
    return {"bf16_tflops": 2 * size**3 / best / 1e12, "copy_gb_per_second": 2 * large.nbytes / copy / 1e9}


def tests(suite: Suite) -> dict[str, Any]:
    """The tests marked `gpu`; on a CPU all of them are skipped."""
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text())
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *files]
    limit = max(30.0, min(150.0, suite.left()))
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"passed": False, "said": f"not done in {limit:.0f} s"}
    (suite.out / "tests.txt").write_text(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines() or [done.stderr[-300:]]
    return {"passed": done.returncode == 0, "said": lines[-1]}


def speed(suite: Suite) -> dict[str, Any]:
    """Our step, compiled and as written, beside the simple trainer's architecture and plain PyTorch, in turns."""
    calls, opened, compiling, peaks = {}, {}, {}, {}
    with closing_all() as steppers:
        for name, compile in (("nanorun", True), ("nanorun, eager", False)):
            before, began = suite.held(), time.perf_counter()
            # Eager code holds several copies of the scores.
            rows = f"train.micro_batch_rows={suite.rows if suite.dry else 64 if compile else 16}"
            steppers.append(suite.stepper(rows, compile=compile))
            compiling[name] = time.perf_counter() - began
            opened[name] = steppers[-1]
            calls[name] = stepping(steppers[-1])
            peaks[name] = suite.peak_gib(calls[name], before)
        for name in ("simple", "plain PyTorch"):
            before, began = suite.held(), time.perf_counter()
            calls[name] = reference_step(suite, name)
            with_fitting_rows(calls[name].model, calls[name])
            compiling[name] = time.perf_counter() - began
            peaks[name] = suite.peak_gib(calls[name], before)
        seconds = suite.in_turns(calls)
        flops = opened["nanorun"].model.flops_per_token()
        tokens = suite.rows * suite.shape["context_len"]
        rate = suite.found.get("gemm", {}).get("bf16_tflops")
        rows_of = {name: one.micro_batch_rows for name, one in opened.items()}
        rows_of |= {name: call.model.micro_batch_rows for name, call in calls.items() if name not in opened}
        return {
            name: {
                "step_ms": taken * 1e3,
                "tokens_per_second": tokens / taken,
                "share_of_gemm": flops * tokens / taken / rate / 1e12 if rate else None,
                "peak_gib": peaks[name],
                "micro_batch_rows": rows_of[name],
                "set_up_seconds": compiling[name],
                "of_simple": seconds["simple"] / taken,
            }
            for name, taken in seconds.items()
        }


class ReferenceStep:
    """One more step of a reference, on the same tokens."""

    def __init__(self, suite: Suite, model: Any) -> None:
        import torch

        shape = (suite.rows, suite.shape["context_len"])
        self.model = model
        self.idx_BT = torch.randint(suite.vocab_size, shape, device=suite.device)

    def __call__(self) -> None:
        self.model.train_step(self.idx_BT, self.idx_BT)


def reference_step(suite: Suite, name: str) -> ReferenceStep:
    """Return the step of the simple trainer, "simple", or of "plain PyTorch"."""
    import torch
    from gpu_references import Plain, PlainMuon, Simple, plain_update

    shape = suite.shape
    sizes = (shape["n_layer"], shape["n_head"], shape["n_embd"], shape["context_len"])
    # The simple trainer fills its vocabulary up to 50,304, GPT-2 has 50,257.
    filled = -(-suite.vocab_size // 128) * 128
    simple = name == "simple"
    model = (Simple(filled, *sizes) if simple else Plain(suite.vocab_size, *sizes)).to(suite.device)
    model.build_optimizers()
    if simple and not suite.dry:
        model.compile(dynamic=False)
        PlainMuon.update = staticmethod(torch.compile(plain_update, dynamic=False))
    if not simple:
        model.micro_batch_rows = 16
    return ReferenceStep(suite, model)


def with_fitting_rows(model: Any, call: Callable[[], object]) -> None:
    """Run a step once, with micro-batches halved until they fit."""
    import torch

    while True:
        try:
            return call() and None
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            if model.micro_batch_rows == 1:
                raise
            model.micro_batch_rows //= 2


@contextmanager
def closing_all() -> Iterator[list[Any]]:
    """A list of steppers whose threads end with the block, and whose memory is then free."""
    import gc

    import torch

    steppers: list[Any] = []
    try:
        yield steppers
    finally:
        for one in steppers:
            one.close()
        steppers.clear()
        gc.collect()
        if torch.cuda.is_available():
            # What was compiled may hold on to the models.
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def stepping(stepper: Any) -> Callable[[], object]:
    """Return a call that takes the next step."""
    numbers = iter(range(10**6))
    return lambda: stepper.step(next(numbers), 1.0)


def shares(suite: Suite) -> dict[str, Any]:
    """Muon's and the loader's share of the compiled step, and whether the host waits for the device in it."""
    import torch

    with closing_all() as steppers:
        rows = f"train.micro_batch_rows={suite.rows if suite.dry else 64}"
        steppers.append(suite.stepper(rows, compile=True))
        stepper = steppers[0]
        updates: list[Any] = []
        real = stepper.optimizers.step

        def timed(*arguments: Any, **options: Any) -> None:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if not suite.dry else []
            began = time.perf_counter()
            if pair:
                pair[0].record()
            real(*arguments, **options)
            if pair:
                pair[1].record()
            updates.append(pair or time.perf_counter() - began)

        stepper.optimizers.step = timed
        taken = stepping(stepper)
        whole = suite.in_turns({"step": taken})["step"]
        in_updates = [one[0].elapsed_time(one[1]) / 1e3 if not suite.dry else one for one in updates[1:]]
        stepper.optimizers.step = real
        waits = host_waits(suite, taken)
        # The same tokens again, already on the device: what remains of the loader is the difference.
        still: dict[int, Any] = {}

        def from_device(span: Any, then: Any = None) -> Any:
            if span.n_rows not in still:
                still[span.n_rows] = stepper.feed.prepare(span).pair
            return still[span.n_rows]

        # Each counts its own steps, so that the feed is asked for what it was told to prepare.
        still_steps = swapping(stepper.feed, from_device, stepping(stepper))
        loader = suite.in_turns({"read": taken, "still": still_steps})
        return {
            "step_ms": whole * 1e3,
            "optimizer_share": statistics.median(in_updates) / whole,
            "loader_share": 1 - loader["still"] / loader["read"],
            **waits,
        }


def swapping(feed: Any, take: Callable[..., Any], call: Callable[[], object]) -> Callable[[], object]:
    """Return `call` with the feed's `take` replaced while it runs."""

    def swapped() -> object:
        feed.take = take
        try:
            return call()
        finally:
            del feed.take

    return swapped


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "aten::item")


def host_waits(suite: Suite, step: Callable[[], object], n: int = 3) -> dict[str, Any]:
    """Return what made the host wait in some steps: by the profiler, and by torch's own check, which raises."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = suite.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    suite.synchronise()
    with profile(activities=activities) as seen:
        for _ in range(n):
            step()
        # The profiler waits for the device itself when it ends: a mark tells those waits apart.
        with torch.profiler.record_function("the steps end"):
            pass
    events = list(seen.events())
    end = min(one.time_range.start for one in events if one.name == "the steps end")
    waits = [one.name for one in events if one.name in WAITS and one.time_range.start < end]
    said = ""
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            said = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    return {"host_waits": {name: waits.count(name) for name in set(waits)}, "sync_error": said}


def memory(suite: Suite) -> dict[str, Any]:
    """Time and memory with and without checkpointed activations, of eager code in equal micro-batches."""
    rows = f"train.micro_batch_rows={2 if suite.dry else 16}"
    with closing_all() as steppers:
        calls, peaks = {}, {}
        for kind in ("none", "block"):
            few, before = 4 if suite.dry else 64, suite.held()
            steppers.append(suite.stepper(f"train.checkpoint_activations={kind}", rows, rows=few))
            calls[kind] = stepping(steppers[-1])
            peaks[kind] = suite.peak_gib(calls[kind], before)
        seconds = suite.in_turns(calls)
        return {
            name: {
                "step_ms": seconds[name] * 1e3,
                "peak_gib": peaks[name],
                "micro_batch_rows": steppers[0].micro_batch_rows,
            }
            for name in calls
        }


def golden_losses(suite: Suite) -> dict[str, Any]:
    """By how much the losses of the first steps differ between this device and the CPU, in nats."""
    import golden
    import torch

    found = {}
    with tempfile.TemporaryDirectory() as data:
        for preset in ("adamw", "muon"):
            options = {"data": Path(data), "n_steps": 2 if suite.dry else golden.N_STEPS}
            losses = [
                golden.first_losses("shakespeare-sprint", preset, device=device, **options)
                for device in (torch.device("cpu"), suite.device)
            ]
            found[preset] = {
                "largest_move": golden.largest_move(*losses),
                "last": [one[-1] for one in losses],
            }
    return found


def newton_schulz_rates(suite: Suite) -> dict[str, Any]:
    """Newton–Schulz on the stacks of GPT-2 small: bf16 as written, compiled, and with the Triton kernel."""
    width = suite.shape["n_embd"]
    shapes = ((48, width, width), (12, 4 * width, width), (12, width, 4 * width))
    return {"×".join(map(str, shape)): _newton_schulz_rate(suite, shape) for shape in shapes}


def _newton_schulz_rate(suite: Suite, shape: tuple[int, int, int]) -> dict[str, dict[str, float]]:
    import torch

    from nanorun.optim.muon import compiled_momentum, orthogonal_momentum

    options = {"nesterov": True, "ns_steps": 5, "coefficients": "original", "eps": 1e-30}
    momentum = torch.full((), 0.95, device=suite.device)
    grad, before = torch.randn((2, *shape), device=suite.device)
    exact = orthogonal_momentum(grad[:1].double().cpu(), before[:1].double().cpu(), 0.95, **options)[1]
    calls = {"eager": lambda: orthogonal_momentum(grad.clone(), before, momentum, **options)[1]}
    if not suite.dry:
        importlib.import_module("nanorun.optim.symmetric_products")
        compiled = compiled_momentum()
        calls["compiled"] = lambda: compiled(grad, before, momentum, **options)[1]
        calls["compiled, Triton"] = lambda: compiled(grad, before, momentum, triton=True, **options)[1]
    updates = {name: call()[:1].double().cpu() for name, call in calls.items()}
    seconds = suite.in_turns(calls, rounds=2 if suite.dry else 20)
    return {
        name: {"ms": taken * 1e3, "error": float((updates[name] - exact).norm() / exact.norm())}
        for name, taken in seconds.items()
    }


def fp8_head(suite: Suite) -> dict[str, Any]:
    """What the FP8 head does to time and loss: the same steps with it and without, as written."""
    n_steps = 3 if suite.dry else 40
    rows = 4 if suite.dry else 32
    with closing_all() as steppers:
        losses: dict[str, list[float]] = {}
        calls = {}
        for name, value in (("bf16", "false"), ("fp8", "true")):
            steppers.append(suite.stepper(f"train.fp8_head={value}", "train.micro_batch_rows=8", rows=rows))
            results = [steppers[-1].step(step, 1.0).loss for step in range(n_steps)]
            losses[name] = [float(loss) for loss in results]
            calls[name] = stepping(steppers[-1])
        seconds = suite.in_turns(calls)
        differences = [other - one for one, other in zip(losses["bf16"], losses["fp8"])]
        return {
            "last_loss": {name: some[-1] for name, some in losses.items()},
            "mean_difference": statistics.mean(differences),
            "largest_difference": max(map(abs, differences)),
            "step_ms": {name: taken * 1e3 for name, taken in seconds.items()},
        }


def documents(suite: Suite) -> dict[str, Any]:
    """Attention forward and backward: causal, under a mask of documents, and by blocks in compiled code."""
    import torch

    from nanorun.documents import attention_in_documents, document_mask

    n_rows, n_head, width = (2, 2, 16) if suite.dry else (16, 6, 128)
    n_positions = suite.shape["context_len"]
    qkv = torch.randn(3, n_rows, n_head, n_positions, width, device=suite.device, dtype=torch.bfloat16)
    # About six documents a row.
    idx_BT = torch.randint(max(2, n_positions // 6), (n_rows, n_positions), device=suite.device)

    def under_mask(in_blocks: bool) -> torch.Tensor:
        return attention_in_documents(*qkv, document_mask(idx_BT, 0, in_blocks=in_blocks))

    in_blocks = under_mask if suite.dry else torch.compile(under_mask, dynamic=False)
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "causal": lambda: torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True),
        "mask": lambda: under_mask(False),
        "blocks": lambda: in_blocks(True),
    }
    blocks, mask = kinds["blocks"]().float(), kinds["mask"]().float()
    gap = float((blocks - mask).norm() / mask.norm())
    qkv.requires_grad_()
    if suite.dry:  # no backward pass by blocks on a CPU
        del kinds["blocks"]
    seconds = suite.in_turns(
        {name: (lambda call=call: call().sum().backward()) for name, call in kinds.items()}
    )
    return {"ms": {name: taken * 1e3 for name, taken in seconds.items()}, "blocks_from_mask": gap}


SECTIONS: dict[str, tuple[Callable[[Suite], dict[str, Any]], float]] = {
    "gemm": (gemm, 10),
    "tests": (tests, 60),
    "speed": (speed, 180),
    "shares": (shares, 70),
    "golden": (golden_losses, 30),
    "newton_schulz": (newton_schulz_rates, 40),
    "memory": (memory, 20),
    "fp8_head": (fp8_head, 25),
    "documents": (documents, 20),
}
"""Each section and the seconds that it wants to be begun with, a guess until it has run on a GPU."""


def run(suite: Suite, names: list[str]) -> None:
    import torch

    on_gpu = suite.device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU, dry run: no figure here means anything",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "budget_seconds": suite.budget,
    }
    suite.keep("about", about)
    for name in names:
        call, wanted = SECTIONS[name]
        if suite.left() < wanted and not suite.dry:
            suite.keep(name, {"left_out": f"{suite.left():.0f} s left, {wanted:.0f} wanted"})
            continue
        began = time.monotonic()
        # A section that fails must not take the others' figures along.
        try:
            figures = call(suite)
        except Exception as error:
            figures = {"failed": f"{type(error).__name__}: {str(error)[:400]}"}
            if suite.dry:
                raise
        suite.keep(name, {**figures, "section_seconds": time.monotonic() - began})
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def table(found: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield one line for each figure."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from table(value, f"{prefix}{name} · ")
        else:
            yield f"{prefix}{name:<24} {f'{value:.5g}' if isinstance(value, float) else value}"


def fetch_wheels(folder: Path, python: str) -> None:
    """Download the wheels that a machine with that Python, on x86-64 Linux, may lack."""
    platforms = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--only-binary=:all:",
        "--no-deps",
        "-d",
        str(folder),
    ]
    command += [word for one in platforms for word in ("--platform", one)]
    command += ["--python-version", python, "--implementation", "cp"]
    pins = (ROOT / "constraints.txt").read_text().split()
    wanted = [pin for pin in pins if pin.split("==")[0].replace("_", "-") in WHEELS]
    subprocess.run([*command, *wanted], check=True)


@contextmanager
def installed_wheels(folder: Path | None) -> Iterator[None]:
    """Have the wheels of a folder importable, here and in processes started here."""
    if folder is None:
        yield
        return
    with tempfile.TemporaryDirectory() as site:
        wheels = sorted(map(str, folder.glob("*.whl")))
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site]
        subprocess.run([*install, *wheels], check=True)
        sys.path.insert(0, site)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (site, before)))
        yield


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-suite")))
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install for this run")
    parser.add_argument("--fetch-wheels", type=Path, help="a folder to download them into; nothing is run")
    parser.add_argument("--python", default="3.12", help="the Python that they are for")
    arguments = parser.parse_args(words)
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--only {unknown[0]}: there are {', '.join(SECTIONS)}")
    if arguments.fetch_wheels:
        fetch_wheels(arguments.fetch_wheels, arguments.python)
        return 0
    with installed_wheels(arguments.wheels):
        sys.path.insert(0, str(ROOT))
        import torch

        if not arguments.dry_run and not torch.cuda.is_available():
            parser.error("no CUDA device here: --dry-run runs the same code on the CPU")
        suite = Suite(arguments.dry_run, arguments.out, arguments.budget)
        run(suite, names)
    print("\n".join(table(suite.found)))
    bad = [name for name, one in suite.found.items() if "failed" in one or one.get("passed") is False]
    print(f"failed: {', '.join(bad)}" if bad else "all sections that were run are done")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
