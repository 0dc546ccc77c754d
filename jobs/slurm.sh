#!/usr/bin/env bash
# One training run under Slurm, its arguments those of jobs/train.py:
#   sbatch jobs/slurm.sh voc_det/swinir-x8/sr4ir --data FOLDER --storage FOLDER --workers 2 --gpu
# The repository, its .venv and the folders (or a bucket) must be the same on all nodes.
#SBATCH --job-name=sr4ir
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# Ray's stop at the end ends every Ray of yours on the node, so no other job may share it.
#SBATCH --exclusive
# Preempted or out of time, the job is queued again, and the same command continues the run. The
# notice comes this early before the time limit; before a preemption where Slurm is set to send it
# (PreemptParameters=send_user_signal) and the partition's GraceTime leaves room.
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
if [[ -f .venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

folder="$HOME/.ray/slurm-$SLURM_JOB_ID"
(umask 077 && mkdir -p "$folder")
trap 'rm -rf "$folder"' EXIT

# Ray's token: yours where you have one, else one for this job alone.
export RAY_AUTH_MODE=token
if [[ -z "${RAY_AUTH_TOKEN:-}" && -z "${RAY_AUTH_TOKEN_PATH:-}" && ! -s "$HOME/.ray/auth_token" ]]; then
    export RAY_AUTH_TOKEN_PATH="$folder/token"
    (umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")
fi

# By its number: a host's own name often stands for a loopback address there.
host=127.0.0.1
if ((SLURM_JOB_NUM_NODES > 1)); then
    first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    host="$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname -I | awk '{print $1}')"
fi
export RAY_ADDRESS="$host:6379"
# Nodes start at different times, above all from a shared file system.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# The training's exit code; symmetric-run's own is 0 also where Ray did not start.
status="$folder/status"
rm -f "$status"
# shellcheck disable=SC2016  # the inner shell expands these
record='status=$1; shift; code=0; "$@" || code=$?; echo "$code" >"$status"; exit "$code"'
srun --kill-on-bad-exit=1 ray symmetric-run --address "$RAY_ADDRESS" \
    --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus="${SLURM_CPUS_PER_TASK:-1}" \
    --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="/tmp/ray-$SLURM_JOB_ID" \
    --disable-usage-stats -- \
    bash -c "$record" record "$status" python jobs/train.py "$@" &
step=$!

noticed=""
# shellcheck disable=SC2329  # the trap calls it
drain() {
    noticed=1
    echo "notice from Slurm: draining, so that the run saves at once; then the job is queued again"
    srun --overlap --ntasks-per-node=1 python jobs/drain_on_notice.py \
        --address "$RAY_ADDRESS" --now --stay --also-head --seconds 120 || true
}
trap drain USR1

# A signal ends `wait` before the step does.
while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true
    if [[ -n "$noticed" && ! -s "$status" ]]; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
done
if [[ ! -s "$status" ]]; then
    echo "Ray did not start or ended early; its logs are in /tmp/ray-$SLURM_JOB_ID of each node" >&2
    exit 1
fi
exit "$(cat "$status")"
