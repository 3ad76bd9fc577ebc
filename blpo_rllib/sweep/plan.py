"""The plan of a sweep: its axes, the points on them, and the names of its trials."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Point = dict[str, Any]

RANK, DAMPING = "nystrom_rank", "nystrom_damping"
SEARCHES = ("grid", "random", "optuna", "asha", "pbt")
OBJECTIVES = ("return", "return-and-time")


@dataclass(frozen=True)
class Axis:
    """How a field of BLPOConfig is swept.

    Attributes:
        label: Its name in trials, tables and figures.
        integer: Whether its values are whole numbers.
        log: Whether it is drawn log-uniformly.
    """

    label: str
    integer: bool = False
    log: bool = True


AXES = {
    RANK: Axis("rank", integer=True, log=False),
    DAMPING: Axis("damping"),
    "num_critic_updates": Axis("nested", integer=True, log=False),
    "hypergradient_bound": Axis("bound"),
    "actor_lr": Axis("actor_lr"),
    "critic_lr": Axis("critic_lr"),
}
# What population based training changes while a trial runs. The others are part of optimizers and solver state, which
# members copy from each other.
PBT_FIELDS = (DAMPING, "hypergradient_bound")


class Plan(Protocol):
    """What running trials and recording them asks of a plan."""

    @property
    def values(self) -> Mapping[str, Sequence[Any]]:
        """For each field of a trial's config that tells trials apart, its values."""

    @property
    def num_trials(self) -> int:
        """How many trials there are in all."""

    @property
    def stops_early(self) -> bool:
        """Whether a trial may end before its steps are made."""

    def steps_of(self, point: Mapping[str, Any]) -> int:
        """Environment steps of a trial."""

    def trial_name(self, point: Mapping[str, Any], seed: int) -> str:
        """The trial's folder, and its name everywhere."""


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, as it is kept beside its results.

    Attributes:
        task: What is trained, for titles and for grouping runs.
        values: For each swept field of BLPOConfig the values of the grid; other searches draw between the least and
            the largest. Rank and damping are always among them.
        search: "grid"; "random"; "optuna" (TPE); "asha" (random points, the worse ones stopped early); "pbt" (a
            population that copies its best members and changes their damping and bound).
        seeds: Trials per point, with seeds 0, 1, ...; members of a population have one each.
        num_points: Number of points; no meaning for "grid", which tries all combinations.
        stop_timesteps: Environment steps per trial.
        objective: What "optuna" seeks: "return", or "return-and-time" for both a high return and a short time.
        draw_seed: Seeds the drawing of points.

    Raises:
        ValueError: If a setting is out of range.
    """

    task: str
    values: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {RANK: (1, 2, 5, 10, 20), DAMPING: (0.01, 0.1, 1.0, 10.0, 50.0)}
    )
    search: str = "grid"
    seeds: int = 3
    num_points: int = 20
    stop_timesteps: int = 100_000
    objective: str = "return"
    draw_seed: int = 0

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise ValueError(f"search={self.search!r} must be one of {', '.join(map(repr, SEARCHES))}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} must be one of {', '.join(map(repr, OBJECTIVES))}")
        if self.objective != "return" and self.search != "optuna":
            raise ValueError(f"objective={self.objective!r} is for search='optuna', not {self.search!r}")
        for name in ("seeds", "num_points", "stop_timesteps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        for name in (RANK, DAMPING):
            if name not in self.values:
                raise ValueError(
                    f"values={dict(self.values)} must have {name!r}: a sweep is over rank and damping at least"
                )
        for name, values in self.values.items():
            self._check_values(name, values)
        # One order and one type, so that the same plan is the same text.
        ordered = {name: tuple(sorted(set(self.values[name]))) for name in AXES if name in self.values}
        object.__setattr__(self, "values", ordered)

    def _check_values(self, name: str, values: Sequence[float]) -> None:
        if name not in AXES:
            raise ValueError(f"{name!r} cannot be swept; these can: {', '.join(AXES)}")
        if not values or not all(0 < value < float("inf") for value in values):
            raise ValueError(f"{name}={list(values)} must be numbers > 0, one at least")
        if AXES[name].integer and not all(float(value).is_integer() for value in values):
            raise ValueError(f"{name}={list(values)} must be whole numbers")

    @property
    def seeds_per_point(self) -> int:
        """How many trials a point gets."""
        return 1 if self.search == "pbt" else self.seeds

    @property
    def stops_early(self) -> bool:
        """Whether a trial may end before its steps are made."""
        return self.search == "asha"

    @property
    def num_trials(self) -> int:
        """How many trials the sweep has in all."""
        points = int(np.prod([len(v) for v in self.values.values()])) if self.search == "grid" else self.num_points
        return points * self.seeds_per_point

    @property
    def name(self) -> str:
        """A name that only this plan has, for grouping its runs."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:6]
        return f"{self.task}-{self.search}-{digest}"

    def points(self) -> list[Point]:
        """The points known before any trial ran: all of them, or none for "optuna"."""
        if self.search == "grid":
            return [rounded(dict(zip(self.values, c, strict=True))) for c in itertools.product(*self.values.values())]
        if self.search == "optuna":
            return []
        generator = np.random.default_rng(self.draw_seed)
        return [self._draw(generator) for _ in range(self.num_points)]

    def steps_of(self, point: Mapping[str, Any]) -> int:
        """Environment steps of a trial: the same for all."""
        return self.stop_timesteps

    def _draw(self, generator: np.random.Generator) -> Point:
        return rounded({name: _draw(AXES[name], min(v), max(v), generator) for name, v in self.values.items()})

    def trial_name(self, point: Mapping[str, Any], seed: int) -> str:
        """``rank5_damping0.5_seed1``: the trial's folder, and its name everywhere. Members of a population, whose point
        changes, are ``member1``.
        """
        if self.search == "pbt":
            return f"member{seed}"
        return "_".join([*(f"{AXES[name].label}{point[name]:g}" for name in self.values), f"seed{seed}"])

    def to_json(self) -> str:
        """The plan as text."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SweepPlan:
        """The plan that :meth:`to_json` wrote."""
        return cls(**json.loads(text))


def _draw(axis: Axis, low: float, high: float, generator: np.random.Generator) -> float:
    if axis.integer:
        return int(generator.integers(int(low), int(high) + 1))
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))


def rounded(point: Mapping[str, float]) -> Point:
    """The point to four significant digits: what trials are named after is exactly what they use."""
    return {n: int(v) if AXES[n].integer else float(f"{v:.4g}") for n, v in point.items()}
