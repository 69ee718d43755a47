"""What does a training pass cost, in time and in memory, as rows, answers and vocabulary grow?

For every number of rows and every length limit, one rollout is sampled, and main.update then learns from it again and
again (learning rate 0, every row with an advantage). Shown: the tokens of all rows, each with its prompt, and how many
of them a second; useful TFLOP/s, and their share of what this machine's matrix products reach (MFU); the work factor;
the memory the update takes at its worst, beside what the logits of all answers at once would take. A least-squares
fit says how the time grows with the tokens that differ, where a prompt counts once for all its rows.

Useful is what has to be computed, forward and backward: three times the forward pass, no padding, no recomputation,
a prompt once for all its rows. Work factor: the multiplications really made in the model's matrices over the useful
ones. It is 1 without waste; padding, recomputed logits and prompts computed row by row make it larger.

Left out on purpose: the rollout (decode.py) and other people's trainers (vs_trl.py).

    python benchmarks/training.py                                                     # the tiny model
    python benchmarks/training.py --model_name 1m --vocab_size 151936 --rows 8 32 --lengths 48
    python benchmarks/training.py --model_name qwen2.5-1.5b --rows 32 128 --lengths 256 786 --mean_length 250 \\
        --tokens_per_micro_batch 8192                                                # a GPU
Flags that are not listed below are main.py's, as in step.py.
"""

import dataclasses
import statistics

import common
import torch
from common import show
from step import SETTINGS, Step, Task
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tracking.run_config import parse_config


def main(arguments):
    parser = common.argument_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128], help="a multiple of --group_size each")
    parser.add_argument("--lengths", type=int, nargs="+", default=[24, 72], help="limits of an answer's length")
    parser.add_argument("--mean_length", type=float, help="of answers, where weights are random")
    args, flags = parser.parse_known_args(arguments)
    device = common.prepare(args)
    config = parse_config([*SETTINGS, "--model_name", args.model_name, *flags])
    if any(rows < 1 or rows % config.group_size for rows in args.rows):
        raise ValueError(f"--rows {args.rows}: each must be a multiple of --group_size {config.group_size}")
    if min(args.lengths) < 1:
        raise ValueError(f"--lengths {args.lengths}: each must be at least 1")
    machine = common.measure_machine(device)
    common.show_machine(machine)
    step = Step(Task(config, args, device))
    model = step.task.policy
    print(f"{args.model_name}: {model.num_parameters() / 1e6:.1f}M parameters, {model.config.vocab_size} tokens\n")
    print(
        f"{'rows':>6}{'limit':>7}{'answer':>8}{'tokens':>9}  {'an update':<24}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>6}"
        f"{'work':>6}{'memory':>10}{'all logits':>12}"
    )
    points = []
    for limit in args.lengths:
        for rows in args.rows:
            step.task.config = dataclasses.replace(
                config, problems_per_step=rows // config.group_size, max_completion_length=limit
            )
            points.append(measure(step, machine, args))
            print_row(points[-1])
    results = {"machine": machine, "config": dataclasses.asdict(config), "points": points, "fit": fit(points)}
    common.write_json(args, results)


def measure(step: Step, machine: dict, args) -> dict:
    """One row of the table: updates on one rollout."""
    rollout = step.sample(0)
    lengths, prompts = rollout.lengths.tolist(), [len(ids) for ids in rollout.prompt_ids]
    advantages = torch.ones(len(lengths), device=step.task.device)
    advantages[::2] = -1.0

    def update(_=None):
        step.update(rollout, advantages)

    times = common.repeat(update, args.rounds, args.warmup, step.task.device)
    with matrix_counter() as counter:
        update()
    increase = common.PeakMemory(step.task.device).of(update)
    work = common.Work(step.task.policy)
    group_size, tokens = step.task.config.group_size, sum(lengths) + sum(prompts)
    useful, median = work.update(prompts, lengths, group_size), statistics.median(times)
    return {
        "rows": len(lengths),
        "limit": step.task.config.max_completion_length,
        "mean_length": statistics.mean(lengths),
        "tokens": tokens,
        "different_tokens": sum(lengths) + sum(prompts[::group_size]),
        "seconds": times,
        "tokens_per_second": tokens / median,
        "useful_flops": useful / median,
        "mfu": useful / median / machine["flops"],
        "work_factor": matrix_flops(counter) / work.update(prompts, lengths, group_size, attention=False),
        "memory_increase": increase,
        "memory_of_all_logits": 4 * sum(lengths) * step.task.policy.config.vocab_size,
    }


MATRIX_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def matrix_counter() -> FlopCounterMode:
    """Counts the products with the model's matrices and nothing else: attention is not counted on every device, and the
    formula for the flash kernel refuses fewer key heads than query heads in torch 2.11."""
    others = {operation: lambda *args, **options: 0 for operation in flop_registry if operation not in MATRIX_PRODUCTS}
    return FlopCounterMode(display=False, custom_mapping=others)


def matrix_flops(counter: FlopCounterMode) -> float:
    """Of the products with the model's matrices."""
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(operation, 0) for operation in MATRIX_PRODUCTS)


def print_row(p: dict) -> None:
    print(
        f"{p['rows']:6}{p['limit']:7}{p['mean_length']:8.1f}{p['tokens']:9}  {show(p['seconds'], digits=3):<24}"
        f"{p['tokens_per_second']:10.0f}{p['useful_flops'] / 1e12:9.3f}{p['mfu']:6.0%}{p['work_factor']:6.2f}"
        f"{p['memory_increase'] / 2**20:6.0f} MiB{p['memory_of_all_logits'] / 2**20:8.0f} MiB"
    )


def fit(points: list[dict]) -> dict | None:
    """Time of an update = constant + a x tokens, prompts counted once. Prints it; None when the points are too few."""
    columns = {"tokens": [p["different_tokens"] for p in points]}
    try:
        line = common.linear_fit(columns, [statistics.median(p["seconds"]) for p in points])
    except ValueError as error:
        print(f"no fit: {error}")
        return None
    print(
        f"fit: {line['constant']:.3f} s + {1e6 * line['tokens']:.2f} us a token, prompts counted once, "
        f"R^2 = {line['r2']:.4f}"
    )
    return line


if __name__ == "__main__":
    common.run("training.py", main)
