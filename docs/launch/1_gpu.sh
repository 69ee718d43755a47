#!/bin/bash
# Qwen2.5-1.5B-Instruct on GSM8K, one 80 GB GPU. Further arguments are main.py's.
set -e
cd "$(dirname "$0")/../.."
python main.py --preset qwen2.5-1.5b --doctor "$@"
python main.py --preset qwen2.5-1.5b "$@"
