"""What does a soft step cost? The same rows, the same number of steps, with and without mixtures, taking turns.

Left out on purpose: training, where a soft position only adds K - 1 gathered log-probs.

    python benchmarks/soft_step.py --rows 128 --tokens 48 --rounds 7
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import llms
import rldatasets
from rollout import generate
from soft_thinking import SoftThinking


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name", default="tiny")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7, help="timed, after two that are not")
    args = parser.parse_args()
    model, tokenizer = llms.load(args.model_name, dtype=llms.sampling_dtype())
    model.load_state_dict(type(model)(model.config).state_dict())  # random weights never write the closing tag
    problems = rldatasets.load_problems("arithmetic", "test", args.rows)
    prompts = [rldatasets.build_prompt(tokenizer, problem.question) for problem in problems]
    modes = {"normal": None} | {f"soft, K = {k}": SoftThinking(k=k, start="immediately") for k in (2, 3, 5)}
    seconds = {name: [] for name in modes}
    soft_share = {}
    for round_number in range(args.rounds + 2):
        for name, soft in modes.items():
            started = time.perf_counter()
            # No stop ids: every mode decodes the same number of row-steps.
            rollout = generate(
                model, tokenizer, prompts, max_new_tokens=args.tokens, soft=soft, stop_ids=[], seed=round_number
            )
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - started)
            soft_share[name] = rollout.is_soft.float().mean().item()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {model.device}, {model.dtype}")
    print(f"{args.rows} rows, {args.tokens} tokens each")
    normal = statistics.median(seconds["normal"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:12} median {1000 * median / args.tokens:6.2f} ms a step "
            f"(spread {1000 * min(times) / args.tokens:.2f}-{1000 * max(times) / args.tokens:.2f}), "
            f"{median / normal:.2f} of normal, {soft_share[name]:.0%} of positions soft"
        )


if __name__ == "__main__":
    main()
