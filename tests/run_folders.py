"""Hand-written rows of metrics.jsonl and samples.jsonl, and run folders made of them."""

import json

import evaluator
from tracking import run_folder


def train_row(step, problem=0, answer=0, text="<answer>1</answer>", tokens=None, **values):
    row = {
        "step": step, "split": "train", "prompt": f"problem {problem} of step {step}?", "gold": "1", "completion": text,
        "finish": "stop", "length": 5, "reward/accuracy": float(answer % 2), "reward/format": 1.0,
        "reward": answer % 2 + 0.5, "advantage": answer % 2 - 0.5,
    }  # fmt: skip
    if tokens:
        n = len(tokens)
        row |= {"tokens": tokens, "logprobs": [-0.5] * n, "entropy": [1.0] * n, "ratio": [1.25] * n}
    return row | values


def eval_row(step, text="<answer>2</answer>", question="What is 1 + 1?", **values):
    return {
        "step": step, "split": "test", "question": question, "gold": "2", "completion": text, "finish": "stop",
        "length": 4, "soft_steps": 0, "top_weight": 1.0, "correct": True, "format": True,
    } | values  # fmt: skip


def evaluation(step, accuracy, n=100):
    low, high = evaluator.wilson_interval(accuracy * n, n)
    values = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "accuracy_greedy": accuracy, "n": n}
    return {"step": step} | {f"eval/{name}": value for name, value in values.items()}


def metric_rows(steps=8, **late):
    """Rows of a run that passes every check, except that the second half has the values of `late`."""
    values = {
        "reward": 1.0, "accuracy": 0.6, "format_rate": 0.95, "entropy": 0.5, "zero_std_groups": 0.2,
        "truncated_rate": 0.01, "logprob_gap": 1e-6, "kl": 0.01, "skipped_updates": 0, "completion_length": 50,
        "loop_rate": 0.0, "repetition": 0.02, "grad_norm": 0.1, "clip_frac": 0.01, "updates": 4,
    }  # fmt: skip
    return [{"step": step} | values | (late if step > steps // 2 else {}) for step in range(1, steps + 1)]


def write_run(folder, rows=(), samples=(), **settings):
    """A run's folder as main.py leaves it."""
    folder.mkdir(exist_ok=True)
    config = {"preset": "tiny", "max_steps": 8, "problems_per_step": 32, "group_size": 2} | settings
    (folder / "args.json").write_text(json.dumps({"config": config, "versions": {"torch": "2"}, "device": "cpu"}))
    run_folder.JsonLines(folder / "metrics.jsonl").append(*rows)
    run_folder.JsonLines(folder / "samples.jsonl").append(*samples)
    return folder
