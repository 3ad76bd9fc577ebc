"""What each part of BLPO's published settings does: training runs that differ in one part at a time.

    python -m studies.understanding.variants cartpole --seeds 5 --steps 150000 --workers 2
    python -m studies.understanding.variants hopper --seeds 3 --steps 450000 --workers 2

Nesting alone; the published correction; one of the same norm in another direction; v/ρ in place of the
inverse-Hessian-vector product; the cross term as a mean, with the bound and without; less damping; other solvers. One
core and one thread a run. Each finished run leaves a record; the same command goes on with those that have none.
studies/understanding/README.md says what follows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import trim_mean
from torch import Tensor

from blpo_rllib.blpo import BLPOConfig
from blpo_rllib.core import minibatch
from blpo_rllib.core.hypergradient import Hypergradient, hypergradient
from blpo_rllib.core.ihvp import ConjugateGradient
from blpo_rllib.experiments.metrics import ENV_STEPS, grouped, iteration, metric_name
from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.sweep.records import FINISHED, Row, TrialFiles, mean_return, summary, write_whole
from studies.comparison.contestants import example as published

mpl.use("Agg")
from matplotlib import pyplot as plt

OUTPUT = Path(__file__).parent / "results" / "variants"
EXAMPLES = ("cartpole", "acrobot", "hopper")
BASELINE = "nested"
NUM_BINS = 50

# What a correction c is replaced with, given g_θ; brought to the norm of c afterwards.
Direction = Callable[[Tensor, Tensor, torch.Generator], Tensor]
DIRECTIONS: dict[str, Direction] = {
    "against g": lambda c, g, generator: -g,
    "random": lambda c, g, generator: torch.randn(c.shape, generator=generator, dtype=c.dtype),
    "orthogonal": lambda c, g, generator: c - (c @ g) / (g @ g) * g,
    "reversed": lambda c, g, generator: -c,
}


@dataclass(frozen=True)
class Variant:
    """How a run differs from the tuned example.

    Attributes:
        training: Arguments of ``BLPOConfig.training()``.
        direction: Key of :data:`DIRECTIONS`; None: the correction's own.
        actor_rate: The actor's learning rate is the example's times this.
    """

    training: Mapping[str, Any] = field(default_factory=dict)
    direction: str | None = None
    actor_rate: float = 1.0

    def config(self, example: str) -> BLPOConfig:
        """The tuned example of a task, with published batches and the differences."""
        config = published(example, "envpool").training(**self.training)
        return config.training(actor_lr=self.actor_rate * config.actor_lr)


VARIANTS = {
    "no nesting": Variant({"hypergradient": "none", "num_critic_updates": 1}),
    BASELINE: Variant({"hypergradient": "none"}),
    **{f"nested, {r:g} × actor rate": Variant({"hypergradient": "none"}, actor_rate=r) for r in (2.0, 4.0)},
    "published": Variant(),
    **{f"published, {name}": Variant(direction=name) for name in DIRECTIONS},
    "v/ρ": Variant({"hypergradient": "scaled_identity"}),
    "sum, no bound": Variant({"hypergradient_bound": None}),
    "mean": Variant({"cross_reduction": "mean"}),
    "mean, no bound": Variant({"cross_reduction": "mean", "hypergradient_bound": None}),
    **{f"ρ = {rho:g}": Variant({"nystrom_damping": rho}) for rho in (10.0, 1.0, 0.1, 0.01)},
    "mean, ρ = 1": Variant({"cross_reduction": "mean", "nystrom_damping": 1.0}),
    "mean, ρ = 0.01": Variant({"cross_reduction": "mean", "nystrom_damping": 0.01}),
    "CG, undamped": Variant({"hypergradient": "cg"}),
    "CG, Gauss–Newton, ρ = 0.01": Variant(
        {"hypergradient": ConjugateGradient(damping=0.01), "curvature": "gauss_newton"}
    ),
}


def redirected(direction: Direction, seed: int) -> Callable[..., Hypergradient]:
    """The core's hypergradient with a correction of the same norm in another direction."""
    generator = torch.Generator().manual_seed(seed)

    def replaced(**problem: Any) -> Hypergradient:
        result = hypergradient(**problem)
        other = direction(result.mixed_product, result.grad_actor, generator)
        product = other * (result.mixed_norm / other.norm())
        step = result.grad_actor - result.scale * product.nan_to_num(0.0, 0.0, 0.0)
        return dataclasses.replace(result, mixed_product=product, direction=step)

    return replaced


@ray.remote(num_cpus=1, max_calls=1)
def run(config: BLPOConfig, direction: Direction | None, steps: int, folder: Path, name: str, about: dict) -> None:
    """Trains and leaves rows, and at the end a record."""
    torch.set_num_threads(1)
    files = TrialFiles(folder)
    if direction is not None:
        # The place between the hypergradient and the actor's step; the process ends with the run.
        minibatch.hypergradient = redirected(direction, config.seed)
    algo = config.build_algo()
    reached = 0.0
    while reached < steps:
        result = algo.train()
        row = grouped(result)
        reached = row[ENV_STEPS]
        files.append(name, {"iteration": iteration(result), **row})
    algo.stop()
    rows = files.rows(name)
    files.end(name, about | {"status": FINISHED, "curve": curve(rows, steps)} | summary(rows))


def curve(rows: list[Row], steps: int) -> list[float]:
    """Mean return of the episodes that ended in each of equal bins of steps; an empty one has its predecessor's."""
    edges = np.linspace(0, steps, NUM_BINS + 1)
    found = [
        mean_return([r for r in rows if low < r[ENV_STEPS] <= high])
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    known = [x for x in found if np.isfinite(x)]
    values, last = [], known[0]
    for value in found:
        last = value if np.isfinite(value) else last
        values.append(last)
    return values


def file_name(variant: str, seed: int) -> str:
    """The stem of a run's files."""
    plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in variant)
    return f"{plain}_seed{seed}"


def run_all(example: str, names: list[str], seeds: int, steps: int, folder: Path) -> None:
    """Runs what has no record yet, seed by seed, so that an interrupted study has all variants with few seeds."""
    ended = TrialFiles(folder).ended()
    tasks = {}
    for seed in range(seeds):
        for variant in names:
            name, how = file_name(variant, seed), VARIANTS[variant]
            if name in ended and ended[name]["steps_wanted"] == steps:
                continue
            config = how.config(example).debugging(seed=seed, log_level="ERROR")
            about = {"variant": variant, "seed": seed, "steps_wanted": steps}
            direction = None if how.direction is None else DIRECTIONS[how.direction]
            tasks[run.remote(config, direction, steps, folder, name, about)] = name
    total = len(tasks)
    while tasks:
        (task,), _ = ray.wait(list(tasks))
        name = tasks.pop(task)
        try:
            ray.get(task)
            print(f"{total - len(tasks)}/{total} {name}", flush=True)
        except ray.exceptions.RayError as error:
            print(f"{name} failed: {str(error).splitlines()[-1]}", flush=True)


def collected(folder: Path, steps: int) -> dict[str, list[dict[str, Any]]]:
    """The records by variant, seed by seed."""
    records = [r for r in TrialFiles(folder).ended().values() if r["steps_wanted"] == steps]
    return {
        name: sorted((r for r in records if r["variant"] == name), key=lambda r: r["seed"])
        for name in VARIANTS
        if any(r["variant"] == name for r in records)
    }


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is unknown."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def statistics(by_variant: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per variant: area under the curve (mean return over steps), final return, difference to nesting alone with the
    standard error of seeds taken as independent, and diagnostics."""
    baseline = [float(np.mean(r["curve"])) for r in by_variant.get(BASELINE, [])]
    found = {}
    for name, records in by_variant.items():
        areas = [float(np.mean(r["curve"])) for r in records]
        (mean, error), (final, final_error) = spread(areas), spread([r["final_return"] for r in records])
        row: dict[str, Any] = {
            "seeds": len(records),
            "areas": areas,
            "auc": mean,
            "auc_error": error,
            "auc_iqm": float(trim_mean(areas, 0.25)),
            "final": final,
            "final_error": final_error,
        }
        if baseline:
            base, base_error = spread(baseline)
            row |= {"difference": mean - base, "difference_error": float(np.hypot(error, base_error))}
        for key in ("mixed_grad_cosine", "bound_active_fraction", "mixed_norm", "actor_grad_norm", "approx_kl"):
            values = [r[metric_name(key)] for r in records if metric_name(key) in r]
            row[key] = float(np.mean(values)) if values else float("nan")
        found[name] = row | {"curve": np.mean([r["curve"] for r in records], axis=0).tolist()}
    return found


def table_of(title: str, found: dict[str, dict[str, Any]]) -> Table:
    """What is printed."""
    table = Table(title=title)
    for head in ("variant", "seeds", "AUC", "IQM", f"to {BASELINE!r}", "final return", "cos(c, g)", "bound acts"):
        table.add_column(head)
    for name, row in found.items():
        table.add_row(
            name,
            str(row["seeds"]),
            f"{row['auc']:.1f} ± {row['auc_error']:.1f}",
            f"{row['auc_iqm']:.1f}",
            f"{row.get('difference', np.nan):+.1f} ± {row.get('difference_error', np.nan):.1f}",
            f"{row['final']:.1f} ± {row['final_error']:.1f}",
            f"{row['mixed_grad_cosine']:.2f}",
            f"{row['bound_active_fraction']:.2f}",
        )
    return table


def draw(example: str, steps: int, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Areas of all seeds, mean and standard error, per variant; the curves of some beside them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 0.32 * len(found) + 1.6), layout="constrained")
    for y, row in enumerate(found.values()):
        left.plot(row["areas"], [y] * len(row["areas"]), ".", color="0.6")
        left.errorbar(row["auc"], y, xerr=row["auc_error"], fmt="o", color="tab:blue", capsize=3)
    left.set_yticks(range(len(found)), found)
    left.invert_yaxis()
    left.set(xlabel="mean return over the run", title=f"{example}, {steps:,} steps: seeds, mean, standard error")
    left.grid(alpha=0.3)
    ends = np.linspace(0, steps, NUM_BINS + 1)[1:]
    for name, row in found.items():
        if name in ("no nesting", BASELINE, "published", *(f"published, {d}" for d in DIRECTIONS), "v/ρ"):
            right.plot(ends, row["curve"], label=name)
    right.set(xlabel="environment steps", ylabel="mean episode return", title="means over seeds")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=EXAMPLES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, help="runs per variant, with seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=150_000)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--records", type=Path, help="folder of the runs' records (results/variants_EXAMPLE)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    folder = (args.records or Path("results") / f"variants_{args.example}").resolve()
    ray.init(num_cpus=args.workers, include_dashboard=False, log_to_driver=False)
    run_all(args.example, args.variants, args.seeds, args.steps, folder)
    found = statistics(collected(folder, args.steps))
    if not found:
        sys.exit("no run has finished")
    Console(width=150).print(table_of(f"{args.example}, {args.steps:,} steps", found))
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.example, args.steps, found, args.output / f"{args.example}.png")
    kept = {"example": args.example, "steps": args.steps, **provenance(), "variants": found}
    write_whole(args.output / f"{args.example}.json", json.dumps(kept, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
