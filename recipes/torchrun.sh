#!/usr/bin/env bash
# The line in which every launcher ends: one process for each GPU of this machine (one on a machine without).
#     bash recipes/torchrun.sh --data shards --run runs/first
# torchrun reads its options from variables: PET_NNODES, PET_NPROC_PER_NODE, PET_RDZV_ENDPOINT and so on (--nnodes, …).
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd) # and stay: --data and --run may be relative to where the command is typed

if [ -z "${PET_NPROC_PER_NODE:-}" ]; then
  PET_NPROC_PER_NODE=1
  if nvidia-smi -L >/dev/null 2>&1; then PET_NPROC_PER_NODE=gpu; fi
fi
[ -n "${PET_RDZV_ENDPOINT:-}${PET_MASTER_ADDR:-}" ] || export PET_STANDALONE=1
# torchrun hands on to its processes only the signals named here, and kills them this many seconds later: long enough for
# a checkpoint, and a job that lost a process still ends within a minute.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-45}
# A machine that joins a restarted job waits for an address that is published only once, unless each round has a new one.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # train.py itself takes the cores of its process
export PET_NPROC_PER_NODE
exec "${PYTHON:-python3}" -m torch.distributed.run -- "$checkout/fasttrain/train.py" "$@"
