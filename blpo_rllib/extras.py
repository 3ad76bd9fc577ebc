"""Imports packages that only extras install; where one is missing, the error names the extra."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str, purpose: str) -> Any:
    """Imports a module of a package that an extra installs.

    Args:
        module: The module's full name.
        extra: The extra of blpo_rllib that installs it.
        purpose: What it is for, which begins the message where it is missing.

    Raises:
        ImportError: If it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(f'{purpose} needs {package}: pip install "blpo_rllib[{extra}]"') from error
