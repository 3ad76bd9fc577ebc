"""cluster/submit.py: against a stand-in for Ray's client, and (slow) against a real job server."""

import importlib.util
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cluster/submit.py"


@pytest.fixture
def submit():
    spec = importlib.util.spec_from_file_location("submit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeClient:
    """Keeps what is submitted; its job ends with ``status`` and ``code``."""

    def __init__(self, status="SUCCEEDED", code=0, tail_error=None, submit_error=None):
        self.info = SimpleNamespace(status=status, message="said by the server", driver_exit_code=code)
        self.tail_error, self.submit_error = tail_error, submit_error

    def submit_job(self, **request):
        if self.submit_error:
            raise self.submit_error
        self.request = request
        return "raysubmit_1"

    async def tail_job_logs(self, job_id):
        yield "first line\n"
        if self.tail_error:
            raise self.tail_error
        yield "second line\n"

    def get_job_info(self, job_id):
        return self.info


@pytest.fixture
def run(submit, monkeypatch):
    def run(client, *arguments):
        monkeypatch.setattr(submit, "connect", lambda address: client)
        return submit.main(list(arguments))

    return run


def test_arguments_pass_through(run, capsys):
    client = FakeClient()
    assert run(client, "hopper", "--num-env-runners", "4", "--output", "s3://a bucket/x", "--resume") == 0
    assert shlex.split(client.request["entrypoint"]) == [
        *("python", "tuned_examples/hopper_blpo.py", "--num-env-runners", "4"),
        *("--output", "s3://a bucket/x", "--resume"),
    ]
    assert client.request["runtime_env"]["working_dir"] == str(ROOT)
    assert client.request["entrypoint_resources"] is None
    assert capsys.readouterr().out.endswith("first line\nsecond line\n")


def test_runs_on_a_node_with_the_resource(run):
    client = FakeClient()
    run(client, "--run-on", "learner", "cartpole")
    assert client.request["entrypoint_resources"] == {"learner": 1}


def test_variables_are_passed_by_name(run, monkeypatch, capsys):
    client = FakeClient()
    monkeypatch.setenv("MY_KEY", "value")
    assert run(client, "cartpole", "--env", "MY_KEY") == 0
    assert client.request["runtime_env"]["env_vars"]["MY_KEY"] == "value"
    assert run(client, "cartpole", "--env", "NOT_SET_HERE") == 2
    assert "--env NOT_SET_HERE: this variable is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("STOPPED", -15, -15), ("STOPPED", 0, 1)],
)
def test_exits_as_the_job_did(run, capsys, status, code, expected):
    assert run(FakeClient(status, code), "cartpole") == expected
    assert (f"{status}: said by the server" in capsys.readouterr().err) == (status != "SUCCEEDED")


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [(KeyboardInterrupt(), 130, "\n"), (RuntimeError("code 1006"), 1, "lost the connection to http://10.0.0.1:8265")],
)
def test_job_that_is_no_longer_followed_goes_on(run, capsys, error, expected, message):
    assert run(FakeClient(tail_error=error), "cartpole", "--address", "http://10.0.0.1:8265") == expected
    said = capsys.readouterr().err
    assert message in said
    assert "The job goes on" in said
    assert "ray job stop --address http://10.0.0.1:8265 raysubmit_1" in said


def test_refused_job(run, capsys):
    assert run(FakeClient(submit_error=RuntimeError("Request failed with status code 500")), "cartpole") == 2
    assert "the job was not submitted: Request failed with status code 500" in capsys.readouterr().err


def test_unknown_example(run, capsys):
    assert run(None, "hoper") == 2
    assert "unknown example 'hoper': choose one of acrobot, ant, " in capsys.readouterr().err


def test_no_server_at_the_address():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = submit_process("cartpole", "--address", address)
    assert done.returncode == 2
    assert f"submit.py: no job server answers at --address {address}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["htp://127.0.0.1:8265", "auto"])
def test_address_of_another_kind(submit, address):
    with pytest.raises(submit.SubmitError, match=f"address {address}"):
        submit.connect(address)


def test_missing_dependency(submit, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(submit.SubmitError, match=r"needs aiohttp: pip install .*\[cluster\]"):
        submit.connect("http://127.0.0.1:1")


def submit_process(*arguments, **environment):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False
    )


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def job_server():
    """(address, environment) of a Ray head of its own on this machine, which wants a token."""
    # Not pytest's folder: Ray's sockets need a short path. A folder of its own, so that no other Ray here finds it.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    environment = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    address = f"127.0.0.1:{free_port()}"
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        f"--port={free_port()}",
        f"--dashboard-port={address.split(':')[1]}",
    ]
    command += ["--num-cpus=2", '--resources={"learner": 1}', "--disable-usage-stats"]
    # Jobs are started by an agent whose port is fixed by default: another Ray on this machine may have it.
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    # A job runs the "python" that its node finds.
    scripts = Path(sys.executable).parent
    head = subprocess.Popen(
        [str(scripts / command[0]), *command[1:]],
        env=os.environ | environment | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://{address}", environment
    head.send_signal(signal.SIGTERM)
    head.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def submit_when_up(address, *arguments, **environment):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done = submit_process(*arguments, "--address", address, **environment)
        # The server answers before the agent that starts jobs is there.
        if "no job server answers" not in done.stderr and "No available agent" not in done.stderr:
            return done
        time.sleep(1)
    raise TimeoutError(f"no job server at {address} after a minute: {done.stderr}")


@pytest.mark.slow
def test_real_job_server(job_server):
    address, environment = job_server
    done = submit_when_up(address, "cartpole", "--no-such-option", "3", **environment)
    assert done.returncode == 2, done.stderr
    assert "unrecognized arguments: --no-such-option 3" in done.stdout

    trained = ["cartpole", "--run-on", "learner", "--no-tune", "--stop-iters", "1", "--num-gpus-per-learner", "0"]
    done = submit_process(*trained, "--address", address, **environment)
    assert done.returncode == 0, done.stderr
    assert "iter=0 R=" in done.stdout

    done = submit_process("cartpole", "--address", address, **environment | {"RAY_AUTH_TOKEN": "not-the-token-of-it"})
    assert done.returncode == 2
    assert "wants its token: export RAY_AUTH_MODE=token" in done.stderr
