"""Submits a tuned example to a running Ray cluster, shows its log, and exits as the job did.

python cluster/submit.py hopper --run-on learner --num-env-runners 32 --num-gpus-per-learner 1

What this script does not know is passed to the example. The checkout that the script lies in is uploaded, so that the
cluster runs this code; what it depends on must be installed there (cluster/Dockerfile). Ctrl-C leaves the job running.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Neither is needed to train, and each upload is kept on the head.
EXCLUDES = ["/.git", "/docs", "/tests", "/benchmarks"]


class SubmitError(Exception):
    """What the user has to put right."""


def parse_command_line(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and those that are the example's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("example", help=f"tuned example: {', '.join(examples())}")
    parser.add_argument(
        "--address", default="http://127.0.0.1:8265", help="the cluster's dashboard (default: %(default)s)"
    )
    parser.add_argument(
        "--run-on",
        metavar="RESOURCE",
        help="run the script on a node with this custom resource, and wait until there is one; "
        "an autoscaling cluster starts it",
    )
    parser.add_argument(
        "--env",
        metavar="NAME",
        action="append",
        default=[],
        help="give the job this environment variable of yours; the dashboard shows its value",
    )
    return parser.parse_known_args(arguments)


def examples() -> dict[str, Path]:
    """The tuned examples by name."""
    return {path.stem.removesuffix("_blpo"): path for path in sorted((ROOT / "tuned_examples").glob("*_blpo.py"))}


def job(options: argparse.Namespace, example_arguments: list[str]) -> dict[str, Any]:
    """The arguments of ``JobSubmissionClient.submit_job``.

    Raises:
        SubmitError: If there is no such example, or a variable of ``--env`` is not set.
    """
    known = examples()
    if options.example not in known:
        raise SubmitError(f"unknown example {options.example!r}: choose one of {', '.join(known)}")
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        raise SubmitError(f"--env {missing[0]}: this variable is not set here; export it first")
    script = known[options.example].relative_to(ROOT)
    return {
        "entrypoint": shlex.join(["python", str(script), *example_arguments]),
        "runtime_env": {
            "working_dir": str(ROOT),
            "excludes": EXCLUDES,
            "env_vars": {"PYTHONUNBUFFERED": "1"} | {name: os.environ[name] for name in options.env},
        },
        "entrypoint_resources": {options.run_on: 1} if options.run_on else None,
    }


def connect(address: str) -> Any:
    """A client of the job server at ``address``.

    Raises:
        SubmitError: If nothing answers there, or Ray's job submission is not installed here.
    """
    # Ray prefers this variable to the address it is given; what the command line says is what is meant.
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)
    os.environ.pop("RAY_ADDRESS", None)
    try:
        import aiohttp  # noqa: F401  (what Ray's client needs beside ray itself)
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise SubmitError(
            f"Ray's job submission needs {error.name}: pip install -c constraints.txt -e '.[cluster]'"
        ) from error
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise SubmitError(
            f"the cluster at --address {address} wants its token: export RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN where it is not the one in ~/.ray/auth_token (cluster/README.md says how to get it)"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise SubmitError(
            f"no job server answers at --address {address} ({error}). Is the cluster up, and its dashboard "
            "forwarded to this machine (`ray dashboard CLUSTER.yaml`, or kubectl port-forward; see cluster/README.md)?"
        ) from error


def submit(client: Any, request: dict[str, Any]) -> str:
    """The id of the new job.

    Raises:
        SubmitError: If the upload is too large, or the cluster refuses the job.
    """
    try:
        return client.submit_job(**request)
    except (OSError, RuntimeError, ValueError) as error:
        raise SubmitError(f"the job was not submitted: {error}") from error


async def show_log(client: Any, job_id: str) -> None:
    """Prints the job's log until the job ends."""
    async for lines in client.tail_job_logs(job_id):
        print(lines, end="", flush=True)


def exit_code(client: Any, job_id: str) -> int:
    """0 if the job succeeded, else the code its script exited with, or 1."""
    info = client.get_job_info(job_id)
    if info.status == "SUCCEEDED":
        return 0
    print(f"\njob {job_id} {info.status}: {info.message}", file=sys.stderr)
    return info.driver_exit_code or 1


def follow(client: Any, job_id: str, address: str) -> int:
    """Shows the log and returns the exit status; a job that is no longer followed goes on."""
    where = f"--address {address} {job_id}"
    goes_on = f"The job goes on: ray job logs --follow {where}; to end it: ray job stop {where}"
    try:
        asyncio.run(show_log(client, job_id))
        return exit_code(client, job_id)
    except KeyboardInterrupt:
        print(f"\n{goes_on}", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        print(f"\nlost the connection to {address} ({error}). {goes_on}", file=sys.stderr)
        return 1


def main(arguments: list[str]) -> int:
    """Submits, follows, and returns the exit status."""
    options, example_arguments = parse_command_line(arguments)
    try:
        request = job(options, example_arguments)
        client = connect(options.address)
        job_id = submit(client, request)
    except SubmitError as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return 2
    print(f"job {job_id}: {request['entrypoint']}", flush=True)
    return follow(client, job_id, options.address)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
