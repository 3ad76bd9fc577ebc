"""Lists the private names of Ray that the package uses: ``make private-names``.

A private name begins with one underscore. What ``blpo_rllib/rllib_private.py`` declares may be used by subclasses of
Ray's classes (``self._name``) alone; on other objects only that module touches it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from blpo_rllib.rllib_private import NAMES

ROOT = Path(__file__).parents[1]
ADAPTER = "blpo_rllib/rllib_private.py"
# Private names of others than Ray, and those of named tuples, which are public.
# The module that goes to a W&B run's process by value, and imports nothing of the package.
BY_VALUE = "blpo_rllib/experiments/wandb_process.py"
NOT_RAYS = {"_fields", "_asdict", "_replace", "_exit", "_dynamo", "_fused_adam_", "_opt_called", "_to_model"}

Use = tuple[str, int, str]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def sources() -> dict[str, ast.Module]:
    paths = sorted((ROOT / "blpo_rllib").rglob("*.py"))
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in paths}


def is_self(node: ast.AST) -> bool:
    """Whether the object is the one whose method this is, or the EnvRunner that a rollout is a part of."""
    if isinstance(node, ast.Attribute) and node.attr == "_runner":
        return is_self(node.value)
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "cls", "runner"))


def defined(tree: ast.Module) -> set[str]:
    """The private names that a module defines: functions, classes, variables, attributes of ``self``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def imports(path: str, tree: ast.Module) -> Iterator[Use]:
    """Imports of private names and from private modules of Ray."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            for name in (*node.module.split("."), *(alias.name for alias in node.names)):
                if is_private(name):
                    yield path, node.lineno, f"from {node.module} import {name}"


def uses(own: bool) -> Iterator[Use]:
    """Uses of private names of Ray: those that a class inherits if ``own``, else those of other objects."""
    trees = sources()
    everywhere = set().union(*(defined(tree) for path, tree in trees.items() if path != ADAPTER))
    for path, tree in trees.items():
        # core/ imports no Ray.
        if path in (ADAPTER, BY_VALUE) or path.startswith("blpo_rllib/core/"):
            continue
        if not own:
            yield from imports(path, tree)
        known = defined(tree) if own else everywhere
        attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr))
        for node in attributes:
            if is_self(node.value) == own and node.attr not in known | NOT_RAYS:
                yield path, node.lineno, node.attr


def overrides() -> Iterator[Use]:
    """Methods of Ray's that RLlib calls and a subclass replaces."""
    for path, tree in sources().items():
        module = importlib.import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        for node in tree.body:
            cls = getattr(module, node.name) if isinstance(node, ast.ClassDef) else None
            for base in () if cls is None else inspect.getmro(cls)[1:]:
                if base.__module__.startswith("ray."):
                    for name in set(vars(cls)) & set(vars(base)):
                        if is_private(name) and inspect.isfunction(vars(base)[name]):
                            yield path, node.lineno, f"{cls.__name__}.{name} of {base.__module__}"


def undeclared() -> list[Use]:
    """Uses that ought not to be: of other objects outside the adapter, and inherited ones that it does not declare."""
    declared = {name.name for name in NAMES}
    return [*uses(own=False), *((p, line, name) for p, line, name in uses(own=True) if name not in declared)]


def main() -> None:
    print(f"declared in {ADAPTER}:")
    for name in NAMES:
        print(f"  {name.name:36} {name.owner:72} {name.purpose}")
    print("methods of Ray's that subclasses replace:")
    for path, line, text in sorted(set(overrides())):
        print(f"  {path}:{line}: {text}")
    found = undeclared()
    print("used elsewhere without being declared:" if found else "used elsewhere without being declared: none")
    for path, line, text in found:
        print(f"  {path}:{line}: {text}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
