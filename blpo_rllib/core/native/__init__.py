"""Compiled functions for CPUs: the C++ files beside this one, built on first use and kept for later runs.

On networks of reinforcement learning's usual size an update is bound by the dispatch of small tensor operations, not by
arithmetic. Each function here takes a minibatch through all layers in one call.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
# -ffp-contract=fast: a multiplication and an addition become one instruction, as in any BLAS.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC", "-shared"),
)
# What arrays of slots are padded to: whole vectors of any instruction set, in either precision.
SLOT_MULTIPLE = 16

_pointer, _integer, _number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_ARGUMENTS = {
    "forward": [_pointer, _pointer, _integer, _integer, _integer, _pointer, _pointer, _integer],
    "backward": [*[_pointer] * 4, _integer, _pointer, _pointer, _integer],
    "jvp": [_pointer, _pointer, _pointer, _pointer, _integer],
    "scaled_gradients": [_pointer, _pointer, _pointer, _pointer, _integer, _pointer, _integer],
    "second_order_rows": [*[_pointer] * 7, _integer, _pointer, _pointer, _integer],
    "advantages": [*[_pointer] * 5, _integer, _integer, _pointer, _integer],
    "adjoint": [*[_pointer] * 4, _integer, _integer, _pointer, _integer],
    "adam": [*[_pointer] * 4, _integer, _pointer, *[_number] * 5, _pointer, _integer],
}
DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class _Net(ctypes.Structure):
    _fields_ = (
        ("depth", _integer),
        ("sizes", _pointer),
        ("activations", _pointer),
        ("parameters", _pointer),
        ("slots", _integer),
    )


class Net:
    """The C++ side's view of a perceptron: see ``Net`` in ``perceptron.cpp``.

    Args:
        depth: L.
        sizes: d_0 ... d_L, as an array of C integers.
        activations: Numbers of the activations of layers 1 ... L − 1, likewise.
        parameters: Addresses of W_1, b_1, ..., likewise.
        num_slots: N.
    """

    def __init__(self, depth: int, sizes: Any, activations: Any, parameters: Any, num_slots: int):
        self._arrays = sizes, activations, parameters
        self._struct = _Net(depth, *map(ctypes.addressof, self._arrays), num_slots)
        self.address = ctypes.addressof(self._struct)


class Kernels:
    """The functions of the C++ files in float32 and float64.

    Args:
        library: The shared library.

    Raises:
        OSError: If the library cannot be loaded.
    """

    def __init__(self, library: Path):
        # OpenMP's symbols are found in the runtime that torch has loaded: a second one would fight it for the cores.
        functions = ctypes.CDLL(str(library))
        self._functions = {
            (name, dtype): getattr(functions, f"blpo_{name}_{suffix}")
            for name in _ARGUMENTS
            for dtype, suffix in DTYPES.items()
        }
        for (name, _), function in self._functions.items():
            function.argtypes, function.restype = _ARGUMENTS[name], None

    def __call__(self, name: str, dtype: torch.dtype, *args: Any) -> None:
        """Runs a function on pointers and numbers, on as many threads as torch uses."""
        self._functions[name, dtype](*args, torch.get_num_threads())


@functools.cache
def load() -> Kernels | None:
    """The kernels, built if this machine has none yet; None, with one warning, if that cannot be done."""
    try:
        return Kernels(_built())
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning(
            "BLPO's CPU kernels could not be built, torch operations take their place (slower, same results): %s. "
            "A C++17 compiler (g++) is needed; native_kernels=False turns this off.",
            detail,
        )
        return None


def _built() -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler: {os.environ.get('CXX', 'g++')!r} is not on the PATH")
    library = _cache() / f"kernels-{_fingerprint(compiler)}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            subprocess.run(
                [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(built)], check=True, capture_output=True, text=True
            )
            # Whole or not at all, whoever else builds at the same time.
            os.replace(built, library)
    return library


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blpo_rllib"


def _fingerprint(compiler: str) -> str:
    """Differs wherever a library built elsewhere might not run: homes are shared between unlike machines."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [platform.processor()]
    features = next((x for x in lines if x.startswith(("flags", "Features"))), lines[0])
    parts = [*(x.read_text() for x in _SOURCES), " ".join(_FLAGS), version, platform.machine(), features]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
