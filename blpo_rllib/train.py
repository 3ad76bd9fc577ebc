"""Trains a tuned example for one or several seeds and shows the result: checkpoint, results file, learning curve.

python -m blpo_rllib.train cartpole --seeds 0 --stop-timesteps 100000
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_RETURN_MEAN,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.extras import require
from blpo_rllib.tasks import TASKS

BIN = 25_000


def train(example: str, seed: int, timesteps: int, folder: Path) -> dict:
    """Trains one seed, saves its checkpoint, and returns its rows: one per iteration, in environment steps."""
    config = TASKS[example].config().debugging(seed=seed, log_level="ERROR")
    algo = config.build_algo()
    rows: list[dict] = []
    start = time.monotonic()
    bar = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    console = Console()
    last_line = start
    with Progress(*bar, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{example} seed {seed}", total=timesteps, status="")
        while not rows or rows[-1]["env_steps"] < timesteps:
            rows.append(row(algo.train(), time.monotonic() - start))
            status = f"return {recent_return(rows):.1f}, {rows[-1]['env_steps'] / rows[-1]['seconds']:.0f} steps/s"
            progress.update(task, completed=rows[-1]["env_steps"], status=status)
            if not console.is_terminal and time.monotonic() - last_line > 10:
                last_line = time.monotonic()
                print(f"{example} seed {seed}: {rows[-1]['env_steps']}/{timesteps} steps, {status}", flush=True)
    checkpoint = folder / f"checkpoint_seed{seed}"
    algo.save_to_path(str(checkpoint.resolve()))
    algo.stop()
    return {"seed": seed, "checkpoint": str(checkpoint), "rows": rows}


def columns(rows: list[dict]) -> dict[str, list[float]]:
    """The rows by column, to four significant digits (steps and seconds whole)."""
    names = sorted({name for r in rows for name in r})
    exact = ("env_steps", "episodes", "seconds")
    return {n: [r.get(n, np.nan) if n in exact else float(f"{r.get(n, np.nan):.4g}") for r in rows] for n in names}


def row(result: dict, seconds: float) -> dict:
    """What is kept of one iteration: steps, mean return and number of the episodes that ended in it, diagnostics."""
    env, learner = result[ENV_RUNNER_RESULTS], result[LEARNER_RESULTS]["default_policy"]
    return {
        "env_steps": int(env[NUM_ENV_STEPS_SAMPLED_LIFETIME]),
        "seconds": round(seconds, 2),
        "episodes": int(env.get(NUM_EPISODES, 0)),
        "return": float(env.get(EPISODE_RETURN_MEAN, np.nan)),
        **{k: float(v) for k, v in learner.items() if isinstance(v, (int, float)) and not k.startswith(("num_", "_"))},
    }


def weighted_mean(values_and_weights: list[tuple[float, int]]) -> float:
    """Mean of the values, each counted as often as its weight says."""
    values, weights = zip(*values_and_weights, strict=True)
    return float(np.average(values, weights=weights))


def recent_return(rows: list[dict], episodes: int = 20) -> float:
    """Mean return of about the last ``episodes`` episodes."""
    chosen, count = [], 0
    for r in reversed(rows):
        if r["episodes"] and np.isfinite(r["return"]):
            chosen.append((r["return"], r["episodes"]))
            count += r["episodes"]
        if count >= episodes:
            break
    return weighted_mean(chosen) if chosen else float("nan")


def binned_returns(rows: list[dict], width: int = BIN) -> dict[int, float]:
    """Mean return of the episodes that ended in each bin of ``width`` steps, by the bin's end."""
    bins: dict[int, list[tuple[float, int]]] = {}
    for r in rows:
        if r["episodes"] and np.isfinite(r["return"]):
            end = -(-r["env_steps"] // width) * width
            bins.setdefault(end, []).append((r["return"], r["episodes"]))
    return {end: weighted_mean(values) for end, values in sorted(bins.items())}


def plot(runs: list[dict], example: str, path: Path) -> None:
    """Learning curves of all seeds: mean return per bin."""
    require("matplotlib", "matplotlib", "the learning curve").use("Agg")
    plt = require("matplotlib.pyplot", "matplotlib", "the learning curve")
    figure, axes = plt.subplots(figsize=(7, 4))
    for run in runs:
        steps = run["rows"][-1]["env_steps"]
        curve = binned_returns(run["rows"], -(-steps // 40))
        axes.plot(list(curve), list(curve.values()), label=f"seed {run['seed']}")
    axes.set(xlabel="environment steps", ylabel="mean episode return", title=f"BLPO, {example}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stop-timesteps", type=int, default=100_000)
    parser.add_argument("--output", type=Path, help="folder for results (default: results/EXAMPLE)")
    args = parser.parse_args()
    folder = args.output or Path("results") / args.example
    folder.mkdir(parents=True, exist_ok=True)
    runs = [train(args.example, seed, args.stop_timesteps, folder) for seed in args.seeds]
    for run in runs:
        run["bins_of_25k"] = {str(end): round(value, 1) for end, value in binned_returns(run["rows"]).items()}
    results, curve = folder / "results.json", folder / "learning_curve.png"
    plot(runs, args.example, curve)
    header = {"example": args.example, **provenance()}
    kept = [{**run, "rows": columns(run["rows"])} for run in runs]
    results.write_text(json.dumps(header | {"runs": kept}))
    for run in runs:
        print(f"seed {run['seed']}: mean return per 25k steps {run['bins_of_25k']}")
        print(f"checkpoint:     {run['checkpoint']}")
    print(f"results:        {results}\nlearning curve: {curve}")


if __name__ == "__main__":
    main()
