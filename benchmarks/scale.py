"""Time and memory of an update against Nyström rank, critic width and batch; and of the rows of a large Hessian.

    python -m benchmarks.scale --output benchmarks/results/scale.json

Times are milliseconds per minibatch of whole update phases with the learners of :mod:`update_phase` (Hopper's
observations and actions), and their ratios to RLlib's PPO learner on the same batch in the same run. Memory is what the
peak of a process rises by during one update phase, each figure taken in a process of its own. The last table is the
inverse-Hessian-vector product alone, on a critic of ten million parameters, against the k·p numbers of its rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.update_phase import SHAPES, configure, measure, random_episodes, time_round, train_batch
from blpo_rllib import BLPOConfig
from blpo_rllib.core import native
from blpo_rllib.core.curvature import CriticLoss, Hessian
from blpo_rllib.core.ihvp import Nystrom
from blpo_rllib.core.mlp import MLP
from blpo_rllib.core.mlp_native import critic_pass
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.experiments.provenance import provenance

# Observations, three hidden layers and a value: 10.4 million parameters.
LARGE = (376, 2176, 2176, 2176, 1)
LARGE_RANKS = (1, 2, 5, 10, 20, 40)
LARGE_STEPS = 640


@dataclass(frozen=True)
class Point:
    """One update phase: rank k, two hidden layers of ``width``, ``steps`` per minibatch, 8 minibatches."""

    rank: int = 5
    width: int = 64
    steps: int = 640

    def shape(self):
        model = {"fcnet_hiddens": [self.width, self.width]}
        return replace(SHAPES["hopper"], num_envs=8, num_epochs=1, length=self.steps, model=model)


TABLES = {
    "rank": [Point(rank=rank) for rank in (1, 2, 5, 10, 20, 50, 100)],
    "width": [Point(width=width) for width in (64, 128, 256, 512, 1024)],
    "steps": [Point(steps=steps) for steps in (80, 160, 640, 2560, 10240)],
}


def peak_rise(run: Callable[[], None], device: str) -> int:
    """Bytes by which ``run`` lifts the process's resident memory, or the device's allocated memory, at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def update_memory(point: Point, device: str) -> dict[str, float]:
    """The peak of one update phase of BLPO, MB."""
    shape = point.shape()
    learner = configure(BLPOConfig(), shape, device, nystrom_rank=point.rank).build_learner()
    batch = train_batch(learner, random_episodes(shape, seed=0), shape)
    time_round(learner, batch, shape)
    return {"peak_mb": round(peak_rise(lambda: time_round(learner, batch, shape) and None, device) / 1e6, 1)}


def large_product(rank: int, device: str) -> dict[str, float]:
    """The Nyström product on a large critic: milliseconds, and memory over that of its rows and the batch."""
    torch.manual_seed(0)
    modules = [m for sizes in zip(LARGE, LARGE[1:], strict=False) for m in (nn.Linear(*sizes), nn.Tanh())]
    mlp = MLP.of([nn.Sequential(*modules[:-1]).to(device)])
    assert mlp is not None
    obs = torch.randn(LARGE_STEPS, LARGE[0], device=device)
    v = torch.randn(mlp.num_parameters, device=device)
    solver = Nystrom(rank)
    coordinates = mlp.coordinates(solver.draw(len(v), np.random.default_rng(0)))
    kernels = native.load() if device == "cpu" else None

    def solve() -> None:
        critic = critic_pass(mlp, obs, kernels)
        loss = CriticLoss(critic, torch.zeros_like(critic.values), torch.full_like(critic.values, 1 / LARGE_STEPS))
        hessian = Hessian(loss, Reduction())
        solver.solve(hessian, v, coordinates, solver.local_terms(hessian, coordinates))
        if device == "cuda":
            torch.cuda.synchronize()

    solve()
    rows_and_batch = 4 * rank * len(v) + 4 * LARGE_STEPS * sum(LARGE)
    peak = peak_rise(solve, device)
    start = time.perf_counter()
    solve()
    milliseconds = 1e3 * (time.perf_counter() - start)
    return {
        "parameters": len(v),
        "ms": round(milliseconds, 1),
        "ms_per_row": round(milliseconds / rank, 1),
        "peak_mb": round(peak / 1e6, 1),
        "rows_and_batch_mb": round(rows_and_batch / 1e6, 1),
        "peak_over_rows_and_batch": round(peak / rows_and_batch, 2),
    }


def in_own_process(kind: str, arguments: dict, device: str, threads: int) -> dict[str, float]:
    """Runs one of the memory measurements above in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--device", device, "--threads", str(threads)]
    result = subprocess.run(
        [*command, "--only", json.dumps([kind, arguments])], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def run_only(kind: str, arguments: dict, device: str) -> dict[str, float]:
    """What the child process of :func:`in_own_process` does."""
    if kind == "update":
        return update_memory(Point(**arguments), device)
    return large_product(arguments["rank"], device)


def update_row(point: Point, device: str, threads: int, rounds: int) -> dict:
    timed = measure(point.shape(), point.rank, device, rounds, warmup=1)
    own = {"ms": timed["ms_per_minibatch"]["blpo"], "ratio_to_rllib_ppo": timed["ratio_to_rllib_ppo"]["blpo"]}
    return asdict(point) | own | in_own_process("update", asdict(point), device, threads)


def show(title: str, rows: list[dict], console: Console) -> None:
    """Prints rows of equal keys as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch's intra-op threads")
    parser.add_argument("--rounds", type=int, default=5, help="timed update phases per learner and point")
    parser.add_argument("--tables", nargs="+", choices=[*TABLES, "large"], default=[*TABLES, "large"])
    parser.add_argument("--values", type=int, nargs="+", help="only these ranks, widths or steps")
    parser.add_argument("--output", type=Path, help="write the tables here too, as JSON")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(run_only(*json.loads(args.only), args.device)))
        return
    console, tables = Console(), {}
    for name in args.tables:
        if name == "large":
            ranks = [{"rank": rank} for rank in LARGE_RANKS]
            tables[name] = [rank | in_own_process("large", rank, args.device, args.threads) for rank in ranks]
            show("Nyström product on a critic of ten million parameters", tables[name], console)
            continue
        points = [x for x in TABLES[name] if args.values is None or getattr(x, name) in args.values]
        tables[name] = [update_row(point, args.device, args.threads, args.rounds) for point in points]
        show(f"update phase against {name}", tables[name], console)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**provenance(), "tables": tables}, indent=2) + "\n")
        console.print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
