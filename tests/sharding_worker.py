"""What each rank of test_training_sharding does: train sharded, and on rank 0 in one piece, and tell both.

Called by torchrun with one JSON list of cases, each a preset and its settings; rank 0 prints one line of JSON a case.
"""

from __future__ import annotations

import copy
import json
import sys
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist

from nanorun.config import RunConfig, resolve
from nanorun.data.batches import token_set
from nanorun.model import GPT
from nanorun.optim.averaging import make_average
from nanorun.optim.build import OptimizerSet, build_optimizers
from nanorun.tracks import load_track
from nanorun.training import checkpoint, distributed, sharding
from nanorun.training.compilation import compile_if_it_pays
from nanorun.training.distributed import Ranks
from nanorun.training.step import Stepper, chosen_precision

CPU = torch.device("cpu")
VOCAB_SIZE = 65
TINY = [
    "train.compile=off",
    "train.batch_tokens=512",
    "train.micro_batch_rows=1",
    "train.grad_clip=0.5",
    "model.n_layer=2",
]
TINY += ["model.n_head=2", "model.n_embd=32", "model.context_len=64"]
STEPS = 3


def make_stepper(config: RunConfig, ranks: Ranks) -> Stepper:
    numbers = np.random.default_rng(0).integers(0, VOCAB_SIZE, 5000)
    tokens = token_set([np.minimum(numbers, np.roll(numbers, 1))])
    average = make_average(**config.average.model_dump())
    if sharding.applies(config, ranks):
        precision = chosen_precision(config.train.precision, CPU)
        model = sharding.new_model(config, VOCAB_SIZE, CPU, ranks, precision)
        optimizers = sharding.build_sharded(model, config.optim_by_role, average, ranks)
    else:
        model = GPT(config.model, VOCAB_SIZE)
        model.initialise(config.seed)
        optimizers = build_optimizers(model, config.optim_by_role, average)
    model.checkpoint_activations = config.train.checkpoint_activations
    return Stepper(model, optimizers, tokens, config, device=CPU, ranks=ranks)


def train(stepper: Stepper, steps: range) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step."""
    found = []
    for step in steps:
        result = stepper.step(step, 1.0)
        stepper.optimizers.after_step(step + 1)
        found.append((float(result.loss), float(result.grad_norm)))
    return found


def n_bytes(stepper: Stepper, ranks: Ranks) -> dict[str, list[int]]:
    """Return what each rank holds: weights in the model's shards, summed gradients, optimizer state."""
    gradients = [0]
    real = stepper.update

    def counting(*words):
        gradients[0] = sum(sharding.rows(p.grad).nbytes for p in stepper.model.parameters())
        return real(*words)

    stepper.update = counting
    train(stepper, range(STEPS + 1, STEPS + 2))
    weights = sum(sharding.rows(p).nbytes for p in stepper.model.parameters())
    whole = sum(part.seen.nbytes for part in stepper.optimizers.parts if part.owner is not None)
    mine = torch.tensor([weights, gradients[0], OptimizerSet.state_bytes(stepper.optimizers), whole])
    everyone = [torch.zeros_like(mine) for _ in range(ranks.n_ranks)]
    dist.all_gather(everyone, mine)
    return {
        what: [int(one[i]) for one in everyone]
        for i, what in enumerate(("weights", "gradients", "state", "owned"))
    }


def distance(a: dict, b: dict) -> float:
    """Return the largest difference between two dicts of tensors, or infinity where they do not match."""
    if sorted(a) != sorted(b) or any(a[key].shape != b[key].shape for key in a):
        return float("inf")
    return max(float((a[key].float() - b[key].float()).abs().max()) for key in a)


def flat_state(state: dict) -> dict[str, torch.Tensor]:
    found = {}
    for i, one in enumerate(state["optimizers"]):
        for k, entry in one["state"].items():
            found.update({f"{i}.{k}.{key}": value for key, value in entry.items()})
    for key, value in (state["average"] or {}).items():
        tensors = value if isinstance(value, list) else []
        tensors = list(chain(*tensors)) if tensors and isinstance(tensors[0], list) else tensors
        found.update({f"average.{key}.{k}": tensor for k, tensor in enumerate(tensors)})
    return found


def run_case(preset: str, settings: list[str], ranks: Ranks) -> dict:
    track = load_track("shakespeare-sprint")
    config = resolve(track, preset, [*TINY, "train.shard=fsdp", *settings])
    shards, one = make_stepper(config, ranks), make_stepper(config, Ranks())
    told = {"same_start": checkpoint.weights_sha256(shards.model) == checkpoint.weights_sha256(one.model)}
    told["compiled"] = compile_if_it_pays(shards, config.train.compile, steps=STEPS)[0]
    one.warm_up()
    told["sharded"], told["one"] = train(shards, range(STEPS)), train(one, range(STEPS))
    weights = sharding.whole_weights(shards.model, keep=True)
    state, state_of_one = shards.optimizers.whole_state(), copy.deepcopy(one.optimizers.state_dict())
    told["bytes_of_all"] = shards.optimizers.state_bytes()
    shared = [weights, state] if ranks.leads else [None, None]
    dist.broadcast_object_list(shared, src=0)
    weights, state = shared
    told["weights_apart"] = distance(weights, one.model.state_dict())
    told["state_apart"] = distance(flat_state(state), flat_state(state_of_one))
    # Both ways: what either left, taken up by the other.
    alone, together = make_stepper(config, Ranks()), make_stepper(config, ranks)
    alone.model.load_state_dict(weights)
    alone.optimizers.load_state_dict(state)
    alone.refresh_working_copy()
    together.optimizers.load_whole(one.model.state_dict(), state_of_one)
    last = range(STEPS, STEPS + 1)
    told["last"] = [train(stepper, last)[0] for stepper in (one, shards, alone, together)]
    for stepper in (shards, one):
        stepper.to_evaluation()
    judged = sharding.whole_weights(shards.model, keep=True)
    told["judged_apart"] = distance(judged, one.model.state_dict())
    for stepper in (shards, one):
        stepper.to_training()
    told["bytes"] = n_bytes(shards, ranks)
    told["bytes_of_one"] = sum(p.nbytes for p in one.model.parameters()), one.optimizers.state_bytes()
    for stepper in (shards, one, alone, together):
        stepper.close()
    return told


def main() -> None:
    torch.set_num_threads(1)
    ranks = distributed.join("cpu")
    for preset, settings in json.loads(sys.argv[1]):
        told = run_case(preset, settings, ranks)
        if ranks.leads:
            print(json.dumps(told), flush=True)
    ranks.wait()
    distributed.leave()


if __name__ == "__main__":
    main()
