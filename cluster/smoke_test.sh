#!/bin/sh
# Build the image and use it the way a pod does: no network, no right, nobody's root, a read-only root file
# system, and only the home folder and /tmp to write to. A stream of two tasks runs in it, twice.
#
#   cluster/smoke_test.sh [cpu|cuda]      from the checkout's root; ENGINE=podman takes another engine,
#                                         BUILD_ARGS='--build-arg BASE=...' is handed to the build
set -eu
variant=${1:-cpu}
engine=${ENGINE:-docker}
image=seekr-smoke:$variant

# shellcheck disable=SC2086 # several words
"$engine" build -f cluster/Dockerfile -t "$image" --build-arg VARIANT="$variant" ${BUILD_ARGS:-} .

in_image() {
  "$engine" run --rm --network none --read-only --cap-drop ALL --security-opt no-new-privileges \
    --shm-size 1g --tmpfs /tmp:mode=1777 --tmpfs /home/seekr:mode=0777 \
    --volume "$PWD/examples:/examples:ro" "$image" "$@"
}

# shellcheck disable=SC2016 # meant for the shell inside
in_image bash -euc '
  test "$(id -u)" = 1000
  ! touch /opt/seekr/written 2> /tmp/refused
  command -v wget ray g++ > /tmp/found
  seekr doctor
  task() { echo "{name: $1, train: /examples/retention/$1/train.jsonl, test: /examples/retention/$1/test.jsonl}"; }
  run() {
    seekr run /examples/retention_4.yaml --set storage=/tmp/store --set "tasks=[$(task reverse), $(task swap)]" \
      --set train.epochs=1 --set data.train_rows=32 --set data.test_rows=8 --set replay.ratio=0.25
  }
  run
  run > /tmp/again
  grep -q reused /tmp/again && ! grep -q " ran " /tmp/again
'
echo "the image $image works"
