"""Whether BLPO still learns what it learned: runs of the comparison anew, beside those kept of it.

    python -m benchmarks.learning --task cartpole --steps 500000 --seeds 3 --output learning_cartpole.json

Settings, evaluations and seeds are those of ``studies/comparison``; each run is on one thread, one after the other. Of
the kept runs as many evaluations are shown, which are at the same places.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import ray

from blpo_rllib.experiments.metrics import grouped
from blpo_rllib.experiments.provenance import provenance
from studies.comparison.compare import Run, evaluation
from studies.comparison.contestants import TASKS

KEPT = Path(__file__).parents[1] / "studies" / "comparison" / "results" / "runs.parquet"


def run(task: str, seed: int, steps: int) -> list[dict[str, float]]:
    """Evaluations of a run on the way to ``steps``, at the places where a whole run has them."""
    trainable = Run({"task": task, "algorithm": "blpo", "seed": seed, "steps": TASKS[task], "simulator": "envpool"})
    rows: list[dict[str, float]] = []
    while not rows or rows[-1]["env_steps"] < steps:
        rows.append(evaluation(grouped(trainable.train())))
    trainable.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--steps", type=int, required=True, help="environment steps of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    kept = pd.read_parquet(KEPT)
    kept = kept[(kept.task == args.task) & (kept.algorithm == "blpo")]
    results = {}
    for seed in range(args.seeds):
        now = run(args.task, seed, args.steps)
        before = kept[kept.seed == seed].sort_values("env_steps").head(len(now))
        results[seed] = {
            "now": now,
            "kept": before[["env_steps", "evaluation_return", "training_return"]].to_dict("records"),
        }
        report = {**provenance(), "task": args.task, "steps": args.steps, "results": results}
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(table(results))


def table(results: dict[int, Any]) -> str:
    """The last evaluation and the mean over all of them, now and as kept."""
    lines = ["| seed | last now | last kept | mean now | mean kept |", "|---|---|---|---|---|"]
    for seed, result in results.items():
        now, kept = ([row["evaluation_return"] for row in result[name]] for name in ("now", "kept"))
        cells = (now[-1], kept[-1], sum(now) / len(now), sum(kept) / len(kept))
        lines.append(f"| {seed} | " + " | ".join(f"{x:.0f}" for x in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
