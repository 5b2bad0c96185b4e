#!/usr/bin/env bash
#SBATCH --job-name=raymerge
#SBATCH --partition=cpu
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=8
#SBATCH --mem=32768M
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

# raymerge manifest slurm configs/linear.yml s3://bucket/merged --partition cpu
# sbatch FILE

set -euo pipefail

IFS= read -r -d '' RAYMERGE_CONFIG <<'END_OF_RAYMERGE_CONFIG' || true
# Weighted average of two fine-tunes of one base (a model soup).
merge_method: linear
models:
  - model: Qwen/Qwen2.5-0.5B-Instruct
    parameters:
      weight: 0.6
  - model: Qwen/Qwen2.5-Coder-0.5B-Instruct
    parameters:
      weight: 0.4
dtype: bfloat16
END_OF_RAYMERGE_CONFIG

IFS= read -r -d '' RAYMERGE_START <<'END_OF_RAYMERGE_START' || true
# Starts Ray on one node of a job. On the head the merge runs then; when it has ended, so does Ray on all nodes.
# The head exits with the merge's code; the others with 0, unless they could not take part.
#
#   RAYMERGE_IS_HEAD      1 on the head, 0 on the others
#   RAYMERGE_HEAD         host name or address of the head
#   RAYMERGE_NODES        how many nodes there are, the head among them
#   RAYMERGE_SETUP        shell commands to run first; may be unset
#   RAYMERGE_RAY_OPTIONS  for `ray start`
#   RAYMERGE_CONFIG       the config, which the head writes to merge.yml
#   RAYMERGE_COMMAND      the merge of merge.yml
set -euo pipefail

port=6379
patience=${RAYMERGE_JOIN_SECONDS:-900} # how long nodes wait for each other
ray_pid='' merge_pid=''

say() { echo "raymerge on $(hostname): $*" >&2; }

leave() {
  trap '' TERM INT
  # All of Ray at once: by itself it would look for the other nodes first.
  if [ -n "$ray_pid" ]; then { kill -KILL -- "-$ray_pid" && wait "$ray_pid"; } 2>/dev/null || true; fi
  for _ in {1..5}; do
    kill_rest
    rm -rf "${RAY_TMPDIR:-}" 2>/dev/null && break || sleep 1
  done
}
# Ray's workers have process groups of their own, and one that was just being started may not notice the end of Ray.
kill_rest() {
  local environ pid
  [ -n "${RAY_TMPDIR:-}" ] || return 0
  for environ in $(grep -lsxzF "RAY_TMPDIR=$RAY_TMPDIR" /proc/[0-9]*/environ); do
    pid=${environ#/proc/}
    kill -KILL "${pid%/environ}" 2>/dev/null || true
  done
}
trap leave EXIT
# A merge lets go of its output when it is told to end.
trap 'if [ -n "$merge_pid" ]; then kill -TERM -- "-$merge_pid" 2>/dev/null || true; else exit 143; fi' TERM INT

begin() { # in the background, as a process group of its own
  set -m
  "$@" &
  set +m
}
start_ray() {
  # shellcheck disable=SC2086 # options
  begin ray start --block --temp-dir "$RAY_TMPDIR/ray" $RAYMERGE_RAY_OPTIONS "$@" >"$RAY_TMPDIR/ray.log" 2>&1
  ray_pid=$!
}
is_running() { kill -0 "$1" 2>/dev/null; }
head_answers() { timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$RAYMERGE_HEAD" "$port" 2>/dev/null; }
explain_ray() {
  say "Ray has ended on this node:"
  cat "$RAY_TMPDIR/ray.log" >&2
  exit 1
}

eval "${RAYMERGE_SETUP:-}"
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
RAY_TMPDIR=$(mktemp -d /tmp/raymerge-XXXXXX) # short: sockets with names of 107 bytes are in it
export RAY_TMPDIR
unset RAY_ADDRESS

if [ "$RAYMERGE_IS_HEAD" = 1 ]; then
  own=$(getent ahostsv4 "$RAYMERGE_HEAD" | awk '$1 !~ /^127\./ { print $1; exit }') || true
  start_ray --head --port "$port" --include-dashboard=false ${own:+--node-ip-address "$own"}
  until [ -s "$RAY_TMPDIR/ray/ray_current_cluster" ]; do
    is_running "$ray_pid" || explain_ray
    sleep 0.2
  done
  RAY_ADDRESS=$(<"$RAY_TMPDIR/ray/ray_current_cluster")
  export RAY_ADDRESS
  cd "$RAY_TMPDIR"
  printf '%s' "$RAYMERGE_CONFIG" >merge.yml
  begin bash -c "python3 -m raymerge.cluster.roll_call $RAYMERGE_NODES $patience && exec $RAYMERGE_COMMAND"
  merge_pid=$!
  code=1
  while is_running "$merge_pid"; do # a signal ends the waiting, not the merge
    wait "$merge_pid" && code=0 || code=$?
  done
  exit "$code"
fi

SECONDS=0
until head_answers; do
  if ((SECONDS > patience)); then
    say "nobody answers at $RAYMERGE_HEAD:$port after $patience s"
    exit 1
  fi
  sleep 1
done
start_ray --address "$RAYMERGE_HEAD:$port"
misses=0
while ((misses < 3)) && is_running "$ray_pid"; do
  if head_answers; then misses=0; else misses=$((misses + 1)); fi
  sleep 1
done
if ((misses == 0)) && head_answers; then explain_ray; fi
END_OF_RAYMERGE_START

export RAY_task_oom_retries=0
export RAY_grpc_client_keepalive_time_ms=15000
export RAY_grpc_client_keepalive_timeout_ms=10000
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
export RAY_USAGE_STATS_ENABLED=0
export RAY_worker_niceness=0
export RAY_AUTH_MODE=token
export RAYMERGE_SETUP=''
export RAYMERGE_COMMAND='raymerge merge merge.yml s3://bucket/merged --wait --address auto'
export RAYMERGE_RAY_OPTIONS='--num-cpus=8 --num-gpus=0 --memory=32212254720 --object-store-memory=134217728'

RAYMERGE_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
RAYMERGE_HEAD=${RAYMERGE_HEAD%%$'\n'*} # the first line
RAYMERGE_NODES=$SLURM_JOB_NUM_NODES
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAYMERGE_CONFIG RAYMERGE_START RAYMERGE_HEAD RAYMERGE_NODES RAY_AUTH_TOKEN

# The job ends as its head does.
srun --export=ALL --cpus-per-task=8 --kill-on-bad-exit=0 bash -c '
  export RAYMERGE_IS_HEAD=$((SLURM_NODEID == 0))
  bash -c "$RAYMERGE_START" || exit $((RAYMERGE_IS_HEAD ? $? : 0))'
