#!/bin/sh
# Makes what is in this folder again (the sweep), and three seeds of the default run and the comparison at equal cost.
# From the repo's root: sh plots/distill/reproduce.sh       (PYTHON=.venv/bin/python is the default)
set -e
PYTHON=${PYTHON:-.venv/bin/python}
# The teacher: the first seed of plots/reproduce.sh. (Without one, distill.py trains a shorter one by itself.)
$PYTHON main.py --preset tiny --seed 0 --output_dir runs/seed0 --overwrite_output_dir
teacher=runs/seed0/checkpoints/step-100
for seed in 0 1 2; do
    $PYTHON distill.py --preset tiny --teacher_name $teacher --seed $seed --output_dir runs/distill$seed \
        --overwrite_output_dir
    cp runs/distill$seed/report/distill.json plots/distill/seed$seed.json
done
cp runs/distill0/report/distill.png plots/distill/
# From random weights students need several times the steps.
$PYTHON distill.py sweep --preset tiny --teacher_name $teacher --output_dir runs/sweep --overwrite_output_dir \
    --train_problems 8192 --problems_per_step 128 --epochs 7 --batch_size 32 --warmup_steps 50 \
    --sweep_students "layers=3,width=32;layers=4,width=48;layers=4,width=64;layers=4,width=96;layers=4,width=128"
cp runs/sweep/sweep/sweep.json runs/sweep/sweep/sweep.png plots/distill/
OMP_NUM_THREADS=1 $PYTHON benchmarks/distill_comparison.py --teacher_name $teacher --output_dir runs/comparison
cp runs/comparison/comparison.jsonl plots/distill/
