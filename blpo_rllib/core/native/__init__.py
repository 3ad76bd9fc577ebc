"""Compiled functions for CPUs: the C++ files beside this one, built on first use and kept for later runs.

On networks of reinforcement learning's usual size an update is bound by the dispatch of small tensor operations, not by
arithmetic. Each function here takes a minibatch through all layers in one call.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
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
_FLAGS: tuple[str, ...] = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC"),
)
# What arrays of slots are padded to: whole vectors of any instruction set, in either precision.
SLOT_MULTIPLE = 16
# Precisions that the functions exist in, by the bytes of a number; each has a library of its own.
DTYPES = {torch.float32: 4, torch.float64: 8}
_NUMBERS = {torch.float32: "float", torch.float64: "double"}

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
        library: Gives the shared library of a precision; that of float64 when it is first needed.

    Attributes:
        listener: Is told of each call while something records them.

    Raises:
        OSError: If a library cannot be loaded.
    """

    def __init__(self, library: Callable[[torch.dtype], Path]):
        self._library, self._libraries = library, dict[torch.dtype, Any]()
        functions = self._functions(torch.float32)
        self._call, self._run = functions.blpo_call, functions.blpo_run
        for function in (self._call, self._run):
            function.restype = None
        self._call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        self._addresses: dict[tuple[str, torch.dtype], int] = {}
        self.listener: Callable[[str, Sequence[Argument]], None] | None = None

    def _functions(self, dtype: torch.dtype) -> Any:
        found = self._libraries.get(dtype)
        if found is None:
            # OpenMP's symbols are found in the runtime that torch has loaded: two would fight for the cores.
            found = self._libraries[dtype] = ctypes.CDLL(str(self._library(dtype)))
            found.blpo_function.argtypes, found.blpo_function.restype = [ctypes.c_char_p], ctypes.c_void_p
        return found

    def address(self, name: str, dtype: torch.dtype) -> int:
        """Where a function starts."""
        found = self._addresses.get((name, dtype))
        if found is None:
            found = self._functions(dtype).blpo_function(name.encode())
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
        return Kernels(_built)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning(
            "BLPO's CPU kernels could not be built, torch operations take their place (slower, same results): %s. "
            "A C++17 compiler (g++) is needed; native_kernels=False turns this off.",
            detail,
        )
        return None


def begin() -> None:
    """Starts to build what :func:`load` would wait for, if need be, while the caller goes on with something else."""

    def build() -> None:
        # Whoever needs the library meets the same error, and reports it.
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            _built(torch.float32)

    threading.Thread(target=build, daemon=True).start()


def _built(dtype: torch.dtype) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler: {os.environ.get('CXX', 'g++')!r} is not on the PATH")
    library = _cache() / f"kernels-{_fingerprint(compiler)}-{_NUMBERS[dtype]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with _alone(library.with_suffix(".lock")):
        if not library.exists():
            logger.warning("compiling BLPO's CPU kernels, once for this machine, while the rest is set up")
            _build(compiler, library, f"-DBLPO_NUMBER={_NUMBERS[dtype]}")
    return library


def _build(compiler: str, library: Path, definition: str) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        objects = [Path(folder) / f"{source.stem}.o" for source in _SOURCES]
        with ThreadPoolExecutor() as pool:
            compilations = zip(_SOURCES, objects, strict=True)
            list(pool.map(lambda pair: _compile(compiler, definition, "-c", pair[0], "-o", pair[1]), compilations))
        _compile(compiler, "-shared", *objects, "-o", built)
        # Whole or not at all, whoever else builds at the same time.
        os.replace(built, library)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits for other processes and threads that build the same; file systems without locks let all of them build."""
    with lock.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
