#!/bin/sh
# Makes what is in this folder again. From the repo's root: sh plots/distill/reproduce.sh
# (PYTHON=.venv/bin/python is the default; the sweep takes most of the time)
set -e
PYTHON=${PYTHON:-.venv/bin/python}
# The default run. In a fresh clone it trains its teacher by itself; else it would take the newest run of main.py.
$PYTHON distill.py --preset tiny --output_dir runs/distill0 --overwrite_output_dir
cp runs/distill0/report/distill.json runs/distill0/report/distill.png plots/distill/
teacher=runs/distill0/teacher/checkpoints/step-60
for seed in 1 2; do
    $PYTHON distill.py --preset tiny --teacher_name $teacher --seed $seed --output_dir runs/distill$seed \
        --overwrite_output_dir
    cp runs/distill$seed/report/distill.json plots/distill/seed$seed.json
done
# The same with a twin that learns unchecked answers.
for seed in 0 1 2; do
    $PYTHON distill.py --preset tiny --control unfiltered --teacher_name $teacher --seed $seed \
        --output_dir runs/unfiltered$seed --overwrite_output_dir
    cp runs/unfiltered$seed/report/distill.json plots/distill/unfiltered_seed$seed.json
done
OMP_NUM_THREADS=1 $PYTHON benchmarks/distill_comparison.py --teacher_name $teacher --output_dir runs/comparison
cp runs/comparison/comparison.jsonl plots/distill/
# The sweep, with the first seed of plots/reproduce.sh as its teacher. From random weights students need several times
# the steps.
$PYTHON main.py --preset tiny --seed 0 --output_dir runs/seed0 --overwrite_output_dir
$PYTHON distill.py sweep --preset tiny --teacher_name runs/seed0/checkpoints/step-100 --output_dir runs/sweep \
    --overwrite_output_dir --train_problems 8192 --problems_per_step 128 --epochs 7 --batch_size 32 --warmup_steps 50 \
    --sweep_students "layers=3,width=32;layers=4,width=48;layers=4,width=64;layers=4,width=96;layers=4,width=128"
cp runs/sweep/sweep/sweep.json runs/sweep/sweep/sweep.png plots/distill/
