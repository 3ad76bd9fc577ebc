"""Ray still has the private names that the package relies on, and the package uses no others."""

import importlib
import inspect
import re

import private_names
import pytest

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
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    assert not exists(SingleAgentEnvRunner, "_ongoing_episode")
    assert not exists(SingleAgentEnvRunner, "_no_such_name")


def test_no_private_name_of_ray_is_used_without_being_declared():
    found = private_names.undeclared()
    assert found == [], "\n".join(f"{path}:{line}: {name}" for path, line, name in found)


def test_undeclared_names_are_found(monkeypatch):
    import ast

    tree = ast.parse(
        "from ray.x._y import _z\nclass A(B):\n    def f(self, o):\n        return o._secret, self._inherited\n"
    )
    monkeypatch.setattr(private_names, "sources", lambda: {"a.py": tree})
    assert {name.split()[-1] for _, _, name in private_names.undeclared()} == {"_y", "_z", "_secret", "_inherited"}


def test_replaced_methods_are_listed_apart():
    listed = {text.split(" of ")[0] for _, _, text in private_names.overrides()}
    assert {"BatchedEnvRunner._sample", "GroupedWandb._start_logging_actor"} <= listed
