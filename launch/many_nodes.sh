#!/bin/sh
# Trains on several machines. On each of them the same command, but for NODE_RANK:
#
#   HEAD=10.0.0.1 NNODES=4 NODE_RANK=0 launch/many_nodes.sh --arch resnet18 --output /shared/runs/first
#
#   HEAD        address of the machine with NODE_RANK=0, as the others reach it
#   NNODES      number of machines; the training starts when all have come and ends when one is lost
#   NODE_RANK   0 on HEAD, then 1, 2, ...
#   PORT        29400; free on HEAD, and open to the others
#   JOB_ID      dtrain; only machines that say the same meet
#   NPROC       processes on each machine; else one for each GPU, or for each core where there is no GPU
set -eu
: "${HEAD:?is the address of the machine with NODE_RANK=0}"
: "${NNODES:?is the number of machines}"
: "${NODE_RANK:?is 0 on HEAD, then 1, 2, ...}"

# An activated environment comes first, else the one that `make` has made.
command -v torchrun >/dev/null || PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH

# This machine's address on the way to HEAD. Told nothing, torch looks up the host name, which Debian's /etc/hosts
# answers with 127.0.1.1: machines would then wait for themselves. (UDP: nothing is sent.)
address=$(python3 -c 'import socket, sys
probe = socket.socket(type=socket.SOCK_DGRAM)
probe.connect((sys.argv[1], 9))
print(probe.getsockname()[0])' "$HEAD")

# For the same reason the rendezvous cannot find out by itself which machine HEAD is.
if [ "$NODE_RANK" -eq 0 ]; then is_host=1; else is_host=0; fi

# Ranks are given out as machines arrive, not by NODE_RANK: rank 0, which writes the run directory, may be anywhere, so
# --output should be on storage that all machines share. --max-restarts and the signals: see one_node.sh.
exec torchrun --nnodes="$NNODES" --nproc-per-node="${NPROC:-auto}" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${JOB_ID:-dtrain}" \
    --rdzv-conf="is_host=$is_host" --local-addr="$address" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m dtrain "$@"
