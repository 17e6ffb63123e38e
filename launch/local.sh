#!/usr/bin/env bash
# Run a command as N processes on this machine: launch/local.sh N COMMAND [ARGUMENT …]
# Exits with the largest status of the processes. A signal goes to all of them.
set -u
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
count=$1
shift
if [[ -z ${JAX_COORDINATOR_ADDRESS:-} ]]; then
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
fi
export JAX_NUM_PROCESSES=$count
pids=()
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT HUP
status=0
for pid in "${pids[@]}"; do
  # `wait` returns early when a signal arrives.
  while true; do
    wait "$pid"
    code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  ((code > status)) && status=$code
done
exit "$status"
