"""Three ways to a reasoning student at the same cost: the teacher's answers, the teacher's judgement, or RL by itself.

    sft    distill.py's default: the teacher answers, the filter checks, the student learns to write what passed
    rkl    the student answers, the teacher says at every token what it would have said (reverse KL, all on-policy);
           nothing is checked, and the teacher's own answers are not needed
    grpo   main.py on the student: no teacher at all

Cost is CPU time of this process on one thread, which other programs on the machine disturb less than the clock does.
It includes sampling by the teacher (sft) and by the student (rkl, grpo), and not the training of the teacher, nor
pictures and evaluation. How much each does is set below so that all take about the same; what they really took is
printed. Every learning rate was the best of two or three on seed 0, which is not among the default seeds.

    python benchmarks/distill_comparison.py --teacher_name runs/tiny/checkpoints/latest --output_dir runs/comparison
"""

import argparse
import dataclasses
import itertools
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import evaluator
import llms
import main
import rldatasets
from distillation.config import PRESETS, DistillConfig
from tracking import plotter, run_config, run_folder

SFT_PROBLEMS, SFT_LEARNING_RATE = 2048, 1e-3  # three epochs
RKL_STEPS, RKL_LEARNING_RATE = 55, 1e-3  # of 64 answers
GRPO_STEPS, GRPO_LEARNING_RATE = 40, 4e-4  # of 32 x 8 answers, four optimizer steps each


def sft(config: DistillConfig, folder: Path) -> Path:
    distill.run(dataclasses.replace(config, output_dir=str(folder), stage="train", control="none"))
    return folder / "train" / "distilled" / "checkpoints" / "latest"


def rkl(config: DistillConfig, folder: Path) -> Path:
    problems = rldatasets.load_problems("arithmetic", "train", config.train_problems)
    questions = [{**dataclasses.asdict(problem), "completion": "", "ids": None} for problem in problems]
    config = dataclasses.replace(
        config, loss="rkl", on_policy_fraction=1.0, learning_rate=RKL_LEARNING_RATE,
        epochs=RKL_STEPS * config.batch_size / len(questions),
    )  # fmt: skip
    distill.train_student(config, config.model_name, questions, folder)
    return folder / "checkpoints" / "latest"


def grpo(config: DistillConfig, folder: Path) -> Path:
    own = dict(
        model_name=config.model_name, max_steps=GRPO_STEPS, learning_rate=GRPO_LEARNING_RATE, seed=config.seed,
        output_dir=str(folder), eval_steps=GRPO_STEPS, save_steps=GRPO_STEPS, eval_problems=1,
    )  # fmt: skip
    main.train(run_config.GRPOConfig(**run_config.PRESETS["tiny"] | own))
    return folder / "checkpoints" / "latest"


METHODS = {"sft": sft, "rkl": rkl, "grpo": grpo}


def measure(model_name: str, num_problems: int) -> dict[str, float]:
    model, tokenizer = llms.load(model_name)
    problems = rldatasets.load_problems("arithmetic", "test", num_problems)
    sampled, greedy = (evaluator.evaluate(model, tokenizer, problems, temperature=t, max_new_tokens=72) for t in (1, 0))
    kept = ("accuracy", "accuracy_low", "accuracy_high", "format_rate", "length")
    return {name: sampled[name] for name in kept} | {"greedy": greedy["accuracy"], "n": sampled["n"]}


def compare(args) -> None:
    torch.set_num_threads(1)
    plotter.plot_run = lambda folder: None
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    log = run_folder.JsonLines(folder / "comparison.jsonl")  # a comparison that was stopped goes on after its last row
    log.replace(log.read())
    if not log.read():
        log.append({"method": "untrained", "seed": 0, "seconds": 0.0, **measure("tiny_student", args.eval_problems)})
    for seed, name in itertools.product(args.seeds, METHODS):
        if any((row["seed"], row["method"]) == (seed, name) for row in log.read()):
            continue
        config = DistillConfig(
            **PRESETS["tiny"]
            | dict(teacher_name=args.teacher_name, seed=seed)
            | dict(train_problems=SFT_PROBLEMS, learning_rate=SFT_LEARNING_RATE)
        )
        place = folder / f"{name}-{seed}"
        shutil.rmtree(place, ignore_errors=True)
        started = time.process_time()
        model = METHODS[name](config, place)
        seconds = time.process_time() - started
        log.append({"method": name, "seed": seed, "seconds": seconds, **measure(str(model), args.eval_problems)})

    print(f"\n{'':9} {'seed':>4} {'CPU s':>6} {'sampled, %':>18} {'greedy':>6} {'format':>6} {'tokens':>6}")
    for row in log.read():
        interval = f"{100 * row['accuracy']:.1f} [{100 * row['accuracy_low']:.1f}, {100 * row['accuracy_high']:.1f}]"
        print(
            f"{row['method']:9} {row['seed']:4} {row['seconds']:6.1f} {interval:>18} {100 * row['greedy']:6.1f} "
            f"{100 * row['format_rate']:6.1f} {row['length']:6.1f}"
        )
    print(f"{args.eval_problems} test problems, 95 % Wilson intervals; also in {log.file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare sft, on-policy reverse KL and GRPO on the tiny student.")
    parser.add_argument("--teacher_name", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--eval_problems", type=int, default=1024)
    compare(parser.parse_args())
