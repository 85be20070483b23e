#!/bin/bash
# Trains on a queued Cloud TPU slice of Spot machines. Queues a new slice when the old one is taken back.
#
#     PROJECT=my-project ZONE=us-west4-a REPOSITORY=https://... BUCKET=my-bucket docs/launch/tpu_queued.sh
#
# Exit codes of train.py: 75 saved after SIGTERM, and 255 from ssh when the machines are gone: both go on. 0 ends the
# loop, and so does 2, a mistake in the command. Any other code is tried again at most three times in a row.
set -u
: "${PROJECT:?}" "${ZONE:?}" "${REPOSITORY:?}" "${BUCKET:?}"
NAME=${NAME:-igpt}
TYPE=${TYPE:-v5litepod-64}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
FLAGS=${FLAGS:---config=configs/imagenet.py:l --config.data.source=tokens:/mnt/bucket/imagenet-32 --config.mesh.fsdp=64}

tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
everywhere() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }
state() { # of the slice; NONE if there is no such slice, nothing if Google could not be asked
  if found=$(tpus queued-resources describe "$NAME" --format='value(state.state)' 2>&1); then
    echo "$found"
  elif [[ $found == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$found" >&2
  fi
}

errors=0
while true; do
  case $(state) in
    ACTIVE) ;;
    NONE) tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
      --runtime-version="$RUNTIME" --spot || exit 1 ;;
    FAILED | SUSPENDED) tpus queued-resources delete "$NAME" --quiet --force ;;
  esac
  if [ "$(state)" != ACTIVE ]; then
    sleep 60
    continue
  fi

  everywhere "
    set -e
    mountpoint -q /mnt/bucket || { sudo mkdir -p /mnt/bucket && sudo chown \$USER /mnt/bucket &&
      gcsfuse --implicit-dirs $BUCKET /mnt/bucket; }
    [ -d igpt ] || git clone $REPOSITORY igpt
    cd igpt && [ -d .venv ] || { pip install --user uv && python3 -m uv venv --python=3.11; }
    python3 -m uv pip install -e '.[tpu]' || exit 1" &&  # uv ends with 2 without a network
    everywhere "cd igpt && export LIBTPU_INIT_ARGS=--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 &&
      exec .venv/bin/python train.py $FLAGS --workdir=/mnt/bucket/$NAME"
  code=$?
  case $code in
    0 | 2) exit $code ;;
    75 | 255) errors=0 ;;
    *) errors=$((errors + 1)) ;;
  esac
  [ "$errors" -gt 3 ] && exit "$code"
  sleep 30
done
