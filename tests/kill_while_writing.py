"""Kills a process that writes checkpoints, again and again, and loads what it left.

python tests/kill_while_writing.py FOLDER KILLS

The writer is a fork that saves the algorithm and has Tune's own code copy it to storage, as a trial does; then old
ones are deleted. Checkpoint number n holds n in every weight.
"""

import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray.train._internal.storage import StorageContext
from ray.tune import Checkpoint

from blpo_rllib import BLPOConfig, checkpoints


def build(seed=0):
    config = BLPOConfig().environment("CartPole-v1").env_runners(num_envs_per_env_runner=2)
    config.training(train_batch_size_per_learner=64, minibatch_size=32, num_epochs=1, nystrom_rank=2)
    algo = config.debugging(seed=seed, log_level="ERROR").build_algo()
    algo.train()
    # Ray's threads do not survive a fork; everything the checkpoint holds lives in this process.
    ray.shutdown()
    return algo


def parameters(algo):
    return list(algo.learner_group._learner.module["default_policy"].parameters())


def write_forever(algo, storage, written):
    while True:
        algo._iteration += 1
        for parameter in parameters(algo):
            parameter.data.fill_(algo.iteration)
        with tempfile.TemporaryDirectory(dir=storage.storage_fs_path) as folder:
            algo.save_to_path(folder)
            storage._update_checkpoint_index({})
            storage.persist_current_checkpoint(Checkpoint.from_directory(folder))
        os.write(written, struct.pack("q", algo.iteration))
        checkpoints.prune(storage.storage_filesystem, storage.trial_fs_path, keep=3)


def start_and_kill(algo, storage, chance):
    """Kills the writer while it is at its third checkpoint or so; the number of the last one that it had finished."""
    read, write = os.pipe()
    writer = os.fork()
    if not writer:
        write_forever(algo, storage, write)
    os.read(read, 8)
    start = time.monotonic()
    (last,) = struct.unpack("q", os.read(read, 8))
    time.sleep(chance.uniform(0.0, 1.5 * (time.monotonic() - start)))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        numbers = pipe.read()
    return max([last, *(number for (number,) in struct.iter_unpack("q", numbers))])


def load_newest(algo, storage, finished):
    """Loads it into this process, checks every weight, and says whether a newer one was torn."""
    filesystem, folder = storage.storage_filesystem, storage.trial_fs_path
    found = checkpoints.newest_valid(filesystem, folder)
    assert found, "finished checkpoints are gone"
    path, about = found
    algo.restore_from_path(path)
    assert algo.iteration == about["progress"]["training_iteration"] >= finished
    assert all((parameter == algo.iteration).all() for parameter in parameters(algo)), path
    newest = checkpoints.checkpoints(filesystem, folder)[-1]
    storage.current_checkpoint_index = checkpoints.index(newest)
    return newest != path


def main(folder, kills):
    algo, chance = build(), random.Random(0)
    storage = StorageContext(folder, "run", trial_dir_name="seed_0")
    torn = 0
    for _ in range(kills):
        finished = start_and_kill(algo, storage, chance)
        torn += load_newest(algo, storage, finished)
    print(json.dumps({"kills": kills, "torn": torn, "written": algo.iteration}), flush=True)
    # The forks share what the exit of this process would tear down in an orderly way.
    os._exit(0)


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()), int(sys.argv[2]))
