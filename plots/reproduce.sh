#!/bin/sh
# Makes the pictures in this folder again, runs included: for three seeds, training, the control with shuffled
# advantages, and training with soft thinking.
# From the repo's root: sh plots/reproduce.sh       (PYTHON=.venv/bin/python is the default)
set -e
PYTHON=${PYTHON:-.venv/bin/python}
train() {  # name, seed, flags
    name=$1 seed=$2
    shift 2
    $PYTHON main.py --preset tiny --eval_problems 1024 --seed $seed --output_dir runs/$name$seed --overwrite_output_dir "$@"
}
for seed in 0 1 2; do
    train seed $seed
    train control $seed --control shuffled_advantages
    train soft $seed --soft_thinking
    $PYTHON soft_thinking.py --model_name runs/seed$seed/checkpoints/latest --num_problems 1024
    $PYTHON soft_thinking.py --model_name runs/soft$seed/checkpoints/latest --num_problems 1024
done
$PYTHON -m tracking.plotter runs/seed0 runs/seed1 runs/seed2 --control runs/control0 runs/control1 runs/control2 --output_dir plots
$PYTHON -m tracking.plotter runs/seed0 --output_dir plots/seed0
mkdir -p plots/metrics
for run in seed0 seed1 seed2 control0 control1 control2 soft0 soft1 soft2; do
    gzip -9 -n -c runs/$run/metrics.jsonl > plots/metrics/$run.jsonl.gz
done
