"""RLlib's own example scripts that use PPO, with BLPO put in by one line: which train?

    python -m studies.conformance.run                     # all; more than half an hour
    python -m studies.conformance.run --only lstm         # those whose name contains this
    python -m studies.conformance.run --missing           # those not known to train

Each script runs in a process of its own, for one iteration of a few hundred steps: the options ``--stop-iters=1
--num-env-runners=0``, ``--no-tune`` where it reads no results of Tune's, and defaults of the algorithms made small
where the script sets nothing itself. Scripts without such options train as long as they please. A run counts as trained
if it ends by itself, its algorithm has taken at least one step of training, and all of the learners were BLPO's. A
script that does not train is run under PPO too, once: if it does not train there either, it is out. What came out is
kept in results/, and docs/conformance.md shows it as a table. Tune's own files go to ~/ray_results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Scripts connect to one Ray; before anything of Ray is imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray

from blpo_rllib.experiments.provenance import provenance
from studies.conformance import script_process
from studies.conformance.scripts import Script, scripts

RESULTS = Path(__file__).parent / "results" / "conformance.json"
PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
TIME_LIMIT_S = 600.0
# Promised to Ray, whatever the machine has: the scripts' processes wait for each other most of the time.
NUM_CPUS = 8


@dataclass(frozen=True)
class Outcome:
    """What became of a script.

    Attributes:
        kind: "trained", "refused" (by a check of BLPO's settings), "failed", "other learner", or "out of time".
        detail: The message where it is not "trained".
        steps: Environment steps trained on.
    """

    kind: str
    detail: str = ""
    steps: int = 0


def run_script(script: Script, algorithm: str, time_limit_s: float = TIME_LIMIT_S) -> Outcome:
    """Runs a script under "PPO" or "BLPO"; Ray must be up."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["studies.conformance.preload"])
        address = ray.get_runtime_context().gcs_address
        process = context.Process(target=script_process.run, args=(script, algorithm, folder, address))
        process.start()
        process.join(time_limit_s)
        if process.is_alive():
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return Outcome("out of time", f"after {time_limit_s:.0f} s")
        return _outcome(Path(folder), algorithm)


def _outcome(folder: Path, algorithm: str) -> Outcome:
    end = folder / "end.json"
    if not end.exists():
        return Outcome("failed", "the process died")
    error = json.loads(end.read_text())
    if error is not None:
        return Outcome("refused" if error["by_blpo"] and algorithm == "BLPO" else "failed", error["message"])
    records = [json.loads(line) for path in folder.glob("steps*.jsonl") for line in path.read_text().splitlines()]
    trained = [record for record in records if record["learner"] is not None]
    if not trained:
        return Outcome("failed", "ended without a step of training")
    if wrong := sorted({r["learner"] for r in trained if r["is_blpo"] != (algorithm == "BLPO")}):
        return Outcome("other learner", ", ".join(wrong))
    return Outcome("trained", steps=sum(record["steps"] for record in trained))


def load() -> dict[str, Any]:
    """The kept outcomes by script and algorithm."""
    return json.loads(RESULTS.read_text())["scripts"] if RESULTS.exists() else {}


def save(outcomes: dict[str, Any]) -> None:
    """Keeps the outcomes of the scripts that there are."""
    RESULTS.parent.mkdir(exist_ok=True)
    names = {script.name for script in scripts()}
    known = {name: outcome for name, outcome in sorted(outcomes.items()) if name in names}
    RESULTS.write_text(json.dumps({"provenance": provenance(), "scripts": known}, indent=1) + "\n")


def counts(outcomes: dict[str, Any], script: Script) -> bool:
    """Whether a script is one that runs here at all."""
    known = outcomes.get(script.name, {})
    return known.get("BLPO", {}).get("kind") == "trained" or known.get("PPO", {}).get("kind") == "trained"


def table() -> str:
    """The results as Markdown."""
    outcomes, rows, others = load(), [], []
    about = json.loads(RESULTS.read_text())["provenance"]
    known = [script for script in scripts() if script.name in outcomes]
    for script in known:
        blpo, ppo = outcomes[script.name]["BLPO"], outcomes[script.name].get("PPO")
        if ppo is not None and not counts(outcomes, script):
            others.append(f"| `{script.name}` | {_cell(ppo['detail'])} |")
            continue
        why = script.change if blpo["kind"] == "trained" else _cell(blpo["detail"])
        rows.append(f"| `{script.name}` | {blpo['kind']} | {why} |")
    trained = sum(outcomes[script.name]["BLPO"]["kind"] == "trained" for script in known)
    return "\n".join(
        [
            f"{about['date']}, Ray {about['ray']}, torch {about['torch']}: {trained} of {len(rows)} runs train under "
            "BLPO with one line changed.",
            "",
            "| script | under BLPO | the line, or why not |",
            "|---|---|---|",
            *rows,
            "",
            "Out of the count, because they do not run here under PPO either:",
            "",
            "| script | what happens under PPO |",
            "|---|---|",
            *others,
        ]
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:240]


def write_page() -> None:
    """Puts the table between its markers."""
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n{table()}\n{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="run the scripts whose name contains one of these")
    parser.add_argument("--missing", action="store_true", help="leave out the scripts known to train")
    args = parser.parse_args()
    ray.init(num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False)
    outcomes = load()
    for script in scripts():
        known = outcomes.get(script.name, {})
        wanted = any(part in script.name for part in args.only)
        if not wanted or (args.missing and known.get("BLPO", {}).get("kind") == "trained"):
            continue
        for algorithm in ("BLPO", "PPO"):
            if algorithm == "PPO" and (known["BLPO"]["kind"] == "trained" or "PPO" in known):
                continue
            started = time.monotonic()
            outcome = run_script(script, algorithm)
            known[algorithm] = asdict(outcome)
            # Others may run other scripts meanwhile.
            save(load() | {script.name: known})
            seconds = time.monotonic() - started
            print(f"{script.name}, {algorithm}: {outcome.kind} ({seconds:.0f} s) {outcome.detail[:300]}", flush=True)
    write_page()
    ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
