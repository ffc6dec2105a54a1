"""From names and options to optimizers, and from a model's roles to parameter groups."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nanorun.errors import UserError, nearest
from nanorun.optim.averaging import WeightAverage
from nanorun.optim.options import Option, Variant, check_options
from nanorun.optim.ownership import Peers, Sharing, parameters_of

ROLE_NAMES = ("embedding", "table", "head", "matrix", "vector")

STANDS_IN = {"table": "embedding"}
"""The role under whose entry another goes that has none of its own; an optimizer of the first takes the second too."""

_NOT_ALGORITHMS = frozenset(
    {
        "build",
        "closures",
        "matrix_functions",
        "inverse_roots",
        "schedules",
        "averaging",
        "options",
        "ownership",
        "symmetric_products",
    }
)

ELSEWHERE = {
    "cyclic_lr": 'a schedule around nadamw: set train.schedule = "cyclic" and train.cycles',
    "lawa_queue": 'an average around any optimizer: set average.kind = "queue"',
    "lawa_ema": 'an average around any optimizer: set average.kind = "ema"',
}
"""Presets that bear an optimizer's name and are none: what they are, and how a config says it."""


class HasRoles(Protocol):
    """A model that names the role of each of its parameters (nanorun.model.GPT)."""

    def roles(self) -> dict[str, Any]: ...
    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...


class Algorithm(NamedTuple):
    """An optimizer as a config names it: its class, and how to check what it is given."""

    name: str
    cls: type[torch.optim.Optimizer]
    roles: tuple[str, ...]
    table: Mapping[str, Option] | None
    """The options that can be given; None where an outside class has its signature alone."""
    held: Mapping[str, Any]
    """Options that the name stands for."""
    module: ModuleType
    outside: bool
    """Whether the class comes from outside nanorun."""

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options checked, or raise UserError naming the one that is wrong."""
        if self.table is None:
            return _check_signature(self.name, self.cls, given)
        for option in given:
            if option in self.held:
                raise UserError(
                    f"{self.name} holds {option} = {self.held[option]!r}: leave {option} out, or take the "
                    f"algorithm that it is a variant of, {self.module.__name__.rpartition('.')[2]}"
                )
        return {**check_options(self.name, self.table, given), **self.held}


def algorithms() -> list[str]:
    """Return the names of the algorithms that ship with nanorun: one module each in this package."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name for module in found if module.name not in _NOT_ALGORITHMS)


def optimizer_names() -> list[str]:
    """Return every name that `create` takes: the algorithms and their variants."""
    return sorted([*algorithms(), *_variants()])


def _variants() -> dict[str, str]:
    """Return the module of each variant's name."""
    modules = {name: importlib.import_module(f"nanorun.optim.{name}") for name in algorithms()}
    return {variant: name for name, module in modules.items() for variant in getattr(module, "VARIANTS", {})}


def find_algorithm(name: str) -> Algorithm:
    """Return the algorithm of that name, or the class that "package.module:Class" or "path.py:Class" means.

    A name with a colon imports, and so executes, the code it points to. Such names come from the user's own
    config or command line only; nothing that nanorun downloads or reads from a record gets here by itself.
    """
    if not isinstance(name, str):
        raise UserError(f"optimizer name {name!r}: wanted a string, one of {', '.join(optimizer_names())}")
    if ":" in name:
        return _outside(name)
    if name in algorithms():
        module = importlib.import_module(f"nanorun.optim.{name}")
        return Algorithm(name, module.CLASS, _roles(module.ROLES), module.OPTIONS, {}, module, False)
    if name in ELSEWHERE:
        raise UserError(f"{name!r} is no optimizer but {ELSEWHERE[name]}")
    variants = _variants()
    if name in variants:
        module = importlib.import_module(f"nanorun.optim.{variants[name]}")
        variant: Variant = module.VARIANTS[name]
        table = variant.options(module.OPTIONS)
        return Algorithm(name, module.CLASS, _roles(module.ROLES), table, variant.held, module, False)
    known = sorted([*algorithms(), *variants])
    raise UserError(
        f"unknown optimizer {name!r}: wanted one of {', '.join(known)}, or an outside one as "
        f"'package.module:Class' or 'path/to/file.py:Class'.{nearest(name, known)}"
    )


def _roles(named: Iterable[str]) -> tuple[str, ...]:
    """Return the roles that a module names, and those that go with them."""
    named = tuple(named)
    return named + tuple(r for r, other in STANDS_IN.items() if other in named and r not in named)


def create(name: str, params: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
    """Return the optimizer called `name` over `params` (tensors or torch's parameter groups).

    Raises UserError that names an unknown algorithm (with the nearest), or an option that is unknown, missing
    or out of range.
    """
    algorithm = find_algorithm(name)
    entries = list(params)
    if algorithm.table is not None:
        for entry in entries:
            if isinstance(entry, dict):
                own = {key: value for key, value in entry.items() if key not in _GROUP_KEYS}
                algorithm.options({**options, **own})
    return _construct(algorithm, entries, algorithm.options(_first_given(algorithm, entries, options)))


def _first_given(algorithm: Algorithm, entries: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, with those that all groups bring along and nobody else does from the first of them."""
    groups = [entry for entry in entries if isinstance(entry, dict)]
    if algorithm.table is None or not groups or len(groups) < len(entries):
        return options
    brought = {key: groups[0][key] for key in algorithm.table if all(key in group for group in groups)}
    return {**brought, **options}


def build_optimizers(
    model: HasRoles,
    optim: Mapping[str, Mapping[str, Any]],
    average: WeightAverage | None = None,
    peers: Peers | None = None,
) -> OptimizerSet:
    """Return the optimizers of a model, every parameter in exactly one group.

    `optim` maps a role, or "default" for all roles without an entry of their own, to an algorithm's "name"
    and its options. A role that the model does not have may be mapped all the same. Options hold for exactly
    what they are written for: vectors get weight decay too, unless `[optim.vector]` says otherwise.

    Roles with the same built-in algorithm share one optimizer with a group each; an outside class gets one
    optimizer per role, since its options need not be per group.

    With `peers` the ranks share the work of those optimizers that can (ownership.py); the others do all of it on
    every rank.
    """
    known = [*ROLE_NAMES, "default"]
    for key in optim:
        if key not in known:
            raise UserError(f"optim.{key}: wanted a role, one of {', '.join(known)}.{nearest(key, known)}")
    for key, options in optim.items():
        # A role that this model lacks is checked all the same.
        _checked(key, options)
    parts: dict[str, list[tuple[Algorithm, dict[str, Any]]]] = {}
    for role, members in _members_by_role(model).items():
        algorithm, options = _resolve(role, members, optim)
        group = {
            **options,
            "params": [parameter for _, parameter, _ in members],
            "base_lr": None if algorithm.outside else options.get("lr"),
            "role": role,
            "n_stacked": [n_stacked for _, _, n_stacked in members],
        }
        key = f"{algorithm.name} {role}" if algorithm.outside else algorithm.name
        parts.setdefault(key, []).append((algorithm, group))
    optimizers = [_construct_groups(part) for part in parts.values()]
    _prove_assigned_once(model, optimizers)
    return OptimizerSet(optimizers, [part[0][0].name for part in parts.values()], average, peers)


_GROUP_KEYS = ("params", "base_lr", "role", "n_stacked")
"""What a group holds beside options."""

Members = list[tuple[str, Tensor, int]]


def _members_by_role(model: HasRoles) -> dict[str, Members]:
    """Return each role's parameters, in the model's order: name, tensor, how many matrices it stacks."""
    roles = model.roles()
    members: dict[str, Members] = {}
    for name, parameter in model.named_parameters():
        role, n_stacked = roles[name]
        members.setdefault(role, []).append((name, parameter, n_stacked))
    return members


def _resolve(
    role: str, members: Members, optim: Mapping[str, Mapping[str, Any]]
) -> tuple[Algorithm, dict[str, Any]]:
    """Return the algorithm and the checked options of one role."""
    key = entry_of(role, optim)
    if key not in optim:
        raise UserError(
            f"no optimizer for the role {role!r} ({len(members)} parameters, such as {members[0][0]}): "
            f"add [optim.{role}] or [optim.default] with a name"
        )
    algorithm, options = _checked(key, optim[key])
    _check_role(algorithm, role)
    return algorithm, options


def entry_of(role: str, optim: Mapping[str, Any]) -> str:
    """Return the key of the entry that a role goes under; "default" where there is none for it."""
    return next((key for key in (role, STANDS_IN.get(role)) if key in optim), None) or "default"


def _check_role(algorithm: Algorithm, role: str) -> None:
    if role not in algorithm.roles:
        raise UserError(
            f"{algorithm.name} cannot take the role {role!r}: it takes {', '.join(algorithm.roles)}; "
            f"give {role!r} to another optimizer, such as adamw, under [optim.{role}] or [optim.default]"
        )


def _checked(key: str, given: Mapping[str, Any]) -> tuple[Algorithm, dict[str, Any]]:
    """Return the algorithm and the checked options of one entry of `optim`."""
    options = dict(given)
    if "name" not in options:
        raise UserError(
            f'[optim.{key}] names no optimizer: add name = "…", one of {", ".join(optimizer_names())}'
        )
    algorithm = find_algorithm(options.pop("name"))
    if key != "default":
        _check_role(algorithm, key)
    try:
        return algorithm, algorithm.options(options)
    except UserError as error:
        raise UserError(f"[optim.{key}] {error}") from None


def _leave_the_compiler_out() -> None:
    """Let torch's optimizers be made without importing torch's compiler: a second of every start.

    They import it to tell it which methods it is not to trace, and nothing here traces an optimizer. A torch that
    keeps what it told elsewhere imports it as before.
    """
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        plain: Any = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        if "torch._dynamo" not in sys.modules:
            setattr(plain, "__dynamo_disable", plain)


def _construct(algorithm: Algorithm, params: list[Any], options: dict[str, Any]) -> torch.optim.Optimizer:
    _leave_the_compiler_out()
    try:
        return algorithm.cls(params, **options)
    except (TypeError, ValueError) as error:
        if not algorithm.outside or isinstance(error, UserError):
            raise
        raise UserError(f"{algorithm.name} refused its options {options}: {error}") from error


def _construct_groups(part: list[tuple[Algorithm, dict[str, Any]]]) -> torch.optim.Optimizer:
    algorithm, first = part[0]
    groups = [group for _, group in part]
    options = {key: first[key] for key in first if key not in _GROUP_KEYS}
    if algorithm.outside:
        # The constructor alone decides what becomes of an option; ours have theirs in each group.
        groups = [{key: group[key] for key in _GROUP_KEYS} for group in groups]
    optimizer = _construct(algorithm, groups, options)
    for group in optimizer.param_groups:
        if group["base_lr"] is None:
            # An outside class may have an lr of its own that the config did not set, or none at all.
            group["base_lr"] = group.get("lr", 0.0)
    return optimizer


def _prove_assigned_once(model: HasRoles, optimizers: list[torch.optim.Optimizer]) -> None:
    assigned = [
        id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    ]
    wanted = {id(parameter) for _, parameter in model.named_parameters()}
    assert len(assigned) == len(set(assigned)), "a parameter is in two groups"
    assert set(assigned) == wanted, "a parameter is in no group"


def _check_signature(name: str, cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options given to an outside class after comparing their names with its constructor."""
    takes = list(inspect.signature(cls).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        return dict(given)
    named = {p.name: p for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for option in given:
        if option not in named:
            raise UserError(
                f"{name} has no option {option!r}: it takes {', '.join(named)}.{nearest(option, list(named))}"
            )
    for option, parameter in named.items():
        if parameter.default is parameter.empty and option not in given:
            raise UserError(f"{name} needs the option {option!r}: give it a value")
    return dict(given)


def _outside(name: str) -> Algorithm:
    """Return the algorithm of an outside class, by the same table as ours where its module has one.

    A module laid out as those of this package (CLASS, OPTIONS and, if it likes, ROLES) has its options checked
    and listed by the table; any other class by the names in its constructor's signature.
    """
    cls, module = _load_external(name)
    if getattr(module, "CLASS", None) is not cls:
        return Algorithm(name, cls, ROLE_NAMES, None, {}, module, True)
    table, roles = getattr(module, "OPTIONS", None), tuple(getattr(module, "ROLES", ROLE_NAMES))
    if table is not None and not (
        isinstance(table, dict) and all(isinstance(option, Option) for option in table.values())
    ):
        raise UserError(
            f"{name}: its module's OPTIONS must be a dict of names to nanorun.optim.options.Option; leave it out "
            "to have the options checked by the constructor's signature"
        )
    unknown = [role for role in roles if role not in ROLE_NAMES]
    if unknown:
        raise UserError(f"{name}: its module's ROLES has {unknown[0]!r}: wanted {', '.join(ROLE_NAMES)}")
    return Algorithm(name, cls, _roles(roles), table, {}, module, True)


def _load_external(name: str) -> tuple[type[torch.optim.Optimizer], ModuleType]:
    where, _, class_name = name.rpartition(":")
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        classes = [
            key
            for key, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
        ]
        listed = f"it has {', '.join(classes)}" if classes else "it has none"
        raise UserError(
            f"{where} has no torch Optimizer called {class_name!r}: {listed}.{nearest(class_name, classes)}"
        )
    return found, module


def _import_module(where: str) -> ModuleType:
    if not all(part.isidentifier() for part in where.split(".")):
        raise UserError(
            f"{where!r} is no module's name: wanted 'package.module:Class' or 'path/to/file.py:Class'"
        )
    try:
        return importlib.import_module(where)
    except ImportError as error:
        raise UserError(
            f"cannot import {where!r} ({error}): install it, or give the path of a .py file"
        ) from error
    except Exception as error:
        raise UserError(
            f"{where!r} could not be imported ({type(error).__name__}: {error}): mend it; "
            f"python -c 'import {where}' shows where"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"no file {str(path)!r} to take an optimizer from: wanted path/to/file.py:Class")
    # The name holds a hash of path and content: two files of one name stay two modules, an edited one is new,
    # and one that is asked for again, as every seed does, is not run again.
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()
    module_name = f"nanorun_external_{path.stem}_{digest[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered first: dataclasses and pickling look their module up.
    sys.modules[module_name] = module
    # As when python runs the file: it may import what lies beside it.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise UserError(
            f"{path} could not be run ({type(error).__name__}: {error}): mend it; python {path} shows where"
        ) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


class GroupRow(NamedTuple):
    """One line of the table that `train` prints before it starts."""

    role: str
    tensors: int
    parameters: int
    optimizer: str
    lr: float
    options: dict[str, Any]


class OptimizerSet:
    """All optimizers of a model, stepped, scaled, saved and loaded as one."""

    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        names: list[str],
        average: WeightAverage | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.optimizers, self.names, self.average = optimizers, names, average
        self.sharing = Sharing(optimizers, peers) if peers is not None and peers.n_ranks > 1 else None
        self._with_modes = [one for one in optimizers if hasattr(one, "eval") and hasattr(one, "train")]
        self._training_weights: list[Tensor] | None = None
        for optimizer in self._with_modes:
            # The package schedulefree refuses to step before it is told to train.
            optimizer.train()

    def groups(self) -> list[dict[str, Any]]:
        """Return every parameter group, in order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def parameters(self) -> list[Tensor]:
        """Return every parameter, each once."""
        return [parameter for group in self.groups() for parameter in group["params"]]

    def outside_sources(self) -> dict[str, str]:
        """Return the text of each file that an outside optimizer's class was read from, by the file's name."""
        found = {}
        for name in dict.fromkeys(self.names):
            where = inspect.getsourcefile(find_algorithm(name).cls) if ":" in name else None
            if where is not None:
                found[Path(where).name] = Path(where).read_text(encoding="utf-8", errors="replace")
        return found

    def set_scale(self, scale: float) -> None:
        """Set every learning rate to its base times `scale`."""
        for group in self.groups():
            group["lr"] = group["base_lr"] * scale

    def compile(self, on: bool = True) -> None:
        """Have those optimizers that can run compiled code on CUDA, or, without `on`, all run eager code."""
        for optimizer in self.optimizers:
            if hasattr(optimizer, "compiled"):
                optimizer.compiled = on

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self, skip: Tensor | None = None, *, send: bool = True) -> None:
        """Update all parameters; where `skip` (0-dim, on their device) is not zero, change nothing at all.

        Parameters, moments and step counters keep their bits. On the CPU, and where an optimizer says
        `skips_on_host`, the host reads the flag. Else it does not wait to learn it: optimizers that read
        `found_inf`, torch's convention, do this themselves, and any other is put back from a copy, at the
        price of that copy; counters that such a one keeps as Python numbers do move on.

        Where ranks share the work, what a rank updated travels to the others while optimizers that all ranks
        step alike take theirs. It travels after a skipped step too, so that no rank ever waits for one that
        has other ideas. Without `send` it stays where it is, and the ranks' weights differ.
        """
        on_host = skip is not None and (
            skip.device.type == "cpu" or any(getattr(o, "skips_on_host", False) for o in self.optimizers)
        )
        if on_host:
            step = _do_not_step if bool(skip) else _step
        else:
            step = _step if skip is None else partial(_step_unless, skip=skip)
        parcels, shared = [], []
        if self.sharing is not None:
            shared = self.sharing.shared
            for optimizer in shared:
                self.sharing.drop_others_gradients(optimizer)
                step(optimizer)
                parcels += self.sharing.send(optimizer) if send else []
        for optimizer in self.optimizers:
            if optimizer not in shared:
                step(optimizer)
        for parcel in parcels:
            parcel.receive()

    def after_step(self, done: int) -> None:
        """Let the average, if there is one, take its snapshot of the weights after `done` finished steps."""
        if self.average is not None:
            self.average.after_step(done, self.parameters())

    @property
    def evaluates_other_weights(self) -> bool:
        """Whether a run is judged by other weights than those it trains: an average, schedule-free's x."""
        return self.average is not None or bool(self._with_modes)

    @torch.no_grad()
    def to_evaluation(self) -> None:
        """Put the weights that the run is judged by into the parameters, and keep those it trains."""
        if not self.evaluates_other_weights or self._training_weights is not None:
            return
        parameters = self.parameters()
        self._training_weights = [parameter.clone() for parameter in parameters]
        for optimizer in self._with_modes:
            optimizer.eval()
        if self.average is not None:
            self.average.copy_to(parameters)

    @torch.no_grad()
    def to_training(self) -> None:
        """Put back the weights that `to_evaluation` kept, bit for bit."""
        if self._training_weights is None:
            return
        for optimizer in self._with_modes:
            optimizer.train()
        # Copied, because an optimizer that computes its way back, as schedule-free does, rounds.
        torch._foreach_copy_(self.parameters(), self._training_weights)
        self._training_weights = None

    def state_dict(self) -> dict[str, Any]:
        """Return names and states; plain containers and tensors, as torch.load(weights_only=True) wants.

        Where ranks share the work, all must call it: rank 0 gets the whole, which depends on their number in no
        way, and the others their own part.
        """
        state = self.own_state_dict()
        if self.sharing is not None:
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                if optimizer in self.sharing.shared:
                    saved["state"] = self.sharing.whole_state(optimizer, saved["state"])
        return state

    def own_state_dict(self) -> dict[str, Any]:
        """Return what `state_dict` does, of the state that this rank holds."""
        return {
            "names": list(self.names),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, learning rates included; the set must have the same config.

        Each rank takes the whole and keeps the state of the parameters that it updates.
        """
        if list(state["names"]) != self.names:
            raise UserError(
                f"this state belongs to the optimizers {', '.join(state['names'])}, and the run has "
                f"{', '.join(self.names)}: resume with the config that wrote it"
            )
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if self.sharing is not None and optimizer in self.sharing.shared:
                saved = self.sharing.own_part(optimizer, saved)
            try:
                optimizer.load_state_dict(saved)
            except ValueError as error:
                raise UserError(f"the optimizer state does not fit this model ({error})") from error
        if self.average is not None:
            self.average.load_state_dict(state.get("average") or {}, self.parameters())

    def table(self) -> list[GroupRow]:
        """Return one row per group: what the run's start prints."""
        rows = []
        hidden = {"params", "base_lr", "role", "n_stacked", "lr"}
        for name, optimizer in zip(self.names, self.optimizers):
            for group in optimizer.param_groups:
                schema = inspect.signature(type(optimizer)).parameters
                shown = {key: group[key] for key in schema if key in group and key not in hidden}
                n_parameters = sum(parameter.numel() for parameter in group["params"])
                rows.append(
                    GroupRow(group["role"], len(group["params"]), n_parameters, name, group["base_lr"], shown)
                )
        return rows

    def state_bytes(self) -> int:
        """Return the bytes of all state tensors; before the first step there may be none.

        What other ranks alone hold is counted as of the last `state_dict`, which tells of it.
        """
        elsewhere = self.sharing.bytes_elsewhere() if self.sharing else 0
        averages = [] if self.average is None else self.average.tensors()
        states = [list(_state_tensors(optimizer).values()) for optimizer in self.optimizers]
        return elsewhere + sum(tensor.nbytes for tensors in [averages, *states] for tensor in tensors)


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def _do_not_step(optimizer: torch.optim.Optimizer) -> None:
    pass


def _step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Step; where `skip`, which the host does not read, change nothing."""
    if not _reads_found_inf(optimizer):
        _step_or_put_back(optimizer, skip != 0)
        return
    reads: Any = optimizer
    reads.found_inf = skip.to(torch.float32)
    try:
        optimizer.step()
    finally:
        del reads.found_inf


def _reads_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    # torch's fused optimizers say so by the name that GradScaler looks for.
    return getattr(optimizer, "supports_found_inf", False) or getattr(
        optimizer, "_step_supports_amp_scaling", False
    )


def _state_tensors(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Return the tensors of an optimizer's state by parameter and key."""
    return {
        (id(parameter), key): value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def _step_or_put_back(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Step; where `skip`, put parameters and state back, and state that is new in this step to zero."""
    parameters = parameters_of(optimizer)
    old_parameters = [parameter.clone() for parameter in parameters]
    old_state = {key: tensor.clone() for key, tensor in _state_tensors(optimizer).items()}
    optimizer.step()
    for parameter, old in zip(parameters, old_parameters, strict=True):
        parameter.copy_(torch.where(skip, old, parameter))
    for key, tensor in _state_tensors(optimizer).items():
        old = old_state.get(key, torch.zeros_like(tensor))
        tensor.copy_(torch.where(skip.to(tensor.device), old, tensor))
