#!/bin/bash
# Qwen2.5-7B-Instruct, eight 80 GB GPUs of one machine, with accelerate's launcher: fp32 weights, gradients and moments
# are divided (--fsdp). Further arguments are main.py's.
set -e
cd "$(dirname "$0")/../.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800  # seconds for a step and a checkpoint after Ctrl-C, instead of 30
accelerate launch --multi_gpu --num_machines 1 --num_processes 8 --mixed_precision no --dynamo_backend no main.py \
    --preset qwen2.5-1.5b --model_name Qwen/Qwen2.5-7B-Instruct --fsdp --gradient_checkpointing \
    --output_dir runs/qwen2.5-7b "$@"
