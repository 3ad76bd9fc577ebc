"""What W&B costs training when its server is dead, never answers, or refuses the key.

    python benchmarks/tracker_cost.py

Trains the CartPole example with Tune, each time in a process of its own: without W&B, and with W&B against a port on
loopback where nobody listens, against a server that takes requests and never answers, and against one that answers 401.
Printed and kept: the share of training's time that Tune's loop spent inside W&B's callback, which is what training
waits for; and the time of the second half of the iterations, and of all, over those without W&B in the same round.
These have the noise of the machine in them, and the processor time of W&B's own processes, most of it while they
start.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from blpo_rllib.provenance import provenance

ROOT = Path(__file__).parents[1]
ENDPOINTS = ("none", "dead", "silent", "refusing")
# Where nobody listens.
DISCARD_PORT = 9


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


def train(folder: Path, project: str | None, timesteps: int) -> dict[str, float]:
    """Trains in this process; seconds of all and of the later iterations, and those inside W&B's callback meanwhile."""
    import ray
    from ray import tune

    from blpo_rllib import tracking

    sys.path.insert(0, str(ROOT / "tuned_examples"))
    from cartpole_blpo import config

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
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
    results = tune.Tuner("BLPO", param_space=config().debugging(seed=0, log_level="ERROR"), run_config=run_config).fit()
    assert not results.errors
    middle = moments[len(moments) // 2]
    return {
        "iterations": len(moments),
        "seconds": moments[-1] - moments[0],
        "late_seconds": moments[-1] - middle,
        "inside": sum(inside),
    }


def measure(endpoint: str, ports: dict[str, int], timesteps: int) -> dict[str, float]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": folder}
        if endpoint != "none":
            environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{ports[endpoint]}"}
        command = [sys.executable, __file__, "--run", folder, "--timesteps", str(timesteps)]
        command += ["--project", "p"] if endpoint != "none" else []
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timesteps", type=int, default=150_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "tracker_cost.json")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--project", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        found = train(args.run, args.project, args.timesteps)
        print("\n" + json.dumps(found))
        return
    ports = {"dead": DISCARD_PORT, "silent": serve(Silent), "refusing": serve(Refusing)}
    runs: dict[str, list[dict[str, float]]] = {endpoint: [] for endpoint in ENDPOINTS}
    for _ in range(args.rounds):
        for endpoint in ENDPOINTS:
            runs[endpoint].append(measure(endpoint, ports, args.timesteps))
            print(endpoint, runs[endpoint][-1], flush=True)
    summary: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS[1:]:
        shares = [run["inside"] / run["seconds"] for run in runs[endpoint]]
        summary[endpoint] = {"largest_share_inside": max(shares)}
        print(f"{endpoint}: inside the callback {max(shares):.3%} of training at most")
        for part in ("late_seconds", "seconds"):
            ratios = [run[part] / other[part] for run, other in zip(runs[endpoint], runs["none"], strict=True)]
            summary[endpoint][part] = {"ratio": float(np.median(ratios)), "range": [min(ratios), max(ratios)]}
            print(f"  {part}: {np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of those without W&B")
    report = {**provenance(), "timesteps": args.timesteps, "summary": summary, "runs": runs}
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
