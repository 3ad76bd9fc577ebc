"""What W&B costs training when its server is dead, never answers, or refuses the key.

    python -m benchmarks.tracker_cost

Trains the CartPole example with Tune, each time in a process of its own: without W&B, and with W&B against a port on
loopback where nobody listens, against a server that takes requests and never answers, and against one that answers 401.
Runs on a shared machine differ by more than W&B costs, so each is compared with itself. Its first iterations, during
which W&B starts, and those of every other block after them are logged; those of the remaining blocks are not.

inside  share of training's time that Tune's loop spent in W&B's callback, which is what training waits for
rows    time of the logged blocks over that of the blocks that are not logged, less the same in runs without W&B; the
        mean over pairs of blocks of all rounds with its standard error
start   seconds that the first iterations took beyond the pace of the blocks that are not logged, less the same in runs
        without W&B; the mean over rounds with its standard error
whole   rows + start / seconds of the example: the part by which W&B lengthens it
runs    as a check, the part by which these runs took longer than that of the same round without W&B, with half of the
        rows after the first logged; their own differences are in the standard error
"""

from __future__ import annotations

import argparse
import http.server
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blpo_rllib.experiments.provenance import provenance

ROOT = Path(__file__).parents[1]
ENDPOINTS = ("none", "dead", "silent", "refusing")
# Where nobody listens.
DISCARD_PORT = 9
# Iterations until W&B has surely started, and of each block after them.
FIRST, BLOCK = 200, 16


class Silent(http.server.BaseHTTPRequestHandler):
    """Takes a connection and says nothing."""

    def handle(self) -> None:
        time.sleep(600)


class Refusing(http.server.BaseHTTPRequestHandler):
    """Knows no key."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "user is not logged in"}]}')

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        pass


def serve(handler: type[http.server.BaseHTTPRequestHandler]) -> int:
    """Starts a server on loopback; returns its port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def train(folder: Path, project: str | None, timesteps: int) -> dict[str, Any]:
    """Trains in this process; the moment of each result, and the seconds inside W&B's callback."""
    import ray
    from ray import tune

    from blpo_rllib.experiments import tracking
    from blpo_rllib.tasks import TASKS

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    moments: list[float] = []
    inside: list[float] = []

    class Clock(tune.Callback):
        def on_trial_result(self, *args: Any, **info: Any) -> None:
            moments.append(time.perf_counter())

    callbacks = tracking.trackers("cartpole", "tracker-cost", folder, project)
    for callback in callbacks:
        if isinstance(callback, tracking.InBackground):
            # What happens after training is not its cost.
            callback._finish_seconds = 5.0
            log = callback.log_trial_result

            def timed(*args: Any, log: Any = log) -> None:
                if is_logged(len(moments)):
                    start = time.perf_counter()
                    log(*args)
                    inside.append(time.perf_counter() - start)

            callback.log_trial_result = timed
    run_config = tune.RunConfig(
        storage_path=str(folder),
        name="run",
        callbacks=[Clock(), *callbacks],
        stop={"env_runners/num_env_steps_sampled_lifetime": timesteps},
        verbose=0,
    )
    results = tune.Tuner(
        "BLPO", param_space=TASKS["cartpole"].config().debugging(seed=0, log_level="ERROR"), run_config=run_config
    ).fit()
    assert not results.errors
    return {"moments": [round(m - moments[0], 4) for m in moments], "inside": sum(inside)}


def is_logged(iteration: int) -> bool:
    """Whether W&B gets this iteration, the first being 1."""
    return iteration <= FIRST or (iteration - FIRST - 1) // BLOCK % 2 == 0


def blocks(moments: Sequence[float]) -> list[float]:
    """Seconds of each whole pair of blocks' first and second half, in turn."""
    ends = moments[FIRST - 1 :: BLOCK]
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    return seconds[: len(seconds) // 2 * 2]


def rows_cost(run: Mapping[str, Any]) -> list[float]:
    """Of each pair of blocks, by how much the logged one takes longer, as a part of the other."""
    seconds = blocks(run["moments"])
    return [logged / other - 1 for logged, other in zip(seconds[::2], seconds[1::2], strict=True)]


def start_seconds(run: Mapping[str, Any]) -> float:
    """Seconds of the first iterations beyond the pace of the blocks that are not logged."""
    pace = np.mean(blocks(run["moments"])[1::2]) / BLOCK
    return float(run["moments"][FIRST - 1] - (FIRST - 1) * pace)


def mean_and_error(values: Any) -> tuple[float, float]:
    """Mean of numbers, and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def measure(endpoint: str, ports: dict[str, int], timesteps: int) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": folder}
        if endpoint != "none":
            environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{ports[endpoint]}"}
        command = [sys.executable, "-m", "benchmarks.tracker_cost", "--run", folder, "--timesteps", str(timesteps)]
        command += ["--project", "p"] if endpoint != "none" else []
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--timesteps", type=int, default=500_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "tracker_cost.json")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the runs in --output, of the same --timesteps and machine"
    )
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--project", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        found = train(args.run, args.project, args.timesteps)
        print("\n" + json.dumps(found))
        return
    ports = {"dead": DISCARD_PORT, "silent": serve(Silent), "refusing": serve(Refusing)}
    runs: dict[str, list[dict[str, Any]]] = {endpoint: [] for endpoint in ENDPOINTS}
    if args.resume:
        earlier = json.loads(args.output.read_text())
        for name, value in {"timesteps": args.timesteps, "machine": provenance()["machine"]}.items():
            if earlier[name] != value:
                sys.exit(f"{name} {value}, but the runs in {args.output} have {earlier[name]}")
        runs = earlier["runs"]
    for _ in range(len(runs["none"]), args.rounds):
        for endpoint in ENDPOINTS:
            runs[endpoint].append(measure(endpoint, ports, args.timesteps))
            run = runs[endpoint][-1]
            print(
                endpoint,
                f"{run['moments'][-1]:.1f} s, start {start_seconds(run):.2f} s, rows",
                rows_cost(run),
                flush=True,
            )
    report(args, runs)


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Prints and keeps what the runs say."""
    summary: dict[str, dict[str, float]] = {}
    rows_without = np.ravel([rows_cost(run) for run in runs["none"]])
    start_without = np.array([start_seconds(run) for run in runs["none"]])
    seconds = float(np.mean([run["moments"][-1] for run in runs["none"]]))
    for endpoint in ENDPOINTS[1:]:
        inside = max(run["inside"] / run["moments"][-1] for run in runs[endpoint])
        rows, rows_error = mean_and_error(np.ravel([rows_cost(run) for run in runs[endpoint]]) - rows_without)
        start, start_error = mean_and_error([start_seconds(run) for run in runs[endpoint]] - start_without)
        whole, whole_error = rows + start / seconds, math.hypot(rows_error, start_error / seconds)
        longer, longer_error = mean_and_error(
            [
                run["moments"][-1] / without["moments"][-1] - 1
                for run, without in zip(runs[endpoint], runs["none"], strict=True)
            ]
        )
        summary[endpoint] = {
            "inside": inside,
            "rows": rows, "rows_error": rows_error,
            "start_seconds": start, "start_error": start_error,
            "whole": whole, "whole_error": whole_error,
            "runs": longer, "runs_error": longer_error,
        }  # fmt: skip
        print(
            f"{endpoint}: inside {inside:.3%}; rows {rows:.1%} ± {rows_error:.1%}; "
            f"start {start:.2f} ± {start_error:.2f} s; whole {whole:.1%} ± {whole_error:.1%} of {seconds:.0f} s; "
            f"runs {longer:.1%} ± {longer_error:.1%}"
        )
    found = {**provenance(), "timesteps": args.timesteps, "seconds": seconds, "summary": summary, "runs": runs}
    args.output.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
