#!/bin/sh
# Makes the pictures in this folder again, runs included: for three seeds, training, the control with shuffled
# advantages, and training with soft thinking.
# From the repo's root: sh plots/reproduce.sh       (PYTHON=.venv/bin/python is the default)
set -e
PYTHON=${PYTHON:-.venv/bin/python}
for seed in 0 1 2; do
    $PYTHON main.py --preset tiny --seed $seed --output_dir runs/seed$seed --overwrite_output_dir
    $PYTHON main.py --preset tiny --seed $seed --output_dir runs/control$seed --overwrite_output_dir \
        --control shuffled_advantages
    $PYTHON main.py --preset tiny --seed $seed --output_dir runs/soft$seed --overwrite_output_dir --soft_thinking
    $PYTHON soft_thinking.py --model_name runs/seed$seed/checkpoints/latest --num_problems 1024
    $PYTHON soft_thinking.py --model_name runs/soft$seed/checkpoints/latest --num_problems 1024
done
$PYTHON -m tracking.plotter runs/seed0 runs/seed1 runs/seed2 --control runs/control0 runs/control1 runs/control2 --output_dir plots
$PYTHON -m tracking.plotter runs/seed0 --output_dir plots/seed0
mkdir -p plots/metrics
for run in seed0 seed1 seed2 control0 control1 control2 soft0 soft1 soft2; do
    gzip -9 -n -c runs/$run/metrics.jsonl > plots/metrics/$run.jsonl.gz
done
