#!/usr/bin/env bash
# Asks for a Cloud TPU slice, installs Luthier on all its hosts and runs one command on every one of them.
#
#   TPU_ZONE=us-west4-a TPU_TYPE=v5litepod-16 TPU_IMAGE=v2-alpha-tpuv5-lite \
#     bash launch/tpu_vm.sh [--dry_run] NAME -- luthier train --config=configs/pod.py --workdir=gs://bucket/run
#
# TPU_PROJECT      the project, if not gcloud's default
# TPU_SPOT=1       a spot slice: cheap, and taken back at any moment
# LUTHIER_SOURCE   what pip installs (default: this checkout's origin at its commit)
#
# `luthier compile-check` tells beforehand which slice the run needs. A slice that is taken back, or a run that
# stops with 75, is started again with the same command until it ends. The slice is left standing; delete it with
#   gcloud compute tpus queued-resources delete NAME --zone=… --force
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "launch/tpu_vm.sh: error: $1" >&2; exit 2; }

dry_run=""
if [[ "${1:-}" == "--dry_run" ]]; then dry_run=1; shift; fi
name="${1:-}"
[[ "$name" =~ ^[a-z][a-z0-9-]*$ ]] || fail "NAME must be lower-case letters, digits and dashes, got '$name'"
[[ "${2:-}" == "--" && $# -gt 2 ]] || fail "write the command after NAME --"
shift 2
[[ -n "${TPU_ZONE:-}" ]] || fail "no zone: set TPU_ZONE, such as us-west4-a"
[[ -n "${TPU_TYPE:-}" ]] || fail "no slice: set TPU_TYPE, such as v5litepod-16"
[[ -n "${TPU_IMAGE:-}" ]] || fail "no image: set TPU_IMAGE, such as v2-alpha-tpuv5-lite"
[[ -n "$dry_run" ]] || command -v gcloud > /dev/null || fail "gcloud is not installed"

where=("--zone=$TPU_ZONE" ${TPU_PROJECT:+"--project=$TPU_PROJECT"})
source="${LUTHIER_SOURCE:-git+$(git remote get-url origin 2> /dev/null || echo REPOSITORY)@$(git rev-parse HEAD)}"
install="python3 -m venv --upgrade-deps luthier-env && luthier-env/bin/pip install -q 'luthier[tpu] @ $source'"
printf -v command '%q ' "$@"
tpus=(gcloud compute tpus)

run() {
  if [[ -n "$dry_run" ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all_hosts() {
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}
state() {
  "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2> /dev/null || echo NONE
}
have_slice() {
  local now
  if [[ -z "$dry_run" ]]; then
    now=$(state)
    if [[ "$now" == ACTIVE ]]; then return; fi
    if [[ "$now" == SUSPENDED || "$now" == FAILED ]]; then
      run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
    fi
  fi
  if [[ -n "$dry_run" || "$now" != @(ACCEPTED|PROVISIONING|WAITING_FOR_RESOURCES|CREATING) ]]; then
    run "${tpus[@]}" queued-resources create "$name" --node-id="$name" "${where[@]}" \
      --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_IMAGE" ${TPU_SPOT:+--spot}
  fi
  until [[ -n "$dry_run" || "$(state)" == ACTIVE ]]; do
    echo "waiting for $TPU_TYPE in $TPU_ZONE: $(state)" >&2
    sleep 30
  done
  on_all_hosts "$install"
}

while true; do
  have_slice
  code=0
  on_all_hosts "PATH=\$HOME/luthier-env/bin:\$PATH $command" || code=$?
  if [[ -n "$dry_run" ]] || ((code == 0)); then break; fi
  if ((code != 75)) && [[ "$(state)" == ACTIVE ]]; then exit "$code"; fi
  echo "stopped with $code; going on" >&2
done
