#!/usr/bin/env bash
# BLPO on a Slurm cluster:  sbatch cluster/slurm.sh
# One GPU node (head and learner) and CPU nodes (EnvRunners), as a heterogeneous job. A requeued job, or one submitted
# again after its time was up, goes on from its last checkpoint.

# ---- change these names: partitions, sizes, time ---------------------------------------------------------------------
#SBATCH --job-name=blpo
#SBATCH --output=blpo-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Five minutes before the time is up this script, and no Ray node, gets SIGTERM: the run ends with a checkpoint.
#SBATCH --signal=B:TERM@300
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH hetjob
#SBATCH --partition=cpu
#SBATCH --time=24:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16

set -euo pipefail

# ---- change these names: paths on a filesystem that all nodes see ----------------------------------------------------
CHECKOUT="${CHECKOUT:-$HOME/blpo_rllib}"
VENV="${VENV:-$CHECKOUT/.venv}"
RESULTS="${RESULTS:-$HOME/blpo_results/hopper}"
# ----------------------------------------------------------------------------------------------------------------------

# srun does not take --cpus-per-task from the lines above: the same numbers again.
HEAD_CPUS=8
WORKER_CPUS=16

# Two jobs may share a node: a port of the job's own.
port=$((20000 + SLURM_JOB_ID % 10000))
address="$(hostname --ip-address | cut -d' ' -f1):$port"

# Other users reach these nodes too: only who has this job's token may run code on its cluster.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

cd "$CHECKOUT"
# shellcheck source=/dev/null
source "$VENV/bin/activate"
mkdir -p "$RESULTS"

stop_nodes() {
    local steps
    steps=$(jobs -p)
    # shellcheck disable=SC2086  # one word per step
    [ -z "$steps" ] || kill $steps 2>/dev/null || true
}
trap stop_nodes EXIT

wait_for_head() {
    for _ in $(seq 60); do
        if ray status --address "$address" >/dev/null 2>&1; then
            return
        fi
        sleep 2
    done
    echo "No Ray head answered at $address within two minutes: see the log of its srun step above" >&2
    exit 1
}

srun --het-group=0 --nodes=1 --ntasks=1 --cpus-per-task="$HEAD_CPUS" \
    ray start --head --block --node-ip-address="${address%:*}" --port="$port" --num-cpus="$HEAD_CPUS" &
wait_for_head
srun --het-group=1 --cpus-per-task="$WORKER_CPUS" \
    ray start --block --address="$address" --num-cpus="$WORKER_CPUS" &

train() {
    export RAY_ADDRESS="$address"
    exec python tuned_examples/hopper_blpo.py \
        --published-batches --stop-timesteps 5000000 --num-env-runners 32 --num-envs-per-env-runner 1 \
        --num-learners 1 --num-gpus-per-learner 1 \
        --output "$RESULTS" --resume
}

# A signal ends `wait` early; the run itself ends when its checkpoint is written.
wait_for_training() {
    local status=0
    wait "$training" || status=$?
    while kill -0 "$training" 2>/dev/null; do
        status=0
        wait "$training" || status=$?
    done
    return "$status"
}

# Tune waits until enough nodes have joined.
train &
training=$!
trap 'kill -TERM "$training" 2>/dev/null || true' TERM
wait_for_training
