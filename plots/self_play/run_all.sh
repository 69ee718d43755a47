#!/bin/sh
# Makes what is in this folder: three seeds of each game, and the controls, one run after another on one thread.
# From the repo's root: sh plots/self_play/run_all.sh [nim] [tictactoe] [debate]       (default: all of them)
# (PYTHON=.venv/bin/python is the default. A run that has ended, with its matrix.json, is not made again; one that was
# stopped goes on where it was.)
set -e
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1
run() {  # name, flags
    folder=runs/self-play/$1
    shift
    [ -e "$folder/matrix.json" ] && return
    going_on=
    [ -e "$folder/checkpoints/latest" ] && going_on="--resume_from_checkpoint latest"
    $PYTHON self_play.py "$@" --output_dir "$folder" --save_steps 20 $going_on
}
for game in ${@:-nim tictactoe debate}; do
    for seed in 0 1 2; do
        run $game-seed$seed --game $game --seed $seed
        run $game-shuffled$seed --game $game --seed $seed --control shuffled_advantages
    done
    run $game-self --game $game --opponents self
    run $game-random --game $game --opponents random
    run $game-ema --game $game --baseline ema
    mkdir -p plots/self_play/$game
    for folder in runs/self-play/$game-*; do
        name=$(basename "$folder")
        gzip -9 -n -c "$folder/metrics.jsonl" > plots/self_play/$game/${name#$game-}.jsonl.gz
    done
    cp runs/self-play/$game-seed0/matrix.json runs/self-play/$game-seed0/plots/matrix.png plots/self_play/$game/
    $PYTHON -m tracking.plotter runs/self-play/$game-seed0 runs/self-play/$game-seed1 runs/self-play/$game-seed2 \
        --control runs/self-play/$game-shuffled0 runs/self-play/$game-shuffled1 runs/self-play/$game-shuffled2 \
        --output_dir plots/self_play/$game
done
