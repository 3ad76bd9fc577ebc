"""Sums up a training run: its rows in one file, its learning curve as a picture, its returns in bins of steps."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.fs
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_RETURN_MEAN,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
)
from ray.tune.result import TIME_TOTAL_S

from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.extras import require

# Environment steps of a bin.
BIN = 25_000
RESULTS, CURVE = "results.json", "learning_curve.png"

Row = dict[str, Any]


def row(result: Mapping[str, Any]) -> Row:
    """What is kept of one iteration: steps, mean return and number of the episodes that ended in it, diagnostics."""
    env = result[ENV_RUNNER_RESULTS]
    learner = result.get(LEARNER_RESULTS, {}).get(DEFAULT_MODULE_ID, {})
    return {
        "env_steps": int(env[NUM_ENV_STEPS_SAMPLED_LIFETIME]),
        "seconds": round(result[TIME_TOTAL_S], 2),
        "episodes": int(env.get(NUM_EPISODES, 0)),
        "return": float(env.get(EPISODE_RETURN_MEAN, np.nan)),
        **{k: float(v) for k, v in learner.items() if isinstance(v, (int, float)) and not k.startswith(("num_", "_"))},
    }


def columns(rows: Sequence[Row]) -> dict[str, list[float]]:
    """The rows by column, to four significant digits (steps and seconds whole)."""
    names = sorted({name for r in rows for name in r})
    exact = ("env_steps", "episodes", "seconds")
    return {n: [r.get(n, np.nan) if n in exact else float(f"{r.get(n, np.nan):.4g}") for r in rows] for n in names}


def binned_returns(rows: Sequence[Row], width: int = BIN) -> dict[int, float]:
    """Mean return of the episodes that ended in each bin of ``width`` steps, by the bin's end."""
    bins: dict[int, list[tuple[float, int]]] = {}
    for r in rows:
        if r["episodes"] and np.isfinite(r["return"]):
            end = -(-r["env_steps"] // width) * width
            bins.setdefault(end, []).append((r["return"], r["episodes"]))
    return {end: _weighted_mean(values) for end, values in sorted(bins.items())}


def _weighted_mean(values_and_weights: list[tuple[float, int]]) -> float:
    """Mean of the values, each counted as often as its weight says."""
    values, weights = zip(*values_and_weights, strict=True)
    return float(np.average(values, weights=weights))


def report(runs: Sequence[Mapping[str, Any]], env: str, filesystem: pyarrow.fs.FileSystem, folder: str) -> None:
    """Writes :data:`RESULTS` and :data:`CURVE` to a folder, and says where they are and what the returns were.

    Args:
        runs: Of each run the ``seed``, the path of the newest ``checkpoint`` and the ``rows``.
        env: The name of what was trained.
        filesystem: The folder's.
        folder: A path on ``filesystem``.
    """
    kept = []
    for run in runs:
        bins = {str(end): round(value, 1) for end, value in binned_returns(run["rows"]).items()}
        kept.append({**run, "rows": columns(run["rows"]), "bins_of_25k": bins})
        print(f"seed {run['seed']}: mean return per 25k steps {bins}\ncheckpoint:     {run['checkpoint']}")
    results, curve = f"{folder}/{RESULTS}", f"{folder}/{CURVE}"
    _write(filesystem, results, json.dumps({"env": env, **provenance(), "runs": kept}).encode())
    print(f"results:        {results}")
    try:
        _write(filesystem, curve, picture(runs, env))
    except ImportError as error:
        curve = f"none, since {error}"
    print(f"learning curve: {curve}", flush=True)


def picture(runs: Sequence[Mapping[str, Any]], env: str) -> bytes:
    """Learning curves of all runs as a PNG: mean return per bin.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    # Not pyplot, which would choose a backend for the whole process.
    figure = require("matplotlib.figure", "matplotlib", "the learning curve").Figure(figsize=(7, 4))
    axes = figure.subplots()
    for run in runs:
        curve = binned_returns(run["rows"], -(-run["rows"][-1]["env_steps"] // 40))
        axes.plot(list(curve), list(curve.values()), label=f"seed {run['seed']}")
    axes.set(xlabel="environment steps", ylabel="mean episode return", title=f"BLPO, {env}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    return content.getvalue()


def _write(filesystem: pyarrow.fs.FileSystem, path: str, content: bytes) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)
