"""What the package declares is what it imports, and without its extras it says which one is missing."""

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import blpo_rllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# The distributions whose names differ from those of their modules.
DISTRIBUTIONS = {"tree": "dm-tree", "yaml": "pyyaml", "griffe": "griffelib", "Box2D": "box2d", "PIL": "pillow"}
# Clients that tests of cluster files use where they happen to be there, and skip otherwise.
OPTIONAL = {"jax", "botocore"}


def names(requirements):
    """The distributions of requirements, those of blpo_rllib's own extras among them."""
    found = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", requirement).groups()
        if name == PROJECT["name"]:
            found |= names(r for extra in extras.split(",") for r in EXTRAS[extra])
        else:
            found.add(name.lower())
    return found


CORE = names(PROJECT["dependencies"])


def third_party(path):
    """(distribution, extra) of each import; the extra is that of a `require`, "" within a function, None elsewhere."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    own = {p.name for p in ROOT.iterdir() if p.is_dir()} | {p.stem for p in (ROOT / "tests").glob("*.py")}
    for node in ast.walk(tree):
        extra = None if id(node) in top else ""
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            # Names in variables are those of other calls.
            modules, extra = [first.value] if isinstance(first, ast.Constant) else [], node.args[1].value
        for module in (m.partition(".")[0] for m in modules):
            if module not in sys.stdlib_module_names | own:
                yield DISTRIBUTIONS.get(module, module.replace("_", "-")), extra


@pytest.mark.parametrize("path", sorted((ROOT / "blpo_rllib").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_package_imports_what_it_declares(path):
    for distribution, extra in third_party(path):
        if extra is None:
            assert distribution in CORE, f"{distribution} is imported by all users: declare it in dependencies"
        elif extra:
            assert distribution in names(EXTRAS[extra]), f"the extra {extra} does not install {distribution}"
        else:
            assert distribution in CORE | names(EXTRAS["dev"]), f"{distribution} is not declared"


def own_imports(path):
    """The modules of the package that a file imports, those for types alone and those within functions among them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "blpo_rllib":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


MODULES = {
    str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): p
    for p in (ROOT / "blpo_rllib").rglob("*.py")
}


def test_imports_go_one_way():
    graph = {name: set(own_imports(path)) for name, path in MODULES.items()}
    assert {"blpo_rllib.core.update", "blpo_rllib.learning.hooks"} <= graph["blpo_rllib.learning.learner"]
    # Raises CycleError, with the modules, if there is a circle.
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("blpo_rllib.core.gae") < order.index("blpo_rllib.blpo")


def layout_rows():
    """The row of CONTRIBUTING.md's layout on which each module stands: that of the longest path that it begins with."""
    page = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layout")[2].partition("\n## ")[0]
    rows = {}
    for number, row in enumerate(line for line in page.splitlines() if line.startswith("| `")):
        paths = re.findall(r"`([^`]+)`", row.split(" | ")[0])
        rows |= {path if "/" in path and path.split("/")[0] in OWN else f"blpo_rllib/{path}": number for path in paths}
    found = {}
    for name, path in MODULES.items():
        matching = [known for known in rows if str(path.relative_to(ROOT)).startswith(known)]
        found[name] = rows[max(matching, key=len)] if matching else None
    return found


OWN = {path.name for path in ROOT.iterdir() if path.is_dir()}


def test_each_row_of_the_layout_imports_from_itself_and_from_above():
    rows = layout_rows()
    # The package itself registers the algorithm, and imports all for that.
    del rows["blpo_rllib"]
    assert [name for name, row in rows.items() if row is None] == []
    wrong = [
        f"{name} imports {other}, which stands below it"
        for name in rows
        for other in own_imports(MODULES[name])
        if other in rows and rows[other] > rows[name]
    ]
    assert wrong == []
    assert rows["blpo_rllib.core.gae"] < rows["blpo_rllib.core.update"] < rows["blpo_rllib.blpo"]


@pytest.mark.parametrize("folder", ["benchmarks", "cluster", "docs", "studies", "tests", "tuned_examples"])
def test_scripts_and_tests_import_what_dev_installs(folder):
    imported = {name for path in (ROOT / folder).rglob("*.py") for name, _ in third_party(path)}
    assert imported - OPTIONAL <= CORE | names(EXTRAS["dev"])


def test_every_requirement_is_pinned():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()
    }
    assert CORE | names(EXTRAS["dev"]) <= pinned


WITHOUT_EXTRAS = """
import importlib, json, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import blpo_rllib
errors = {{}}
for module in pkgutil.walk_packages(blpo_rllib.__path__, "blpo_rllib.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        errors[module.name] = str(error)
from blpo_rllib.experiments.tracking import trackers
from blpo_rllib.tasks import TASKS
TASKS["cartpole"].config().validate()
for name, use in {{
    "mujoco": lambda: TASKS["hopper"].config(),
    "wandb": lambda: trackers("task", "group", "output", wandb_project="project"),
    "envpool": lambda: TASKS["cartpole"].config().environment("EnvPool/CartPole-v1").validate(),
}}.items():
    try:
        use()
    except ImportError as error:
        errors[name] = str(error)
print(json.dumps(errors))
"""


def test_without_extras_everything_but_sweeps_imports_and_errors_name_the_extra(tmp_path):
    absent = {"matplotlib", "mujoco", "envpool", "optuna", "wandb", "wandb_workspaces", "tensorboard", "mkdocs"}
    code = WITHOUT_EXTRAS.format(absent=absent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    errors = json.loads(done.stdout.splitlines()[-1])
    for name in ("mujoco", "wandb", "envpool"):
        assert f'needs {name}: pip install "blpo_rllib[{name}]"' in errors.pop(name)
    # The dashboard has panels of sweeps.
    assert all(name.startswith(("blpo_rllib.sweep", "blpo_rllib.experiments.dashboard")) for name in errors)
    assert all('pip install "blpo_rllib[sweep]"' in message for message in errors.values())


def test_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    released = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert released[0] == blpo_rllib.__version__
