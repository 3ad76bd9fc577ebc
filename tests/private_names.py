"""Lists where the package uses private names of Ray, and which of them it does not declare: ``make private-names``.

A private name begins with one underscore. ``blpo_rllib/rllib_private.py`` declares all that the package relies on. A
class of ours that derives from one of Ray's may use and replace what it inherits, as ``self._name``; on any other
object only that module touches private names, and only it imports them.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from blpo_rllib.rllib_private import NAMES

ROOT = Path(__file__).parents[1]
ADAPTER = "blpo_rllib/rllib_private.py"
# It goes to a W&B run's process by value and imports nothing of the package, so what it needs it imports itself.
BY_VALUE = "blpo_rllib/experiments/wandb_process.py"
# Private names of others than Ray: of named tuples, whose are public, of os, of torch and of cv2.
NOT_RAYS = {"_fields", "_asdict", "_replace", "_exit", "_dynamo", "_fused_adam_", "_opt_called", "_to_model"}
# gymnasium's, of SyncVectorEnv, whose own steps a test compares with.
NOT_RAYS |= {"_env_obs", "_autoreset_envs", "_add_info"}

# Ends of names of metrics.
OTHER_STRINGS = {"_global_norm"}


@dataclass(frozen=True, order=True)
class Use:
    """A line on which the package uses a private name.

    Attributes:
        path: The file.
        line: Its line.
        name: The name.
        owners: Those of Ray's classes that a class of ours inherits the name from, or the module that it is imported
            from; empty on an object of which that is not known.
        kind: "inherited", "replaced", "imported", "named" in a string, or "on another object".
    """

    path: str
    line: int
    name: str
    owners: tuple[str, ...]
    kind: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name} ({self.kind}{' from ' if self.owners else ''}{self.owner})"

    @property
    def owner(self) -> str:
        return self.owners[-1] if self.owners else ""

    @property
    def is_declared(self) -> bool:
        """Whether the adapter declares the name of one of its owners; it never does for unknown objects."""
        return any(name.name == self.name and (name.owner in self.owners or self.kind == "named") for name in NAMES)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def sources() -> dict[str, tuple[ast.Module, ModuleType]]:
    """By path, what the files of the package say and the modules that they are; core/ imports no Ray."""
    found = {}
    for path in sorted((ROOT / "blpo_rllib").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if not name.startswith("blpo_rllib/core/") and name != ADAPTER:
            dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            found[name] = ast.parse(path.read_text()), importlib.import_module(dotted)
    return found


def has(cls: type, name: str) -> bool:
    """Whether a class itself, without its bases, has a name, as an attribute or on its instances."""
    return name in vars(cls) or bool(re.search(rf"\bself\.{name}\b", source_of(cls)))


@functools.cache
def source_of(cls: type) -> str:
    return inspect.getsource(cls)


def rays(cls: type) -> list[type]:
    """Those of a class's bases that are Ray's."""
    return [base for base in inspect.getmro(cls) if base.__module__.startswith("ray.")]


def owners(cls: type, name: str) -> tuple[str, ...]:
    """Ray's bases of a class that have a name, as ``module:class``."""
    return tuple(f"{base.__module__}:{base.__qualname__}" for base in rays(cls) if has(base, name))


def defined(tree: ast.AST) -> set[str]:
    """The private names that some code defines: functions, classes, variables, attributes of ``self``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def is_self(node: ast.AST) -> bool:
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


def is_runner(node: ast.AST) -> bool:
    """Whether this is the EnvRunner that a class of ours is a part of: ``runner`` or ``self._runner``."""
    if isinstance(node, ast.Attribute):
        return node.attr == "_runner" and is_self(node.value)
    return isinstance(node, ast.Name) and node.id == "runner"


def imports(path: str, tree: ast.Module) -> Iterator[Use]:
    """Imports of private names and from private modules of Ray."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            for name in (*node.module.split("."), *(alias.name for alias in node.names)):
                if is_private(name):
                    yield Use(path, node.lineno, name, (node.module,), "imported")


def attributes(tree: ast.AST) -> Iterator[tuple[int, str, ast.AST]]:
    """Line, name and object of each private attribute, those that are named in ``getattr`` and its like among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in NOT_RAYS:
            yield node.lineno, node.attr, node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and is_private(name.value):
                yield node.lineno, name.value, node.args[0]


def named(path: str, tree: ast.Module) -> Iterator[Use]:
    """Strings that are nothing but a private name which the module does not define, such as a setting's."""
    known = defined(tree)
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if re.fullmatch(r"_[a-z]\w+", text) and text not in known | OTHER_STRINGS:
            yield Use(path, node.lineno, text, (), "named")


def inherited(path: str, node: ast.ClassDef, cls: type, runner: type | None) -> Iterator[Use]:
    """What a class of ours uses and replaces of Ray's classes that it derives from."""
    for line, name, value in attributes(node):
        owner = cls if is_self(value) else runner if is_runner(value) else None
        if owner is not None and (found := owners(owner, name)):
            yield Use(path, line, name, found, "inherited")
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and is_private(method.name) and (found := owners(cls, method.name)):
            yield Use(path, method.lineno, method.name, found, "replaced")


def elsewhere(path: str, tree: ast.Module) -> Iterator[Use]:
    """Private names of objects of which nothing here is known: neither the module nor a class of Ray's has them."""
    known = defined(tree)
    declared = {name.name for name in NAMES}
    for line, name, value in attributes(tree):
        if is_self(value) or is_runner(value):
            continue
        if name not in known or name in declared:
            yield Use(path, line, name, (), "on another object")


def unknown(path: str, node: ast.ClassDef, cls: type, known: set[str]) -> Iterator[Use]:
    """Private names of ``self`` that neither Ray's nor our own classes define."""
    for line, name, value in attributes(node):
        if is_self(value) and name not in known and not owners(cls, name):
            yield Use(path, line, name, (), "on another object")


def names_in_adapter() -> set[str]:
    """The private names that the adapter itself touches or imports."""
    tree = ast.parse((ROOT / ADAPTER).read_text())
    return {name for _, name, _ in attributes(tree)} | {use.name for use in imports(ADAPTER, tree)}


def uses() -> Iterator[Use]:
    """All uses of private names of Ray outside the adapter."""
    files = sources()
    everywhere = set().union(*(defined(tree) for tree, _ in files.values()))
    for path, (tree, module) in files.items():
        yield from imports(path, tree)
        yield from elsewhere(path, tree)
        yield from named(path, tree)
        runner = next((cls for cls in vars(module).values() if is_env_runner(cls)), None)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                cls = getattr(module, node.name)
                yield from inherited(path, node, cls, runner)
                yield from unknown(path, node, cls, everywhere)


def is_env_runner(cls: object) -> bool:
    from blpo_rllib.sampling.env_runner import BatchedEnvRunner

    return inspect.isclass(cls) and issubclass(cls, BatchedEnvRunner)


def undeclared(found: Iterable[Use]) -> list[Use]:
    """Uses that ought not to be: what the adapter does not declare, and what only the adapter may import."""
    return sorted(use for use in set(found) if not use.is_declared or (use.kind == "imported" and use.path != BY_VALUE))


def main() -> None:
    found = sorted(set(uses()))
    print(f"declared in {ADAPTER}, and where our classes use what they inherit:")
    for name in NAMES:
        print(f"  {name.name:36} {name.owner:72} {name.purpose}")
        for use in found:
            if use.name == name.name and (name.owner in use.owners or use.kind == "named"):
                print(f"      {use.path}:{use.line} ({use.kind})")
    wrong = undeclared(found)
    print("used without being declared:" if wrong else "used without being declared: none")
    for use in wrong:
        print(f"  {use}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
