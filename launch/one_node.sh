#!/bin/sh
# Trains on this machine, one process for each GPU, or for each core where there is no GPU:
#
#   launch/one_node.sh --arch allcnn_c --dataset digits
#
# NPROC=2 chooses the number of processes. Everything else is dtrain's. Run it again to go on after a stop.
set -eu

# An activated environment comes first, else the one that `make` has made.
command -v torchrun >/dev/null || PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH

# --max-restarts=0: a stopped run (exit code 75) has saved and wants to end; torchrun would start it again at once.
# --signals-to-handle: passed on to every process, which save the same step and leave together. Without SIGUSR1 in the
#   list, that signal would kill torchrun and leave the processes behind.
# exec: the signals of a scheduler or of `docker stop` reach torchrun itself and not this shell.
exec torchrun --standalone --nproc-per-node="${NPROC:-auto}" --max-restarts=0 \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m dtrain "$@"
