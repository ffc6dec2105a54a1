"""Text from a run's newest checkpoint."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import torch

from nanorun.config import RunConfig, make_config
from nanorun.data.prepare import default_out
from nanorun.data.tokenizers import Tokenizer, tokenizer_from_manifest
from nanorun.data.tokenizers.json_file import FILE_NAME
from nanorun.errors import UserError
from nanorun.model import GPT
from nanorun.tables import read_toml
from nanorun.training import checkpoint
from nanorun.training.saved import check_weights, refused

SMALLEST_TEMPERATURE = 1e-4
"""Below it the likeliest token is taken: logits differ by more than fp32's rounding, and nothing overflows."""


def load_model(run: Path) -> tuple[GPT, Tokenizer]:
    """Return the model and the tokenizer of a run's newest checkpoint that verifies."""
    if not (run / "config.toml").is_file():
        raise UserError(f"{run}: no such run (no config.toml there); runs lie under ./runs, one folder each")
    config = make_config(read_toml(run / "config.toml"), where=str(run / "config.toml"))
    saved, _ = checkpoint.newest_of(run)
    with refused(saved.path):
        tokenizer = tokenizer_from_manifest(dict(saved.state["tokenizer"]), _tokenizer_folder(run, config))
        with torch.device("meta"):  # takes no memory, whatever size the config says
            check_weights(saved.evaluation, GPT(config.model, tokenizer.vocab_size), saved.path)
        model = GPT(config.model, tokenizer.vocab_size)
        model.load_state_dict(saved.evaluation)
        model.document_token = tokenizer.eot
    return model.eval(), tokenizer


def _tokenizer_folder(run: Path, config: RunConfig) -> Path:
    """Return where the tokenizer's file lies, if it has one: in the run's own folder, or beside the run's shards."""
    folders = [run]
    with suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # UserError, of a corpus not known here, is a ValueError
        data = Path(json.loads((run / "options.json").read_text())["data"])
        folders += [data, default_out(config.data.corpus, config.data.tokenizer, root=data)]
    return next((folder for folder in folders if (folder / FILE_NAME).exists()), run)


@torch.no_grad()
def generate(
    model: GPT, idx_T: torch.Tensor, *, n_tokens: int, temperature: float, top_k: int, seed: int
) -> torch.Tensor:
    """Return `n_tokens` new tokens after `idx_T` (at least one token).

    Temperature 0 takes the likeliest token; `top_k` 0 keeps all. The context is the model's newest
    `context_len` tokens. The result is a function of the arguments alone.
    """
    generator = torch.Generator().manual_seed(seed)
    context_len = model.config.context_len
    n_prompt = len(idx_T)
    for _ in range(n_tokens):
        logits_V = model(idx_T[None, -context_len:])[0, -1].float()
        idx_T = torch.cat([idx_T, _pick(logits_V, temperature, top_k, generator)])
    return idx_T[n_prompt:]


def _pick(logits_V: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> torch.Tensor:
    if temperature < SMALLEST_TEMPERATURE:
        return logits_V.argmax()[None]
    if 0 < top_k < len(logits_V):
        floor = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < floor, float("-inf"))
    return torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)


def sample(run: Path, *, prompt: str, n_tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """Return the prompt and the text that the run's model writes after it."""
    if not math.isfinite(temperature):
        raise UserError(f"--temperature {temperature}: wanted a number of 0 or more, such as 0.8")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("--prompt: not UTF-8; wanted text, such as --prompt 'My fellow citizens'") from None
    model, tokenizer = load_model(run)
    ids = [int(i) for i in tokenizer.encode(prompt)]
    # An empty prompt starts at a document's beginning, or at a line's where the tokens know no document.
    start = ids or [tokenizer.eot if tokenizer.eot is not None else int(tokenizer.encode("\n")[0])]
    new = generate(
        model, torch.tensor(start), n_tokens=n_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    return prompt + tokenizer.decode([i for i in new.tolist() if i != tokenizer.eot])
