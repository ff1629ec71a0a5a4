#!/bin/sh
# 200 runs over 5 images, which are built here: a whole cluster is started for them and stopped again.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
work=$(mktemp -d /tmp/afs-batch.XXXXXX)
trap 'rm -rf "$work"' EXIT

layout=$(python -m tests.testbed.images busybox)
layout=${layout%:*}
images="$layout:latest,$layout:gzip,$layout:multi,$layout:docker,$layout:docker-multi"

afs up --any-port --state-dir "$work/state" -- \
    python examples/batch.py --runs 200 "$images" sh -c 'test "$NUMBER" -ge 0'
