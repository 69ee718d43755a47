#!/bin/sh
# Makes what is in this folder. From the repo's root: sh plots/pipeline/reproduce.sh [tiny] [smollm2] [smollm2_gpu] [gsm8k]
# tiny, the default, takes 9 minutes a seed on two quiet cores; smollm2 (after `make smollm2`) hours, gsm8k one, smollm2_gpu
# four minutes of an H100.
# (PYTHON=.venv/bin/python is the default. Stages that have ended are not made again.)
set -e
PYTHON=${PYTHON:-.venv/bin/python}
keep() {  # the tables and the picture of a pipeline's folder, under another name
    for kind in md json png; do cp "$1/report/pipeline.$kind" "plots/pipeline/$2.$kind"; done
}
logs() {  # the logs of a pipeline's stages
    for log in "$1"/*/metrics.jsonl; do
        gzip -9 -n -c "$log" > "plots/pipeline/$2/$(basename "$(dirname "$log")").jsonl.gz"
    done
}
for what in ${@:-tiny}; do
    case $what in
    tiny)
        for seed in 0 1 2; do
            $PYTHON pipeline.py --seed $seed --eval_samples 8 --output_dir runs/pipeline-seed$seed
            keep runs/pipeline-seed$seed tiny/seed$seed
        done ;;
    smollm2)
        $PYTHON pipeline.py --preset smollm2-135m --controls shuffled --output_dir runs/pipeline-smollm2
        keep runs/pipeline-smollm2 smollm2-135m/pipeline
        logs runs/pipeline-smollm2 smollm2-135m ;;
    smollm2_gpu)
        $PYTHON pipeline.py --preset smollm2-135m --controls none --rl_steps 60 --train_problems 8192 --eval_samples 4 \
            --save_steps 200 --tokens_per_micro_batch 16384 --output_dir runs/pipeline-smollm2-gpu
        keep runs/pipeline-smollm2-gpu smollm2-135m-h100/pipeline
        logs runs/pipeline-smollm2-gpu smollm2-135m-h100 ;;
    gsm8k)
        $PYTHON pipeline.py rl --preset smollm2-135m --dataset_name gsm8k --max_prompt_length 300 \
            --max_completion_length 160 --problems_per_step 4 --cold_start_examples 256 --rl_steps 30 \
            --eval_problems 64 --output_dir runs/pipeline-gsm8k
        cp runs/pipeline-gsm8k/rl/plots/*_score.png plots/pipeline/smollm2-135m-gsm8k/
        logs runs/pipeline-gsm8k smollm2-135m-gsm8k ;;
    *) echo "$what: give tiny, smollm2, smollm2_gpu or gsm8k" >&2; exit 2 ;;
    esac
done
