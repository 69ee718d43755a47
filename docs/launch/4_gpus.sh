#!/bin/bash
# The same step, its 16 problems divided among four GPUs of one machine. Further arguments are main.py's.
set -e
cd "$(dirname "$0")/../.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800  # seconds for a step and a checkpoint after Ctrl-C, instead of 30
torchrun --standalone --nproc_per_node 4 main.py --preset qwen2.5-1.5b "$@"
