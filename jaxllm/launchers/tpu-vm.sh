#!/usr/bin/env bash
# Runs a command on a worker of a TPU VM, and restarts it when it can resume. Start it on all workers:
#   gcloud compute tpus tpu-vm ssh NAME --worker=all --command 'bash tpu-vm.sh COMMAND [ARGUMENT ...]'
#
# A signal goes to the command and ends the loop.
set -u
if [[ $# -eq 0 ]]; then
  echo "usage: tpu-vm.sh COMMAND [ARGUMENT ...], on every worker" >&2
  exit 2
fi
metadata=http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes
attribute() {
  curl --silent --fail --max-time 30 --header 'Metadata-Flavor: Google' "$metadata/$1"
}
if ! workers=$(attribute worker-network-endpoints) || ! index=$(attribute agent-worker-number); then
  echo "tpu-vm.sh: this is not a worker of a TPU VM: $metadata does not say which" >&2
  exit 2
fi
IFS=, read -ra endpoints <<<"$workers" # each NAME:PORT:ADDRESS
IFS=: read -r _ _ address _ <<<"${endpoints[0]}"
export JAX_COORDINATOR_ADDRESS=$address:8476
export JAX_NUM_PROCESSES=${#endpoints[@]}
export JAX_PROCESS_ID=$index
stopped='' restarts=0 refused=0
trap 'stopped=1; kill -TERM "$pid" 2>/dev/null' TERM INT HUP
while :; do
  "$@" &
  pid=$!
  wait "$pid"
  while [[ $stopped ]] && kill -0 "$pid" 2>/dev/null; do # a signal interrupts `wait`
    wait "$pid"
  done
  wait "$pid"
  status=$?
  # A killed process restarts before the others notice that it is gone. It then waits for them, and
  # exits with status 2 if they take longer than cluster.timeout: two such attempts are repeated.
  ((status == 2)) && ((refused += 1)) || refused=0
  if [[ $stopped ]] || ((restarts == 100)) ||
    ! ((status == 75 || status > 128 || status == 2 && restarts > 0 && refused < 3)); then
    exit $status
  fi
  ((restarts += 1))
  echo "tpu-vm.sh: status $status, restart $restarts" >&2
  sleep 10 &
  wait $!
  [[ -z $stopped ]] || exit $status
done
