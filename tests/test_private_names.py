"""Ray still has the private names that the package relies on, and the package uses no others."""

import ast
import importlib
import inspect
import re
from types import ModuleType

import private_names
import pytest
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from blpo_rllib.rllib_private import NAMES


def exists(owner, name):
    """Whether a module has the name, or a class or one of its bases, as an attribute or on its instances."""
    if not inspect.isclass(owner):
        return hasattr(owner, name)
    bases = [base for base in inspect.getmro(owner) if base.__module__.startswith("ray.")]
    mentioned = re.compile(rf"\bself\.{name}\b")
    return hasattr(owner, name) or any(mentioned.search(inspect.getsource(base)) for base in bases)


@pytest.mark.parametrize("private", NAMES, ids=lambda private: f"{private.owner.split(':')[-1]}.{private.name}")
def test_ray_has_the_name(private):
    module, _, cls = private.owner.partition(":")
    try:
        owner = importlib.import_module(module)
        owner = getattr(owner, cls) if cls else owner
    except (ImportError, AttributeError) as error:
        pytest.fail(f"Ray no longer has {private.owner}, whose {private.name} is used for: {private.purpose} ({error})")
    file = module.replace(".", "/") + ".py"
    assert exists(owner, private.name), (
        f"Ray no longer has {private.name} in {file} ({cls or 'module'}). It is used for: {private.purpose}. "
        "See blpo_rllib/rllib_private.py"
    )


def test_a_missing_name_is_noticed():
    assert not exists(SingleAgentEnvRunner, "_ongoing_episode")
    assert not exists(SingleAgentEnvRunner, "_no_such_name")


def test_no_private_name_of_ray_is_used_without_being_declared():
    found = private_names.undeclared(private_names.uses())
    assert found == [], "\n".join(map(str, found))
    # Names of private modules aside, through which the adapter imports.
    touched = private_names.names_in_adapter() - {"_common", "_internal"}
    assert touched <= {name.name for name in NAMES}


def test_every_declared_name_is_used():
    uses = list(private_names.uses())
    used = {(use.name, owner) for use in uses for owner in use.owners}
    touched = private_names.names_in_adapter() | {"DEPRECATED_VALUE"}
    touched |= {use.name for use in uses if use.kind == "named"}
    assert [name for name in NAMES if (name.name, name.owner) not in used and name.name not in touched] == []


# Of the names of RLlib's EnvRunner, the adapter declares _ongoing_episodes and _new_episode alone.
UNDECLARED = """
from ray.rllib._package import _imported
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner


class Own(SingleAgentEnvRunner):
    _time_after_sampling: float

    def sample(self, other):
        self._own = self._ongoing_episodes, self._time_after_sampling
        self._try_env_reset(), super()._log_episode_metrics(), self._nobodys
        return other._secret, getattr(other, "_hidden"), other._ongoing_episodes, {"_in_a_string": other}

    def _reset_envs(self, *args): ...

    def _new_episode(self, *args): ...
"""


def test_undeclared_names_are_found(monkeypatch):
    tree, module = ast.parse(UNDECLARED), ModuleType("own")
    module.Own = type("Own", (SingleAgentEnvRunner,), {})
    monkeypatch.setattr(private_names, "sources", lambda: {"own.py": (tree, module)})
    found = {(use.name, use.kind) for use in private_names.undeclared(private_names.uses())}
    assert found == {
        ("_package", "imported"),
        ("_imported", "imported"),
        # Although the class says that it has it.
        ("_time_after_sampling", "inherited"),
        ("_try_env_reset", "inherited"),
        ("_log_episode_metrics", "inherited"),
        ("_reset_envs", "replaced"),
        ("_nobodys", "on another object"),
        ("_secret", "on another object"),
        ("_hidden", "on another object"),
        ("_ongoing_episodes", "on another object"),
        ("_hidden", "named"),
        ("_in_a_string", "named"),
    }


def test_methods_that_replace_rays_are_uses_too():
    found = {(use.path, use.name) for use in private_names.uses() if use.kind == "replaced"}
    assert {
        ("blpo_rllib/sampling/env_runner.py", "_sample"),
        ("blpo_rllib/experiments/tracking.py", "_start_logging_actor"),
    } <= found
