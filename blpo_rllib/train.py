"""Trains a tuned task: the command line of ``tuned_examples/TASK_blpo.py``, which needs only the installed package."""

from __future__ import annotations

import argparse
import textwrap

from blpo_rllib.experiments.command_line import run_task
from blpo_rllib.tasks import TASKS

PROG = "python -m blpo_rllib.train"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} TASK [options]",
        description=__doc__,
        epilog=f"The options of a task: {PROG} TASK --help",
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=textwrap.fill(", ".join(TASKS)))
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    run_task(args.task, args.options, f"{PROG} {args.task}")


if __name__ == "__main__":
    main()
