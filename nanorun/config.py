"""What a run is: a frozen, strict RunConfig, read from a track, a preset and `--set key=value`."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nanorun.errors import UserError, nearest
from nanorun.tables import merged, nested, parse_setting, read_toml
from nanorun.tracks import Track, preset_names

ARCH_SWITCHES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "norm": "layernorm",
        "positions": "learned",
        "activation": "gelu",
        "bias": True,
        "qk_norm": False,
        "tied_head": True,
        "zero_init_projections": False,
        "logit_softcap": 0.0,
    },
    "modern": {
        "norm": "rmsnorm",
        "positions": "rotary",
        "activation": "relu2",
        "bias": False,
        "qk_norm": True,
        "tied_head": False,
        "zero_init_projections": True,
        "logit_softcap": 15.0,
    },
}
"""What each `arch` sets; every switch can be set by itself too."""

ROLES = ("embedding", "table", "head", "matrix", "vector")

MOST_IN_A_MIX = 32
"""Corpora of a mix; the orders of so many are kept in memory."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(_Strict):
    corpus: str
    """Name of a source under nanorun/data/sources."""
    tokenizer: str
    """`byte`, `char` or `gpt2`."""
    mix: dict[str, Annotated[float, Field(gt=0, le=1e9)]] = Field(default_factory=dict)
    """Corpora, or folders of prepared ones, to train on instead of `corpus`, and the share of each in the rows of a
    run; shares are relative to their sum. Validation stays on `corpus`."""

    @model_validator(mode="after")
    def _is_of_a_size(self) -> DataConfig:
        if len(self.mix) > MOST_IN_A_MIX:
            raise ValueError(f"data.mix holds {len(self.mix)} corpora: wanted at most {MOST_IN_A_MIX}")
        return self


class ModelConfig(_Strict):
    """The shape of the network; see nanorun/model.py for what each switch does."""

    arch: Literal["gpt2", "modern"] = "modern"
    """Sets the switches below that are not set by themselves."""
    n_layer: int = Field(4, ge=1)
    n_head: int = Field(4, ge=1)
    n_embd: int = Field(128, ge=1)
    """Width of the residual stream; a multiple of n_head."""
    context_len: int = Field(256, ge=1)
    """Tokens of a training row and of a validation window."""
    mlp_ratio: int = Field(4, ge=1)
    """Hidden width of the MLP over n_embd."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    positions: Literal["learned", "rotary"] = "rotary"
    activation: Literal["gelu", "gelu_exact", "relu2"] = "relu2"
    """`gelu` is GPT-2's, by tanh; `gelu_exact` has the error function, as nanoGPT does."""
    bias: bool = False
    qk_norm: bool = True
    tied_head: bool = False
    zero_init_projections: bool = True
    logit_softcap: float = Field(15.0, ge=0)
    """Logits are cap·tanh(logits/cap); 0 turns it off."""
    dropout: float = Field(0.0, ge=0, lt=1)
    attention_dropout: bool = True
    """Whether dropout falls on the weights of attention too, as in GPT-2; without, fused attention serves."""
    ngrams: list[Annotated[int, Field(ge=2, le=16)]] = Field(default_factory=list)
    """Lengths of the n-grams of tokens that have embeddings of their own, added to the token's; none by default."""
    ngram_buckets: int = Field(65536, ge=1)
    """Rows of the table of each length; n-grams beyond them share rows by a hash."""
    ngram_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the n-grams' embeddings dropped in training, each whole."""
    document_mask: bool = False
    """Attention does not look past the beginning of the document that a token is in."""
    rotary_base: float = Field(10000.0, gt=0)
    init_std: float = Field(0.02, gt=0)
    head_init_std: float = Field(0.0, ge=0)
    """Of an untied head under zero_init_projections."""
    norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_switches(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {**ARCH_SWITCHES.get(str(values.get("arch", "modern")), {}), **values}
        return values

    @property
    def drops(self) -> bool:
        """Whether training drops anything."""
        return bool(self.dropout or (self.ngrams and self.ngram_dropout))

    @model_validator(mode="after")
    def _ngrams_rise(self) -> ModelConfig:
        if self.ngrams != sorted(set(self.ngrams)):
            raise ValueError(f"ngrams = {self.ngrams}: wanted different lengths, shortest first")
        return self

    @model_validator(mode="after")
    def _head_divides_width(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if self.document_mask and self.dropout:
            raise ValueError(
                f"model.document_mask and model.dropout = {self.dropout} do not go together: leave one of them out"
            )
        if self.positions == "rotary" and (self.n_embd // self.n_head) % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.n_embd // self.n_head}")
        return self


class TrainConfig(_Strict):
    steps: int = Field(200, ge=1)
    """Optimizer steps: the declared last step."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens per optimizer step, all ranks together; a multiple of context_len."""
    micro_batch_rows: int = Field(0, ge=0)
    """Rows of one forward pass on one rank; 0 lets the machine decide."""
    length_schedule: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Tokens that attention sees at once in equal parts of the run: rows are cut into pieces of so many, which divide
    context_len. [64, 128, 256] is 64 for the first third of the steps; empty is context_len throughout."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "cyclic"] = "wsd"
    warmup_steps: int = Field(0, ge=0)
    cooldown_fraction: float = Field(0.4, ge=0, le=1)
    """Share of the steps over which `wsd` falls."""
    cycles: int = Field(1, ge=1)
    """Equal parts of the run, each with its warm-up and its fall, under `cyclic`."""
    final_scale: float = Field(0.0, ge=0, le=1)
    """Scale of the learning rate after the last step."""
    grad_clip: float = Field(0.0, ge=0)
    """Largest norm of all gradients together; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16", "bf16_master"] = "auto"
    """`auto`: fp32 on CPU, bf16 autocast on CUDA. `bf16_master`: bf16 weights with fp32 master copies."""
    compile: Literal["auto", "on", "off"] = "auto"
    checkpoint_activations: Literal["none", "block", "selective", "auto"] = "none"
    """What the backward pass computes again: nothing; all of each block; all but matrix products and attention;
    `auto`, the cheapest of these that fits the memory. The bits are the same."""
    shard: Literal["none", "fsdp"] = "none"
    """What many ranks keep: `none`, all of the model on each; `fsdp`, a share of it on each, blocks being gathered
    as they are needed. On CUDA `micro_batch_rows` = 0 is then 1."""
    fp8_head: bool = False
    """Multiply with the head in FP8 while training; for GPUs that have it, an H100 for one."""


class ValidationConfig(_Strict):
    tokens: int = Field(0, ge=0)
    """Validation tokens from the start of the split; 0 takes all."""
    every_steps: int = Field(20, ge=0)
    """Steps between validations; 0 validates after the last step alone."""
    from_step: int = Field(0, ge=0)
    """The first step that may be validated, the last step aside."""
    stride: int = Field(0, ge=0)
    """Tokens predicted by a window; 0 means context_len. Smaller gives each token more context."""


class AverageConfig(_Strict):
    """An average of the weights that validation, samples and the final weights are taken from (LAWA)."""

    kind: Literal["none", "queue", "ema"] = "none"
    """`queue`: the mean of the last snapshots. `ema`: an exponential average of all of them."""
    every_steps: int = Field(10, ge=1)
    """Steps between snapshots of the weights."""
    from_step: int = Field(0, ge=0)
    """The first step after which a snapshot may be taken."""
    snapshots: int = Field(5, ge=1)
    """Length of the queue."""
    beta: float = Field(0.9, ge=0, lt=1)
    """Weight of the past in the exponential average, per snapshot."""


class CheckpointConfig(_Strict):
    every_steps: int = Field(100, ge=0)
    """Steps between checkpoints; 0 saves after the last step and on a signal alone."""
    keep: int = Field(2, ge=1)


class LogConfig(_Strict):
    every_steps: int = Field(10, ge=1)
    """Steps between metrics rows; on CUDA each costs a synchronisation."""


class RunConfig(_Strict):
    track: str
    name: str
    """The preset's name, and the row's in the report."""
    seed: int = Field(0, ge=0, lt=2**31)
    data: DataConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    average: AverageConfig = AverageConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    optim: dict[str, dict[str, Any]]
    """Role (or `default`) to `name` and options of its optimizer."""

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.train.batch_tokens % self.model.context_len:
            raise ValueError(
                f"train.batch_tokens = {self.train.batch_tokens} is not a multiple of "
                f"model.context_len = {self.model.context_len}"
            )
        for length in self.train.length_schedule:
            if self.model.context_len % length:
                raise ValueError(
                    f"train.length_schedule has {length}, which does not divide model.context_len = "
                    f"{self.model.context_len}: rows are cut into equal pieces"
                )
        if self.validation.stride > self.model.context_len:
            raise ValueError(
                f"validation.stride = {self.validation.stride} is above "
                f"model.context_len = {self.model.context_len}"
            )
        if self.train.cycles > 1 and self.train.schedule != "cyclic":
            raise ValueError(
                f"train.cycles = {self.train.cycles} means nothing under train.schedule = {self.train.schedule!r}: "
                "wanted 'cyclic', or no cycles"
            )
        first = max(self.average.every_steps, self.average.from_step)
        if self.average.kind != "none" and first > self.train.steps:
            raise ValueError(
                f"average.{'every_steps' if first == self.average.every_steps else 'from_step'} = {first} takes no "
                f"snapshot in train.steps = {self.train.steps}: make it smaller, or set average.kind to 'none'"
            )
        unknown = set(self.optim) - {*ROLES, "default"}
        if unknown:
            role = sorted(unknown)[0]
            raise ValueError(
                f"optim.{role}: the roles are {', '.join(ROLES)} and default.{nearest(role, [*ROLES, 'default'])}"
            )
        return self

    @property
    def rows_per_step(self) -> int:
        return self.train.batch_tokens // self.model.context_len

    def length_at(self, step: int) -> int:
        """Return how long the pieces are that the rows of a step are cut into; past the last step as at its end."""
        lengths = self.train.length_schedule or [self.model.context_len]
        return lengths[min(step, self.train.steps - 1) * len(lengths) // self.train.steps]

    def mean_length(self, n_steps: int = 0) -> float:
        """Return how long the pieces are in the mean over the first `n_steps` steps; 0: over all of them."""
        return statistics.fmean(map(self.length_at, range(n_steps or self.train.steps)))

    @property
    def optim_by_role(self) -> dict[str, dict[str, Any]]:
        """The optimizers by role; a role without a `name` of its own takes what `default` says beneath."""
        default = self.optim.get("default", {})
        return {
            role: dict(options) if "name" in options else {**default, **options}
            for role, options in self.optim.items()
        }


def make_config(values: Mapping[str, Any], *, where: str) -> RunConfig:
    """Return the RunConfig of nested tables.

    `where` names the files and options that the values came from, for the message.
    Raises UserError naming each wrong key, its value and what was wanted.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explained(one) for one in error.errors()]
        raise UserError(f"{'; '.join(lines)} (in {where})") from None


def known_keys() -> list[str]:
    """Return every dotted key that a config may hold, the optimizers' own options aside."""
    return list(_leaves(RunConfig))


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _explained(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no key {key!r}.{nearest(key, known_keys())}"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not key or error["type"] == "value_error":
        return str(message)
    if error["type"] in ("model_type", "dict_type"):
        return f"{key} = {error['input']!r}: wanted a table of its keys, such as {_below(key)}"
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        hint = "." + nearest(error["input"], re.findall(r"'([^']+)'", error["ctx"]["expected"]))
    return f"{key} = {error['input']!r}: {message[0].lower()}{message[1:]}{hint.rstrip('.')}"


def _below(key: str) -> str:
    example = f"{key}.sotu" if key == "data.mix" else f"{key}.lr"
    return next((known for known in known_keys() if known.startswith(f"{key}.")), example)


def resolve(track: Track, preset: str, settings: Sequence[str] = (), **top: Any) -> RunConfig:
    """Return the config of a preset under a track, with `--set` settings and top-level values over it.

    Raises UserError for an unknown preset, a bad setting, or a contradiction of a fixed key.
    """
    known = preset_names(track)
    if preset not in known:
        raise UserError(
            f"no preset {preset!r} under track {track.name!r}; there are {', '.join(known)}, or an optimizer of "
            f"yours as path/to/file.py:Class.{nearest(preset, known)}"
        )
    path = track.folder / f"{preset}.toml"
    return resolve_values(track, preset, read_toml(path), settings, where=str(path), **top)


def mix_setting(text: str) -> str:
    """Return the `--set` setting of `--mix sotu:0.7,shakespeare:0.3`; UserError where it is not of that form."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, colon, share = part.strip().rpartition(":")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not (colon and name and 0 < value < math.inf):
            raise UserError(
                f"--mix {text}: {part.strip()!r} is no corpus with its share; wanted CORPUS:SHARE,CORPUS:SHARE, with "
                "commas between and shares above 0, for example --mix sotu:0.7,shakespeare:0.3"
            )
        if name in shares:
            raise UserError(f"--mix {text}: {name!r} is there twice; name it once, with both shares added up")
        shares[name] = value
    table = ", ".join(f"{json.dumps(name, ensure_ascii=False)} = {value!r}" for name, value in shares.items())
    return f"data.mix={{{table}}}"


def check_fixed(track: Track, config: RunConfig) -> None:
    """Raise UserError where a run contradicts what its track fixes; a mix that is fixed is fixed as a whole."""
    track.check(config.model_dump())
    wanted = track.fixed.get("data", {}).get("mix")
    if wanted is not None and config.data.mix != wanted:
        raise UserError(
            f"track {track.name!r} fixes data.mix = {wanted!r}, and this run has {config.data.mix!r}: leave data.mix "
            "out"
        )


def _without_others_options(optim: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preset's optimizers without the options of those that the settings replace by name."""
    changed = settings.get("optim", {})
    return {
        role: {}
        if isinstance(changed, Mapping)
        and isinstance(changed.get(role), Mapping)
        and changed[role].get("name", table.get("name")) != table.get("name")
        else table
        for role, table in optim.items()
    }


def resolve_values(
    track: Track, name: str, preset: Mapping[str, Any], settings: Sequence[str], *, where: str, **top: Any
) -> RunConfig:
    """Return the config of a preset's tables, called `name`, as `resolve` does; `where` is for messages."""
    changes = [parse_setting(text) for text in settings]
    for key, _ in changes:
        if key.split(".")[0] in ("track", "name"):
            raise UserError(f"--set {key}: use --track or --optim")
    settings_tables = nested(changes)
    base = {**preset, "optim": _without_others_options(preset.get("optim", {}), settings_tables)}
    if "data.mix" in dict(changes) and isinstance(base.get("data"), Mapping):
        # A whole mix takes the place of the preset's; data.mix.CORPUS changes one share of it.
        base["data"] = {key: value for key, value in base["data"].items() if key != "mix"}
    values = merged(track.fixed, base, settings_tables, {"track": track.name, "name": name, **top})
    where += f" with --set {' '.join(settings)}" if settings else ""
    config = make_config(values, where=where)
    check_fixed(track, config)
    return config
