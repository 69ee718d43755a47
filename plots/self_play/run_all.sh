#!/bin/sh
# Makes what is in this folder, without what was tried before: one run after another, on one thread, two hours in all.
# From the repo's root: sh plots/self_play/run_all.sh [nim] [tictactoe] [debate]       (default: all of them)
# (PYTHON=.venv/bin/python is the default. A run that has ended, with its matrix.json, is not made again; one that was
# stopped goes on where it was.)
set -e
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1
run() {  # name, flags; the game is $game
    folder=runs/self-play/$game-$1
    shift
    [ -e "$folder/matrix.json" ] && return
    going_on=
    [ -e "$folder/checkpoints/latest" ] && going_on="--resume_from_checkpoint latest"
    $PYTHON self_play.py --game $game "$@" --output_dir "$folder" --save_steps 20 $going_on
}
for game in ${@:-nim tictactoe debate}; do
    for seed in 0 1 2; do run seed$seed --seed $seed; done
    for seed in 0 1 2; do
        [ $game = nim ] || [ $game$seed = debate0 ] || continue
        run shuffled$seed --seed $seed --control shuffled_advantages
    done
    case $game in
    nim)
        run self --opponents self
        run random --opponents random
        run ema --baseline ema ;;
    tictactoe)
        run long --max_steps 400 --eval_steps 40
        run long-self --max_steps 400 --eval_steps 40 --opponents self ;;
    esac
    mkdir -p plots/self_play/$game
    for folder in runs/self-play/$game-*; do
        name=$(basename "$folder")
        gzip -9 -n -c "$folder/metrics.jsonl" > plots/self_play/$game/${name#$game-}.jsonl.gz
    done
    cp runs/self-play/$game-seed0/matrix.json runs/self-play/$game-seed0/plots/matrix.png plots/self_play/$game/
    controls=$(ls -d runs/self-play/$game-shuffled* 2> /dev/null || true)
    $PYTHON -m tracking.plotter runs/self-play/$game-seed? ${controls:+--control $controls} \
        --output_dir plots/self_play/$game
done
