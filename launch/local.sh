#!/usr/bin/env bash
# Several processes of one run on this machine, to try what a pod will do.
#
#   bash launch/local.sh [--dry_run] PROCESSES [DEVICES] -- luthier train --config=… --workdir=…
#
# DEVICES simulates so many CPU devices in each process. The first process that fails ends the others,
# and its exit code is this script's; SIGTERM goes to all of them.
set -euo pipefail

fail() { echo "launch/local.sh: error: $1" >&2; exit 2; }

dry_run=""
if [[ "${1:-}" == "--dry_run" ]]; then dry_run=1; shift; fi
processes="${1:-}" devices=""
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES must be a number, got '$processes'"
shift
if [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then devices="$1"; shift; fi
[[ "${1:-}" == "--" && $# -gt 1 ]] || fail "write the command after --"
shift

port="${LUTHIER_PORT:-$((20000 + RANDOM % 20000))}"
if [[ -n "$devices" ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices" JAX_PLATFORMS=cpu
fi

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((process = 0; process < processes; process++)); do
  place=("JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$process")
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "${place[@]}" ${XLA_FLAGS:+"XLA_FLAGS=$XLA_FLAGS"} "$@"
    echo
    continue
  fi
  env "${place[@]}" "$@" &
  pids+=("$!")
done

code=0
for ((left = ${#pids[@]}; left > 0; left--)); do
  ended=0
  wait -n "${pids[@]}" || ended=$?
  # A signal to this script interrupts the wait before a process ended: look again.
  if ((ended > 128)) && kill -0 "${pids[@]}" 2>/dev/null; then left=$((left + 1)); continue; fi
  if ((ended != 0 && code == 0)); then
    code=$ended
    if ((code != 75)); then kill -TERM "${pids[@]}" 2>/dev/null || true; fi
  fi
done
exit "$code"
