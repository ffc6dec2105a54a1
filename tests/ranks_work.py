"""Short trainings of a tiny model on as many ranks as torchrun started, for tests to compare.

    python -m torch.distributed.run --nproc-per-node N tests/ranks_work.py FOLDER

Each rank writes FOLDER/N-RANK.json. Two ranks also leave checkpoints of half the steps, which others go on from.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from nanorun.config import resolve
from nanorun.data.batches import token_set
from nanorun.model import GPT
from nanorun.optim.build import build_optimizers
from nanorun.tracks import load_track
from nanorun.training import distributed
from nanorun.training.distributed import Ranks
from nanorun.training.gradients import GradientSum
from nanorun.training.step import Stepper

VOCAB_SIZE, STEPS, ROWS = 65, 6, 8
TINY = [
    f"train.steps={STEPS}",
    f"train.batch_tokens={ROWS * 64}",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "train.grad_clip=1.0",
]
OPTIMIZERS = {
    "muon": ["muon"],
    "adamw": ["adamw"],
    "shampoo": [
        "muon",
        "optim.matrix.name=shampoo",
        "optim.matrix.lr=0.05",
        "optim.matrix.precondition_frequency=2",
    ],
    "soap": [
        "muon",
        "optim.matrix.name=soap",
        "optim.matrix.precondition_frequency=2",
        "optim.matrix.lr=0.003",
    ],
}
MODES = {
    "bf16_master": ["muon", "train.precision=bf16_master"],
    "recomputed": ["muon", "train.checkpoint_activations=block"],
}


def make_stepper(case: str, ranks: Ranks, micro_batch_rows: int) -> Stepper:
    preset, *settings = {**OPTIMIZERS, **MODES}[case]
    settings = [*TINY, *settings, f"train.micro_batch_rows={micro_batch_rows}"]
    config = resolve(load_track("shakespeare-sprint"), preset, settings)
    model = GPT(config.model, VOCAB_SIZE)
    model.initialise(config.seed)
    model.checkpoint_activations = config.train.checkpoint_activations
    numbers = np.random.default_rng(0).integers(0, VOCAB_SIZE, 5000)
    tokens = token_set([np.minimum(numbers, np.roll(numbers, 1))])
    optimizers = build_optimizers(model, config.optim_by_role, peers=ranks)
    stepper = Stepper(model, optimizers, tokens, config, device=torch.device("cpu"), ranks=ranks)
    # Many buckets, where one would hold the whole model.
    stepper.gradients = GradientSum(stepper.working.parameters(), ranks, bucket_bytes=20_000)
    stepper.warm_up()
    return stepper


def losses(stepper: Stepper, first: int = 0, end: int = STEPS) -> list[float]:
    return [float(stepper.step(step, 1.0).loss) for step in range(first, end)]


def split_alike(case: str, ranks: Ranks) -> dict[str, list[float]]:
    """Return the losses by size of micro-batches: a row, three rows and what is left, all of the rank's rows."""
    share = ROWS // ranks.n_ranks
    sizes = sorted({1, min(3, share), share})
    return {str(size): losses(make_stepper(case, ranks, size)) for size in sizes}


def saved_halfway(case: str, ranks: Ranks, folder: Path) -> None:
    stepper = make_stepper(case, ranks, 4)
    losses(stepper, end=STEPS // 2)
    state = {"model": stepper.model.state_dict(), "optimizers": stepper.optimizers.state_dict()}
    if ranks.leads:
        torch.save(state, folder / f"{case}.pt")


def gone_on(case: str, ranks: Ranks, folder: Path) -> list[float]:
    stepper = make_stepper(case, ranks, 4)
    state = torch.load(folder / f"{case}.pt", weights_only=True)
    stepper.model.load_state_dict(state["model"])
    stepper.optimizers.load_state_dict(state["optimizers"])
    stepper.refresh_working_copy()
    return losses(stepper, first=STEPS // 2)


def with_one_bad_step(case: str, ranks: Ranks) -> dict[str, object]:
    """Return what becomes of a step in which the last rank's loss is not a number."""
    stepper = make_stepper(case, ranks, 1)
    forward = stepper.forward
    before = losses(stepper, end=2)
    weights = [parameter.detach().clone() for parameter in stepper.model.parameters()]

    def poisoned(*pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum, count = forward(*pair)
        return loss_sum * float("nan"), count

    if ranks.rank == ranks.n_ranks - 1:
        stepper.forward = poisoned
    bad = bool(stepper.step(2, 1.0).bad)
    stepper.forward = forward
    kept = all(map(torch.equal, weights, stepper.model.parameters()))
    return {"bad": bad, "kept": kept, "losses": before + losses(stepper, first=3)}


def of_state(case: str, ranks: Ranks) -> list[int]:
    """Return the bytes of this rank's state, and of all ranks' together as rank 0 tells."""
    stepper = make_stepper(case, ranks, 4)
    losses(stepper, end=2)
    own = stepper.optimizers.state_bytes()
    stepper.optimizers.state_dict()
    return [own, stepper.optimizers.state_bytes()]


def work(ranks: Ranks, folder: Path) -> dict[str, object]:
    if ranks.n_ranks == 2:
        for case in OPTIMIZERS:
            saved_halfway(case, ranks, folder)
        ranks.wait()
    done: dict[str, object] = {case: {"losses": split_alike(case, ranks)} for case in [*OPTIMIZERS, *MODES]}
    for case in OPTIMIZERS:
        done[case] |= {
            "gone_on": gone_on(case, ranks, folder),
            "bad_step": with_one_bad_step(case, ranks),
            "state_bytes": of_state(case, ranks),
        }
    return {**done, "again": losses(make_stepper("muon", ranks, 1))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    joined = distributed.join("cpu")
    result = work(joined, Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"{joined.n_ranks}-{joined.rank}.json").write_text(json.dumps(result))
    joined.wait()
    distributed.leave()
