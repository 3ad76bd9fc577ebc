"""Checkpoints that tell whether they are whole: a seal, written last, names every file with its size and checksum.

The seal is the commit. Files may be copied in any order, to any filesystem, and the copying may stop at any moment:
what is not exactly what the seal says is no checkpoint. RLlib and Tune write and copy in place and leave no such mark
(ray/rllib/utils/checkpoints.py, save_to_path; ray/train/_internal/storage.py, persist_current_checkpoint).
"""

from __future__ import annotations

import json
import logging
import posixpath
import zlib
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs

logger = logging.getLogger(__name__)

SEAL = "blpo_checkpoint.json"
# What to do about one that cannot be used.
INSTEAD = "name another checkpoint, such as an older one of the same run"
# Tune's names: checkpoint_000012.
_PREFIX = "checkpoint_"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names its path and says why."""


def resolve(path: str | Path, filesystem: pyarrow.fs.FileSystem | None = None) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem of ``path``, a local path or a URL that pyarrow or fsspec knows, and the path on it.

    Raises:
        ValueError: If neither knows the URL.
        ImportError: If fsspec knows a package that does and is not installed.
    """
    if filesystem is not None:
        return filesystem, str(path)
    if "://" not in str(path):
        return pyarrow.fs.LocalFileSystem(), Path(path).expanduser().resolve().as_posix()
    try:
        return pyarrow.fs.FileSystem.from_uri(str(path))
    except pyarrow.ArrowInvalid:
        other, path_there = fsspec.core.url_to_fs(str(path))
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(other)), path_there


def seal(filesystem: pyarrow.fs.FileSystem, path: str, about: dict[str, Any]) -> None:
    """Declares the files under ``path`` a whole checkpoint, with ``about`` in its description."""
    files = {name: _fingerprint(filesystem, path, name) for name in _files(filesystem, path) if name != SEAL}
    with filesystem.open_output_stream(posixpath.join(path, SEAL)) as stream:
        stream.write(json.dumps({**about, "files": files}).encode())


def check(filesystem: pyarrow.fs.FileSystem, path: str) -> dict[str, Any]:
    """What the seal says about the checkpoint at ``path``.

    Raises:
        CheckpointError: If there is none, or it is not whole, or something else wrote it.
    """
    present = _files(filesystem, path)
    described = _read_seal(filesystem, path, present)
    for name, expected in described["files"].items():
        if name not in present:
            raise CheckpointError(f"checkpoint {path} is torn: {name} is missing; {INSTEAD}")
        found = _fingerprint(filesystem, path, name)
        if found != expected:
            raise CheckpointError(
                f"checkpoint {path} is torn: {name} has {found['bytes']} bytes with checksum {found['crc32']}, "
                f"and {expected['bytes']} with {expected['crc32']} were written; {INSTEAD}"
            )
    return described


def newest_valid(filesystem: pyarrow.fs.FileSystem, folder: str) -> tuple[str, dict[str, Any]] | None:
    """The newest whole checkpoint in ``folder`` and what its seal says; warns of each newer one that cannot be used."""
    for path in reversed(checkpoints(filesystem, folder)):
        try:
            return path, check(filesystem, path)
        except (CheckpointError, OSError) as error:
            logger.warning("%s; going on with the one before", error)
    return None


def find(filesystem: pyarrow.fs.FileSystem, path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The whole checkpoint at ``path``, or the newest one of the run whose folder ``path`` is, with its filesystem.

    Raises:
        CheckpointError: If there is none.
        ValueError: If the folder holds the checkpoints of several trials.
    """
    trials = _trials(filesystem, path)
    if len(trials) > 1:
        raise ValueError(f"{path} holds the checkpoints of several trials: name one of {', '.join(trials)}")
    newest = newest_valid(filesystem, trials[0]) if trials else None
    if newest is not None:
        return filesystem, newest[0]
    check(filesystem, path)
    return filesystem, path


def _trials(filesystem: pyarrow.fs.FileSystem, path: str, depth: int = 2) -> list[str]:
    """The folders at and below ``path`` that hold checkpoints: of a trial, an experiment or an example's output."""
    if checkpoints(filesystem, path):
        return [path]
    if depth == 0:
        return []
    below = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    folders = sorted(info.path for info in below if info.type == pyarrow.fs.FileType.Directory)
    return [trial for folder in folders for trial in _trials(filesystem, folder, depth - 1)]


def checkpoints(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[str]:
    """Paths of what is named like a checkpoint in ``folder``, oldest first, whole or not."""
    selector = pyarrow.fs.FileSelector(folder, allow_not_found=True)
    found = [info for info in filesystem.get_file_info(selector) if info.type == pyarrow.fs.FileType.Directory]
    numbered = [(index(info.path), info.path) for info in found]
    return [path for number, path in sorted(numbered) if number >= 0]


def index(path: str) -> int:
    """The number in a checkpoint's name; -1 if it has none."""
    number = posixpath.basename(path.rstrip("/")).removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else -1


def prune(filesystem: pyarrow.fs.FileSystem, folder: str, keep: int) -> None:
    """Deletes what lies before the newest ``keep`` checkpoints; a failure is a warning."""
    for path in checkpoints(filesystem, folder)[:-keep]:
        try:
            filesystem.delete_dir(path)
        except OSError as error:
            logger.warning("old checkpoint %s was not deleted: %s", path, error)


def _read_seal(filesystem: pyarrow.fs.FileSystem, path: str, present: set[str]) -> dict[str, Any]:
    if not present:
        raise CheckpointError(f"checkpoint {path} does not exist or is empty; {INSTEAD}")
    if SEAL not in present:
        raise CheckpointError(
            f"{path} is not a checkpoint of BLPO, or its writing was cut off: it holds {_named(present)}, but no "
            f"{SEAL}; {INSTEAD}"
        )
    try:
        with filesystem.open_input_stream(posixpath.join(path, SEAL)) as stream:
            described = json.loads(stream.read())
        return described | {"files": dict(described["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is torn: {SEAL} is unreadable ({error}); {INSTEAD}") from error


def _named(names: set[str], most: int = 3) -> str:
    shown = sorted(names)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more files" if len(shown) > most else "")


def _files(filesystem: pyarrow.fs.FileSystem, path: str) -> set[str]:
    selector = pyarrow.fs.FileSelector(path, allow_not_found=True, recursive=True)
    infos = filesystem.get_file_info(selector)
    return {posixpath.relpath(info.path, path) for info in infos if info.type == pyarrow.fs.FileType.File}


def _fingerprint(filesystem: pyarrow.fs.FileSystem, path: str, name: str) -> dict[str, int]:
    checksum = size = 0
    with filesystem.open_input_stream(posixpath.join(path, name)) as stream:
        while chunk := stream.read(1 << 20):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return {"bytes": size, "crc32": checksum}
