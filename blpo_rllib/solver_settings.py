"""The solver that a configuration asks for, by name or as an object; the former fields for its options."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

from blpo_rllib.core.ihvp import IHVP_SOLVERS, IHVPSolver, Nystrom

# Nystrom's arguments that are fields of the configuration, because sweeps vary them.
NYSTROM_FIELDS = {"nystrom_rank": "rank", "nystrom_damping": "damping"}


class SolverFields(Protocol):
    """The fields of a :class:`~blpo_rllib.blpo.BLPOConfig` that are read here; others are found by their names.

    Attributes:
        hypergradient: A solver or its name.
        set_by_user: Names of the fields that somebody has set.
    """

    hypergradient: str | IHVPSolver
    set_by_user: frozenset[str]


@dataclass(frozen=True)
class OldField:
    """A field of version 0.1.0 that is an argument of a solver now; accepted until the version after the next.

    Attributes:
        solver: The solver's name.
        argument: The argument's name.
        default: The argument's default value.
    """

    solver: str
    argument: str
    default: Any


OLD_FIELDS = {
    "nystrom_core_shift": OldField("nystrom", "core_shift", 1.0),
    "nystrom_redraw": OldField("nystrom", "redraw", False),
    "cg_iterations": OldField("cg", "iterations", 20),
    "cg_damping": OldField("cg", "damping", 0.0),
    "exact_damping": OldField("exact", "damping", 50.0),
    "scaled_identity_damping": OldField("scaled_identity", "damping", 50.0),
}


def warn_of_old_field(name: str, value: Any) -> None:
    """Warns that a field is deprecated, and says what to write instead, unless it is set to the default."""
    old = OLD_FIELDS.get(name)
    if old is None or value is None or value == old.default:
        return
    cls = IHVP_SOLVERS[old.solver].__name__
    warnings.warn(
        f"{name}={value!r} is deprecated: write hypergradient={cls}({old.argument}={value!r}) instead "
        f"(from blpo_rllib.core.ihvp import {cls})",
        DeprecationWarning,
        stacklevel=4,
    )


def solver_of(config: SolverFields) -> IHVPSolver | None:
    """The solver that ``config.hypergradient`` names or is; None for nested PPO.

    ``nystrom_rank`` and ``nystrom_damping`` hold for the name "nystrom", and, where somebody has set them, for a
    :class:`~blpo_rllib.core.ihvp.Nystrom` too, so that a sweep can vary them.

    Raises:
        ValueError: If the name is unknown or one of the solver's settings is out of range.
    """
    chosen = config.hypergradient
    if isinstance(chosen, IHVPSolver):
        return _with_fields(chosen, config)
    if chosen == "none":
        return None
    if chosen not in IHVP_SOLVERS:
        names = ", ".join(map(repr, (*IHVP_SOLVERS, "none")))
        raise ValueError(f"hypergradient={chosen!r} must be one of {names}, or an IHVPSolver")
    options = {
        old.argument: getattr(config, name)
        for name, old in OLD_FIELDS.items()
        if old.solver == chosen and getattr(config, name) is not None
    }
    if chosen == "nystrom":
        options |= {argument: getattr(config, name) for name, argument in NYSTROM_FIELDS.items()}
    return IHVP_SOLVERS[chosen](**options)


def _with_fields(solver: IHVPSolver, config: SolverFields) -> IHVPSolver:
    # A subclass may take its arguments otherwise.
    if type(solver) is not Nystrom or not NYSTROM_FIELDS.keys() & config.set_by_user:
        return solver
    options: dict[str, Any] = {"rank": solver.rank, "damping": solver.damping}
    options |= {argument: getattr(config, k) for k, argument in NYSTROM_FIELDS.items() if k in config.set_by_user}
    return Nystrom(**options, core_shift=solver.core_shift, redraw=solver.redraw)


def fields_without_effect(config: SolverFields) -> dict[str, list[str]]:
    """The fields that somebody has set and the chosen solver does not read, by the solver that they belong to."""
    fields = dict.fromkeys(NYSTROM_FIELDS, "nystrom")
    # Configurations of version 0.1.0 have all of the old fields.
    fields |= {k: old.solver for k, old in OLD_FIELDS.items() if getattr(config, k) not in (None, old.default)}
    read = set(NYSTROM_FIELDS) if type(config.hypergradient) is Nystrom else set()
    found: dict[str, list[str]] = {}
    for name, solver in fields.items():
        if name in config.set_by_user and name not in read and config.hypergradient != solver:
            found.setdefault(solver, []).append(name)
    return found
