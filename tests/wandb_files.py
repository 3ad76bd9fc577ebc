"""Reads the files of offline W&B runs, which W&B itself reads in its Go program only.

The format is LevelDB's log: a header of 7 bytes, then blocks of 32 KiB with fragments of records, each with a checksum
(4 bytes), a length (2) and a kind (1: whole, 2: first, 3: middle, 4: last).
"""

import json
import struct

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK = 7, 32768
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    """The records of a run's file."""
    data, position, parts, found = path.read_bytes(), HEADER, [], []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (WHOLE, LAST):
            found.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
            parts = []
    return found


def items(found):
    """The keys and values of an update of config, history or summary."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in found}


class Run:
    """What a run's file says.

    Args:
        path: The file.
    """

    def __init__(self, path):
        found = records(path)
        kinds = [r.WhichOneof("record_type") for r in found]
        self.run = next(r.run for r, kind in zip(found, kinds) if kind == "run")
        self.history = [items(r.history.item) for r, kind in zip(found, kinds) if kind == "history"]
        self.artifacts = [r.artifact for r, kind in zip(found, kinds) if kind == "artifact"]
        self.config, self.summary = items(self.run.config.update), {}
        for r, kind in zip(found, kinds):
            if kind == "config":
                self.config |= items(r.config.update)
            if kind == "summary":
                self.summary |= items(r.summary.update)
