#!/usr/bin/env bash
# Runs a command as N processes on this machine: launch/local.sh N COMMAND [ARGUMENT ...]
#
# A signal goes to all processes. The exit status is that of a failed process (1 or 2), else 75 if
# the run can be resumed: run the same command again.
set -um # -m: a process group for each, so that Ctrl-C reaches them once, through the trap
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
count=$1
shift
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:$(python3 -I -c "$free_port")}
export JAX_NUM_PROCESSES=$count
pids=() stopped=
for name in TERM INT HUP; do
  # shellcheck disable=SC2064
  trap "stopped=1; kill -$name \${pids[*]-} 2>/dev/null" $name
done
for ((i = 0; i < count; i++)); do
  [[ -z $stopped ]] || break
  JAX_PROCESS_ID=$i "$@" </dev/null &
  pids+=($!)
done
((${#pids[@]})) || exit 75
failed=0 resumable=0
for pid in "${pids[@]}"; do
  status=129
  while ((status > 128)) && kill -0 "$pid" 2>/dev/null; do  # a signal interrupts `wait`
    wait "$pid"
    status=$?
    ((status <= 128)) || sleep 0.2 # a stopped process does not block `wait`
  done
  wait "$pid" 2>/dev/null
  status=$?
  case $status in
    0) ;;
    1 | 2 | 126 | 127) failed=$status ;; # 126, 127: the command could not be started
    *) resumable=75 ;;
  esac
done
exit $((failed ? failed : resumable))
