#!/bin/sh
# Makes what is in this folder again. From the repo's root: sh plots/speed/reproduce.sh     (50 minutes; nothing else should run)
# vs_trl.py needs `pip install -r benchmarks/requirements.txt`.      (PYTHON=.venv/bin/python is the default)
set -e
PYTHON=${PYTHON:-.venv/bin/python}
run() {
    name=$1 script=$2
    shift 2
    $PYTHON benchmarks/$script "$@" --json plots/speed/$name.json > plots/speed/$name.txt
}
run vs_trl_tiny_1_thread vs_trl.py --threads 1 --rounds 7 --warmup 2
run vs_trl_tiny_2_threads vs_trl.py --threads 2 --rounds 7 --warmup 2
run vs_trl_real_vocabulary_1_thread vs_trl.py --threads 1 --rounds 5 --warmup 1 --variants defaults \
    --model_name real_vocabulary --problems_per_step 4 --max_completion_length 48
run decode_tiny_1_thread decode.py --threads 1 --rounds 7 --rows 8 --context 64
run decode_tiny_2_threads decode.py --threads 2 --rounds 7 --rows 8 --context 64
grow() { run growth_$1 $2 --threads 1 --model_name $3 $4; }
grow decode decode.py 1m "--rows 8 32 128 256 --context 64 256 1024 --rounds 5 --rollout_rows 8"
grow training training.py 1m "--rows 8 32 128 256 --lengths 64 256 --rounds 3"
vocabulary="--vocab_size 151936 --rounds 3"
grow decode_vocabulary decode.py 1m "$vocabulary --rows 8 32 128 256 --context 64 256 --rollout_rows 8"
grow training_vocabulary training.py 1m "$vocabulary --rows 8 16 32 64 --lengths 24 48"
grow decode_10m decode.py 10m "--rows 8 32 128 --context 64 256 --rounds 3 --rollout_rows 8"
grow decode_100m decode.py 100m "--rows 8 32 128 --context 64 256 --rounds 3 --rollout_rows 8"
grow decode_0.5b decode.py qwen2.5-0.5b "--rows 8 32 --context 64 256 --steps 4 --rounds 3 --rollout_rows 8 --max_new_tokens 8"
