#!/usr/bin/env bash
# One training run on a Cloud TPU slice, or on several, through queued resources.
# Takes the slice back after a preemption and goes on: `aria-jax train` resumes by itself, so
# --workdir and --data must be on storage that all hosts see and that outlives them.
set -euo pipefail

name='@{name}'
zone='@{zone}'
flags=(--zone "$zone" --quiet)
slices=(@{node_names})

state() {
  gcloud compute tpus queued-resources describe "$name" "${flags[@]}" \
    --format 'value(state.state)' 2>/dev/null || echo NONE
}

acquire() {
  while true; do
    case "$(state)" in
      ACTIVE) return ;;
      NONE)
        gcloud compute tpus queued-resources create "$name" "${flags[@]}" @{nodes} \
          --accelerator-type '@{accelerator}' --runtime-version '@{runtime}' @{spot} ;;
      FAILED | SUSPENDED)
        gcloud compute tpus queued-resources delete "$name" "${flags[@]}" --force ;;
      *) sleep 30 ;; # waiting for capacity, being made, or being deleted
    esac
  done
}

on_all_hosts() {
  local node
  local pids=()
  for node in "${slices[@]}"; do
    gcloud compute tpus tpu-vm ssh "$node" --zone "$zone" --worker all --command "$1" &
    pids+=("$!")
  done
  local failed=0
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return "$failed"
}

for attempt in $(seq @{attempts}); do
  acquire
  if on_all_hosts '@{install}' && on_all_hosts '@{environment} @{command}'; then
    exit 0
  fi
  echo "attempt $attempt ended early (slice: $(state)); going on from the last checkpoint" >&2
  sleep 10
done
echo "gave up after @{attempts} attempts" >&2
exit 1
