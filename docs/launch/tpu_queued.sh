#!/bin/bash
# Trains on a queued Cloud TPU slice of Spot machines. Queues a new slice when the old one is taken back.
#
#     PROJECT=my-project ZONE=us-west4-a REPOSITORY=https://... BUCKET=my-bucket docs/launch/tpu_queued.sh
#
# The exit code of train.py decides what follows. After 75 (saved after SIGTERM) the loop goes on. 0 ends it, and so
# does 2, a mistake in the command. After any other code it tries again, at most three times in a row. When a connection
# is lost or a machine is gone, gcloud starts the command on that host again, up to nine times, before it ends with 255;
# then, too, the loop goes on. The slice stays, and costs money, until you delete it.
set -u
: "${PROJECT:?}" "${ZONE:?}" "${REPOSITORY:?}" "${BUCKET:?}"
NAME=${NAME:-igpt}
TYPE=${TYPE:-v5litepod-64}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
DATA=tokens:gs://$BUCKET/imagenet-32
FLAGS=${FLAGS:---config=configs/imagenet.py:l --config.data.source=$DATA --config.mesh.fsdp=64}

tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
everywhere() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
state() { # of the slice; NONE if there is no such slice, nothing if Google could not be asked
  if ! tpus queued-resources describe "$NAME" --format='value(state.state)' 2> "$messages"; then
    if grep -q NOT_FOUND "$messages"; then echo NONE; else cat "$messages" >&2; fi
  fi
}
errors=0
count_error() { # of code $1
  errors=$((errors + 1))
  [ "$errors" -le 3 ] && return
  echo "$0 gives up after $errors errors in a row; the last one is above, and has code $1" >&2
  exit "$1"
}

while true; do
  case $(state) in
    ACTIVE) ;;
    NONE)
      if tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
        --runtime-version="$RUNTIME" --spot; then
        errors=0
      else
        count_error $?
      fi
      ;;
    FAILED | SUSPENDED) tpus queued-resources delete "$NAME" --quiet --force ;;
  esac
  if [ "$(state)" != ACTIVE ]; then
    sleep 60
    continue
  fi

  everywhere "
    { [ -d igpt ] || git clone $REPOSITORY igpt; } && cd igpt &&
    { [ -d .venv ] || { pip install --user uv && python3 -m uv venv --python=3.11; }; } &&
    python3 -m uv pip install -e '.[tpu]' || exit 1" &&  # uv ends with 2 without a network
    everywhere "cd igpt && export LIBTPU_INIT_ARGS=--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 &&
      exec .venv/bin/python train.py $FLAGS --workdir=gs://$BUCKET/$NAME"
  code=$?
  case $code in
    0 | 2) exit $code ;;
    75 | 255) errors=0 ;;
    *) count_error $code ;;
  esac
  sleep 30
done
