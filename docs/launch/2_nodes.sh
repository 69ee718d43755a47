#!/bin/bash
# Two machines with eight GPUs each; run this on both, with the name of the first one in HEAD. They need to see the same
# output_dir: all processes read checkpoints, the first one writes them. Further arguments are main.py's.
#
#     HEAD=node0 bash docs/launch/2_nodes.sh --output_dir /shared/run
set -e
cd "$(dirname "$0")/../.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800  # seconds for a step and a checkpoint after Ctrl-C, instead of 30
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint "${HEAD:?the first machine}:29500" \
    --rdzv_id r1 main.py --preset qwen2.5-1.5b --problems_per_step 64 "$@"
