"""Which rank and damping work, and why: trains all of them, ranks them, draws the figures.

python tuned_examples/sweep_rank_damping.py --example cartpole --output results/sweep_cartpole
python tuned_examples/sweep_rank_damping.py --smoke

A sweep may be interrupted at any moment; the same command with --resume goes on with it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ray

from blpo_rllib.experiments.tracking import trackers
from blpo_rllib.sweep import SweepPlan, TrialFiles, report, run_sweep
from blpo_rllib.sweep.fidelity import measure_fidelity
from blpo_rllib.sweep.plan import OBJECTIVES, SEARCHES
from blpo_rllib.tasks import TASKS

EXAMPLES = ("cartpole", "acrobot", "hopper")
# Field of BLPOConfig by option; the values of a grid, or the ends of what is drawn from.
OPTIONS = {
    "ranks": ("nystrom_rank", int, [1, 2, 5, 10, 20]),
    "dampings": ("nystrom_damping", float, [0.01, 0.1, 1.0, 10.0, 50.0]),
    "critic_updates": ("num_critic_updates", int, None),
    "bounds": ("hypergradient_bound", float, None),
    "actor_lrs": ("actor_lr", float, None),
    "critic_lrs": ("critic_lr", float, None),
}
# Two minutes on two cores.
SMOKE = {"ranks": [1, 8], "dampings": [0.1, 50.0], "seeds": 2, "stop_timesteps": 8_192}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--example", choices=EXAMPLES, default="cartpole")
    p.add_argument("--search", choices=SEARCHES, default="grid")
    for option, (field, kind, values) in OPTIONS.items():
        text = f"{field}: values of the grid; other searches draw between the least and the largest"
        default = "the example's" if values is None else " ".join(map(str, values))
        p.add_argument(
            f"--{option.replace('_', '-')}", type=kind, nargs="+", default=values, help=f"{text} ({default})"
        )
    p.add_argument("--seeds", type=int, default=3, help="trials per point")
    p.add_argument("--num-points", type=int, default=20, help="points, for every search but grid; members, for pbt")
    p.add_argument("--objective", choices=OBJECTIVES, default="return", help="for optuna")
    p.add_argument("--stop-timesteps", type=int, default=100_000, help="environment steps per trial")
    p.add_argument("--output", type=Path, help="folder (results/sweep_EXAMPLE)")
    p.add_argument("--resume", action="store_true", help="go on with the sweep at --output")
    p.add_argument("--smoke", action="store_true", help="a sweep of two minutes on two cores")
    p.add_argument("--num-cpus", type=int, help="cores to use: one per trial (all)")
    p.add_argument("--gpus-per-trial", type=float, default=0.0, help="0.25: four trials share a GPU")
    p.add_argument("--max-concurrent", type=int, help="trials at the same time (as many as fit)")
    p.add_argument("--exact-seeds", type=int, default=1, help="seeds to compare with the exact hypergradient; 0: none")
    p.add_argument("--wandb-project", help="also log to Weights & Biases; offline without a key")
    p.add_argument("--wandb-checkpoints", action="store_true", help="upload checkpoints as artifacts")
    return p


def plan_of(args: argparse.Namespace) -> SweepPlan:
    """The sweep that the options describe."""
    values = {field: getattr(args, option) for option, (field, _, _) in OPTIONS.items() if getattr(args, option)}
    return SweepPlan(
        task=args.example,
        values=values,
        search=args.search,
        seeds=args.seeds,
        num_points=args.num_points,
        stop_timesteps=args.stop_timesteps,
        objective=args.objective,
    )


def main() -> None:
    p = parser()
    if "--smoke" in sys.argv:
        p.set_defaults(**SMOKE)
    args = p.parse_args()
    output = (args.output or Path("results") / f"sweep_{args.example}{'_smoke' if args.smoke else ''}").resolve()
    try:
        plan = plan_of(args)
        config = TASKS[args.example].config().debugging(log_level="ERROR")
        callbacks = trackers(plan.task, plan.name, output, args.wandb_project, args.wandb_checkpoints)
        ray.init(num_cpus=args.num_cpus, log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
        files = run_sweep(
            config,
            plan,
            output,
            resume=args.resume,
            gpus_per_trial=args.gpus_per_trial,
            max_concurrent=args.max_concurrent,
            callbacks=callbacks,
        )
    except (ValueError, ImportError) as error:
        p.error(str(error))
    finish(plan, files, output, args.exact_seeds)


def finish(plan: SweepPlan, files: TrialFiles, output: Path, exact_seeds: int) -> None:
    """The exact hypergradients, and the report; of an interrupted sweep, what there is so far."""
    ended = len(files.ended())
    complete = ended >= plan.num_trials
    report(plan, files, output, measure_fidelity(output, plan, files, exact_seeds) if complete and exact_seeds else {})
    if not complete:
        sys.exit(f"{ended} of {plan.num_trials} trials have ended: the same command with --resume goes on")


if __name__ == "__main__":
    main()
