#!/usr/bin/env bash
# One run on a Cloud TPU slice, or on several, through queued resources.
# Takes the slice back after a preemption and goes on: `aria-jax` resumes by itself, so
# what it reads and writes must be on storage that all hosts see and that outlives them.
# However it ends, the slice is deleted: nothing is left that costs money.
set -euo pipefail

name='@{name}'
zone='@{zone}'
wheel='@{wheel}'
pins='@{pins}' # every start of the run gets the same versions
flags=(--zone "$zone" --quiet)
slices=(@{node_names})
log="$(mktemp)"

state() {
  gcloud compute tpus queued-resources describe "$name" "${flags[@]}" \
    --format 'value(state.state)' 2>/dev/null || echo NONE
}

delete() {
  gcloud compute tpus queued-resources delete "$name" "${flags[@]}" --force
}

# shellcheck disable=SC2329 # the trap calls it
finish() {
  rm -f "$log"
  [ "$(state)" = NONE ] || delete || echo "could not delete $name: it still costs money" >&2
}
trap finish EXIT

acquire() {
  while true; do
    case "$(state)" in
      ACTIVE) return ;;
      NONE)
        gcloud compute tpus queued-resources create "$name" "${flags[@]}" @{nodes} \
          --accelerator-type '@{accelerator}' --runtime-version '@{runtime}' @{spot} ;;
      FAILED | SUSPENDED) delete ;;
      *) sleep 30 ;; # waiting for capacity, being made, or being deleted
    esac
  done
}

# Runs `gcloud … tpu-vm "$@"` for every slice at once; "{}" stands for the slice's name.
on_all_slices() {
  local node
  local pids=()
  for node in "${slices[@]}"; do
    gcloud compute tpus tpu-vm "${@//\{\}/$node}" --zone "$zone" --worker all &
    pids+=("$!")
  done
  local failed=0
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return "$failed"
}

# shellcheck disable=SC2016 # the hosts expand what is between single quotes
# The slices' own Python may be too old; the environment has the one that the wheel was made for.
install() {
  on_all_slices scp "$wheel" ${pins:+"$pins"} '{}:' && on_all_slices ssh '{}' --command \
    'python3 -m pip install -q --user uv && "$HOME/.local/bin/uv" venv -q --clear --python 3.11 aria-jax-env && "$HOME/.local/bin/uv" pip install -q --python aria-jax-env @{constraint} "./@{wheel_name}[@{extras}]"'
}

# shellcheck disable=SC2016
# gcloud does not pass on which status a host's command ended with, so the host says it.
run() {
  on_all_slices ssh '{}' --command \
    'export PATH="$HOME/aria-jax-env/bin:$PATH"; @{environment} @{command}; code=$?; echo "aria-jax ended with status $code"; exit $code' \
    2>&1 | tee "$log"
}

for attempt in $(seq @{attempts}); do
  acquire
  if install && run; then
    exit 0
  fi
  if grep -q 'aria-jax ended with status 2$' "$log"; then
    echo "the command itself is wrong (see above): not tried again" >&2
    exit 2
  fi
  echo "attempt $attempt ended early (slice: $(state)); going on from the last checkpoint" >&2
  sleep 10
done
echo "gave up after @{attempts} attempts" >&2
exit 1
