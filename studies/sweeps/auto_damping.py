"""Does a damping that follows the curvature train as well as the best fixed one?

    python -m studies.sweeps.auto_damping --report studies/sweeps/results/auto_damping.json

Trains the rules of :mod:`damping_rules` and Nyström with fixed dampings, all of the same rank, on CartPole, Acrobot and
Hopper (EnvPool): two runs at a time, each on one core and one thread. It may be interrupted at any moment; the same
command goes on. A rule passes where the interval of its difference to the best fixed damping reaches up to 0: on every
task, for the final return as for the mean over the whole run. The best fixed damping is the best of these same runs,
which favours it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import scipy.stats
from rich.console import Console
from rich.table import Table

from blpo_rllib import BLPOConfig
from blpo_rllib.core.ihvp import IHVPSolver
from blpo_rllib.experiments.metrics import metric_name
from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.sweep import SweepPlan, run_sweep
from blpo_rllib.sweep.plan import DAMPING, RANK
from studies.comparison.contestants import example as published
from studies.sweeps.damping_rules import LevenbergMarquardtNystrom, SpectralNystrom

# Environment steps per run.
TASKS = {"cartpole": 75_000, "acrobot": 75_000, "hopper": 400_000}
NYSTROM_RANK = 5
FIXED = (0.1, 1.0, 10.0, 50.0)
RULES: dict[str, IHVPSolver] = {
    "spectral": SpectralNystrom(NYSTROM_RANK),
    "levenberg_marquardt": LevenbergMarquardtNystrom(NYSTROM_RANK),
}
MEASURES = ("final_return", "mean_return")
CONFIDENCE = 0.95
CORES = 2

Records = list[dict[str, Any]]


def configure(task: str, hypergradient: str | IHVPSolver) -> BLPOConfig:
    """The tuned example with published batches; Hopper in EnvPool on one thread."""
    return published(task, "envpool").training(hypergradient=hypergradient).debugging(log_level="ERROR")


def train(task: str, seeds: int, timesteps: int, output: Path) -> dict[str, Records]:
    """The records of all runs by arm: the fixed dampings in one sweep, each rule in one of its own."""
    solvers: dict[str, str | IHVPSolver] = {"fixed": "nystrom", **RULES}
    arms: dict[str, Records] = {}
    for name, solver in solvers.items():
        # A rule chooses the damping itself: the sweep's only value means nothing to it.
        values = {RANK: (NYSTROM_RANK,), DAMPING: FIXED if name == "fixed" else FIXED[-1:]}
        plan = SweepPlan(task, values, seeds=seeds, stop_timesteps=timesteps)
        files = run_sweep(configure(task, solver), plan, output / task / name, resume=True)
        for record in sorted(files.ended().values(), key=lambda r: (r[DAMPING], r["seed"])):
            arms.setdefault(f"damping {record[DAMPING]:g}" if name == "fixed" else name, []).append(record)
    return arms


@dataclass(frozen=True)
class Estimate:
    """A mean, or difference of means, and half the width of its interval."""

    value: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.half_width:.1f}"

    @classmethod
    def of_difference(cls, a: Sequence[float], b: Sequence[float] = ()) -> Estimate:
        """The mean of ``a`` less that of ``b`` (0 if there is none), by Welch's t-interval."""
        samples = [np.asarray(x, float) for x in (a, b) if len(x)]
        variances = [x.var(ddof=1) / len(x) for x in samples]
        squares = sum(v**2 / (len(x) - 1) for v, x in zip(variances, samples, strict=True))
        error = float(np.sqrt(sum(variances)))
        quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, error**4 / squares) if squares else 0.0
        return cls(float(np.mean(a) - (np.mean(b) if len(b) else 0.0)), float(quantile) * error)


def judge(arms: dict[str, Records]) -> dict[str, Any]:
    """Estimates of each arm, and of each rule's difference to the best fixed damping."""
    found: dict[str, Any] = {"arms": {}, "against_the_best_fixed": {}}
    values = {m: {arm: [r[m] for r in records] for arm, records in arms.items()} for m in MEASURES}
    for arm, records in arms.items():
        dampings = [r[metric_name("damping")] for r in records]
        found["arms"][arm] = {m: Estimate.of_difference(values[m][arm]) for m in MEASURES}
        found["arms"][arm] |= {"damping": float(np.median(dampings)), "runs": len(records)}
    for rule in RULES:
        for measure, by_arm in values.items():
            best = max((arm for arm in by_arm if arm not in RULES), key=lambda arm: np.mean(by_arm[arm]))
            difference = Estimate.of_difference(by_arm[rule], by_arm[best])
            passes = difference.value + difference.half_width >= 0
            found["against_the_best_fixed"].setdefault(rule, {})[measure] = {
                "best": best, "difference": difference, "passes": passes,
            }  # fmt: skip
    return found


def show(task: str, timesteps: int, found: dict[str, Any], console: Console) -> None:
    """The estimates of one task as a table, and what follows for each rule."""
    table = Table(title=f"{task}, {timesteps:,} steps, rank {NYSTROM_RANK}: {CONFIDENCE:.0%} intervals over seeds")
    for head in ("arm", "final return", "mean return", "damping at the end", "runs"):
        table.add_column(head, justify="left" if head == "arm" else "right")
    for arm, e in found["arms"].items():
        table.add_row(arm, *(str(e[m]) for m in MEASURES), f"{e['damping']:.3g}", str(e["runs"]))
    console.print(table)
    for rule, by_measure in found["against_the_best_fixed"].items():
        for measure, e in by_measure.items():
            verdict = "passes" if e["passes"] else "fails"
            console.print(f"{rule} less {e['best']}, {measure}: {e['difference']}: {verdict}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5, help="runs per arm and task, at least 2")
    parser.add_argument("--stop-timesteps", type=int, help=f"environment steps per run ({TASKS})")
    parser.add_argument("--output", type=Path, default=Path("results/auto_damping"), help="folder of the runs")
    parser.add_argument("--report", type=Path, help="write what was found here, as JSON")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: there is no interval from one run")
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False)
    console, tasks = Console(width=None if sys.stdout.isatty() else 120), {}
    for task in args.tasks:
        timesteps = args.stop_timesteps or TASKS[task]
        arms = train(task, args.seeds, timesteps, args.output)
        found = judge(arms)
        show(task, timesteps, found, console)
        returns = {arm: {m: [round(r[m], 1) for r in records] for m in MEASURES} for arm, records in arms.items()}
        tasks[task] = {"timesteps": timesteps, **found, "returns": returns}
    for rule in RULES:
        checks = [e["passes"] for found in tasks.values() for e in found["against_the_best_fixed"][rule].values()]
        console.print(f"{rule}: {sum(checks)} of {len(checks)} comparisons passed", highlight=False)
    if args.report:
        text = json.dumps({**provenance(), "seeds": args.seeds, "tasks": tasks}, default=vars, indent=1)
        args.report.write_text(text + "\n")


if __name__ == "__main__":
    main()
