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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = sorted(_FOLDER.glob("*.cpp"))
# -ffp-contract=fast: a multiplication and an addition become one instruction, as in any BLAS.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC"),
)
# What arrays of slots are padded to: whole vectors of any instruction set, in either precision.
SLOT_MULTIPLE = 16
# Precisions that the functions exist in, by the bytes of a number.
DTYPES = {torch.float32: 4, torch.float64: 8}

# An argument of a function: numbers, arrays, a perceptron, or None for an array that is left out.
Argument = Any


class _Net(ctypes.Structure):
    _fields_ = (
        ("depth", ctypes.c_int64),
        ("sizes", ctypes.c_void_p),
        ("activations", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
    )


class Net:
    """The C++ side's view of a perceptron: see ``Net`` in ``perceptron.cpp``.

    Args:
        sizes: d_0 ... d_L, as an array of C integers.
        activations: Numbers of the activations of layers 1 ... L − 1, likewise.
        parameters: W_1, b_1, ..., W_L, b_L, contiguous.
        num_slots: N.
    """

    def __init__(self, sizes: Any, activations: Any, parameters: Sequence[Tensor], num_slots: int):
        self._sizes, self._activations, self.parameters, self._num_slots = sizes, activations, parameters, num_slots

    def struct(self, addresses: Sequence[int]) -> tuple[int, Any]:
        """Where the C++ side finds it, with the parameters at these addresses; and what has to live as long."""
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        arrays = self._sizes, self._activations, pointers
        struct = _Net(len(self._sizes) - 1, *map(ctypes.addressof, arrays), self._num_slots)
        return ctypes.addressof(struct), (struct, arrays)


class Kernels:
    """The functions of the C++ files, by name.

    Args:
        library: The shared library.

    Attributes:
        listener: Is told of each call while something records them.

    Raises:
        OSError: If the library cannot be loaded.
    """

    def __init__(self, library: Path):
        # OpenMP's symbols are found in the runtime that torch has loaded: a second one would fight it for the cores.
        functions = ctypes.CDLL(str(library))
        self._find, self._call, self._run = functions.blpo_function, functions.blpo_call, functions.blpo_run
        self._find.argtypes, self._find.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_void_p
        for function in (self._call, self._run):
            function.restype = None
        self._call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        self._addresses: dict[tuple[str, torch.dtype], int] = {}
        self.listener: Callable[[str, Sequence[Argument]], None] | None = None

    def address(self, name: str, dtype: torch.dtype) -> int:
        """Where a function starts."""
        found = self._addresses.get((name, dtype))
        if found is None:
            found = self._find(name.encode(), DTYPES[dtype])
            if found is None:
                raise ValueError(f"no C++ file has a function {name!r}")
            self._addresses[name, dtype] = found
        return found

    def __call__(self, name: str, dtype: torch.dtype, *args: Argument) -> None:
        """Calls a function, on as many threads as torch uses."""
        words, alive = pack(args, Tensor.data_ptr)
        self._call(self.address(name, dtype), ctypes.addressof(words), torch.get_num_threads())
        del alive
        if self.listener is not None:
            self.listener(name, args)

    def prepared(self, name: str, dtype: torch.dtype, *args: Argument) -> Callable[[], None]:
        """A call on one thread with these arguments, whose arrays may change in place, to be made many times."""
        words, alive = pack(args, Tensor.data_ptr)
        function, start, call = self.address(name, dtype), ctypes.addressof(words), self._call

        def run(_alive: Any = (words, alive)) -> None:
            call(function, start, 1)

        return run

    def run(self, calls: int, count: int, num_threads: int, round_: int, repetitions: int) -> None:
        """Runs a list of ``count`` calls, which starts at the address ``calls``: see ``blpo_run`` in ``program.cpp``.

        Args:
            calls: The address.
            count: The list's length.
            num_threads: Threads of each call.
            round_: Where the number of the repetition stands while it runs.
            repetitions: How often the list runs.
        """
        self._run(calls, count, num_threads, round_, repetitions)


def pack(args: Sequence[Argument], address: Callable[[Tensor], int]) -> tuple[Any, Any]:
    """Arguments as the words that a function takes, and what has to live as long as they do.

    Args:
        args: The arguments.
        address: Where an array stands.
    """
    alive: list[Any] = []
    words = (ctypes.c_int64 * len(args))()
    for place, argument in enumerate(args):
        if isinstance(argument, Tensor):
            words[place] = address(argument)
        elif isinstance(argument, Net):
            words[place], memory = argument.struct([address(x) for x in argument.parameters])
            alive.append(memory)
        elif isinstance(argument, float):
            words[place] = _bits(argument)
        elif isinstance(argument, np.ndarray):
            words[place] = argument.ctypes.data
            alive.append(argument)
        else:
            words[place] = argument or 0
    return words, alive


def _bits(number: float) -> int:
    return ctypes.c_int64.from_buffer(ctypes.c_double(number)).value


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
        logger.warning("compiling BLPO's CPU kernels, once for this machine: half a minute or less on an idle one")
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            objects = [Path(folder) / f"{source.stem}.o" for source in _SOURCES]
            with ThreadPoolExecutor() as pool:
                compilations = zip(_SOURCES, objects, strict=True)
                list(pool.map(lambda pair: _compile(compiler, "-c", pair[0], "-o", pair[1]), compilations))
            _compile(compiler, "-shared", *objects, "-o", built)
            # Whole or not at all, whoever else builds at the same time.
            os.replace(built, library)
    return library


def _compile(compiler: str, *arguments: str | Path) -> None:
    subprocess.run([compiler, *_FLAGS, *map(str, arguments)], check=True, capture_output=True, text=True)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blpo_rllib"


def _fingerprint(compiler: str) -> str:
    """Differs wherever a library built elsewhere might not run: homes are shared between unlike machines."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [platform.processor()]
    features = next((x for x in lines if x.startswith(("flags", "Features"))), lines[0])
    sources = sorted([*_SOURCES, *_FOLDER.glob("*.h")])
    parts = [*(x.read_text() for x in sources), " ".join(_FLAGS), version, platform.machine(), features]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
