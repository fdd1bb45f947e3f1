#!/bin/sh
# Trains on several machines. Run the same command on each of them, with another NODE_RANK:
#
#   HEAD=10.0.0.1 NNODES=4 NODE_RANK=0 launch/many_nodes.sh --arch resnet18 --output /shared/runs/first
#
#   HEAD        address of the machine with NODE_RANK=0, as the others reach it
#   NNODES      number of machines; training starts when all have joined, and ends if one is lost
#   NODE_RANK   0 on HEAD, then 1, 2, ...
#   PORT        a port that is free on HEAD and that the others can reach; default 29400
#   JOB_ID      a name for the job; only machines with the same one join; default dtrain
#   NPROC       number of processes on each machine; by default one for each GPU, or for each core if there is no GPU
set -eu
: "${HEAD:?is the address of the machine with NODE_RANK=0}"
: "${NNODES:?is the number of machines}"
: "${NODE_RANK:?is 0 on HEAD, then 1, 2, ...}"

# Use torchrun of the activated environment, or else of the .venv that setup_env.sh has created.
command -v torchrun >/dev/null || PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH

# The address of this machine on the route to HEAD. By default torch looks up the host name, for which Debian's
# /etc/hosts has 127.0.1.1, so that each machine would wait for itself. Connecting a UDP socket sends nothing.
address=$(python3 -c 'import socket, sys
probe = socket.socket(type=socket.SOCK_DGRAM)
probe.connect((sys.argv[1], 9))
print(probe.getsockname()[0])' "$HEAD")

# For the same reason the rendezvous cannot tell by itself whether this machine is HEAD.
if [ "$NODE_RANK" -eq 0 ]; then is_host=1; else is_host=0; fi

# Ranks are assigned in the order in which machines join and not by NODE_RANK. So rank 0, which writes the run
# directory, may be on any machine, and --output should be on storage that all share. one_node.sh explains
# --max-restarts and the signals.
exec torchrun --nnodes="$NNODES" --nproc-per-node="${NPROC:-auto}" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${JOB_ID:-dtrain}" \
    --rdzv-conf="is_host=$is_host" --local-addr="$address" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m dtrain "$@"
