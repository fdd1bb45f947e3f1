#!/bin/sh
# Trains on this machine, with one process for each GPU, or for each core if there is no GPU:
#
#   launch/one_node.sh --arch allcnn_c --dataset digits
#
# NPROC=2 chooses the number of processes. The flags are those of `dtrain train`. The same command again continues a run
# that was stopped.
set -eu

# Use torchrun of the activated environment, or else of the .venv that setup_env.sh has created.
command -v torchrun >/dev/null || PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH

# --max-restarts=0: a run that was stopped (exit code 75) has saved and should end; torchrun would restart it at once.
# --signals-to-handle: torchrun passes these on to every process; all save the same step and end together. If SIGUSR1
#   were not in the list, it would kill torchrun and leave the processes running.
# exec: makes the signals of a scheduler or of `docker stop` reach torchrun and not this shell.
exec torchrun --standalone --nproc-per-node="${NPROC:-auto}" --max-restarts=0 \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m dtrain "$@"
