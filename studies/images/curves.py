"""Draws the training of games with images from the runs that the comparison kept, whole or cut off.

    python -m studies.comparison.compare --tasks minatar_breakout minatar_space_invaders \
        --algorithms blpo_strong ppo_strong --seeds 1 --steps 500000 --output studies/images/results
    python -m studies.images.curves

A row of a run's file is an evaluation (10 episodes without noise) with the mean return of the episodes before it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib as mpl

from blpo_rllib.experiments.metrics import CPU_SECONDS, ENV_STEPS, EPISODE_RETURN, EVALUATION_RETURN
from studies.comparison.contestants import IMAGES, ON_IMAGES

mpl.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
COLORS = dict(zip(ON_IMAGES, ("navy", "tab:cyan", "tab:red"), strict=True))


def rows(path: Path) -> list[dict[str, float]]:
    """A run's rows."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def runs(task: str, algorithm: str) -> list[list[dict[str, float]]]:
    """The runs of a task by an algorithm, one per seed."""
    return [rows(path) for path in sorted((RESULTS / "trials").glob(f"{task}_{algorithm}_seed*.jsonl"))]


def table() -> str:
    """The last row of each run."""
    lines = ["| game | algorithm | steps | training return | evaluation | CPU s per 100k steps |", "|---" * 6 + "|"]
    for task in IMAGES:
        for algorithm in ON_IMAGES:
            for run in runs(task, algorithm):
                last = run[-1]
                cost = last[CPU_SECONDS] / last[ENV_STEPS] * 1e5
                numbers = f"{last[EPISODE_RETURN]:.1f} | {last[EVALUATION_RETURN]:.1f} | {cost:.0f}"
                lines.append(f"| {task} | `{algorithm}` | {last[ENV_STEPS]:,.0f} | {numbers} |")
    return "\n".join(lines)


def figure() -> Path:
    """Training returns against steps, a panel per game, evaluations as dots."""
    drawing, panels = plt.subplots(1, len(IMAGES), figsize=(10, 3.6), layout="constrained", squeeze=False)
    for panel, task in zip(panels.flat, IMAGES, strict=True):
        for algorithm in ON_IMAGES:
            for run in runs(task, algorithm):
                steps = [row[ENV_STEPS] for row in run]
                panel.plot(
                    steps, [row.get(EPISODE_RETURN, math.nan) for row in run], color=COLORS[algorithm], label=algorithm
                )
                panel.plot(steps, [row[EVALUATION_RETURN] for row in run], ".", color=COLORS[algorithm])
        panel.set(title=task, xlabel="environment steps", ylabel="return")
        panel.grid(alpha=0.3)
        panel.legend()
    path = RESULTS / "learning_curves.png"
    drawing.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    print(table())
    print(f"wrote {figure()}")
