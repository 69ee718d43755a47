"""What the rewards and objectives of docs/rewards.md do on the embedded model, each beside its control.

    OMP_NUM_THREADS=1 python plots/rewards/run.py train                # all runs, in turn; finished ones stay
    OMP_NUM_THREADS=1 python plots/rewards/run.py train judge rule     # some of them
    python plots/rewards/run.py show                                   # pictures and table from the committed logs

The weak judge is the embedded model itself, trained for a minute to say which of two answers of the untrained policy is
the right one. A policy that is trained against it alone leaves the answers that it knows.

A judged reward is a share of wins within the group, so its mean is 0.5 whatever the policy does. What the judge thinks
of the policy as a whole is measured afterwards: it compares the answers of each checkpoint with those of the untrained
policy to the same problems.

The runs share everything but the flags below: 30 steps of 16 problems x 8 answers, one seed. So a difference between
two runs is an illustration and no result; docs/study.md compares with five seeds.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RUNS = ROOT / "runs" / "rewards"  # not committed
JUDGE = RUNS / "weak_judge"
SETTINGS = (
    "--preset tiny --seed 0 --max_steps 30 --problems_per_step 16 --group_size 8 --final_lr_fraction 1 --eval_steps 10 "
    "--eval_problems 256 --save_steps 30 --save_total_limit 1 --overwrite_output_dir"
).split()
CHECKPOINTS = ["--save_steps", "5", "--save_total_limit", "10"]
VARIANTS = {
    "rule": ["--rewards", "accuracy", *CHECKPOINTS],
    "judge": ["--rewards", "judge", "--judge_model", str(JUDGE), *CHECKPOINTS],
    "random_judge": ["--rewards", "judge", "--judge_model", "random", *CHECKPOINTS],
    "both": [],  # the preset's own rewards: accuracy and format
    "brevity": ["--rewards", f"accuracy:1,format:0.5,{HERE / 'brevity.py'}:brevity:0.2"],
    "dynamic_sampling": ["--dynamic_sampling", "2"],
    "lora": ["--lora_rank", "16", "--learning_rate", "1.5e-3"],
    "leave_one_out": ["--advantage_baseline", "leave_one_out"],
    "pass_at_4": ["--pass_at_k", "4"],
    "clip_delta": ["--clip_delta", "4", "--updates_per_rollout", "2"],
    "clip_plain": ["--updates_per_rollout", "2"],
    "top_entropy": ["--top_entropy", "0.2"],
}
JUDGED = {"judge": "weak judge alone", "random_judge": "random judge", "rule": "rule (accuracy)"}
JUDGE_METRICS = {"judge/agreement": "agreement", "judge/ties": "ties", "judge/position_bias": "position bias"}
ROWS = 16 * 8  # of a step
KEPT = (
    "step", "reward", "reward/judge", "reward/accuracy", "reward/format", "reward/brevity", "accuracy", "format_rate",
    "completion_length", "entropy", "zero_std_groups", "judge/ties", "judge/position_bias", "judge/agreement",
    "judge/failed", "replaced_groups", "sampled_tokens", "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high",
    "eval/accuracy_greedy", "eval/format_rate", "eval/length", "eval/n", "clip_frac", "grad_norm",
)  # fmt: skip


# ---------------------------------------------------------------- the weak judge


def train_judge(steps: int = 60, batch: int = 32, learning_rate: float = 1e-3) -> None:
    """Trains the judge on pairs of one right and one wrong answer of the untrained policy, in random order, and prints
    how many of 128 other pairs it gets right in both orders."""
    import torch

    import evaluator
    import llms
    import rldatasets
    from rewards.judge import ModelVerdicts
    from rollout import generate
    from tracking.run_config import PRESETS, GRPOConfig

    config = GRPOConfig(**PRESETS["tiny"])
    policy, tokenizer = llms.load("tiny")
    problems, pairs, rng = rldatasets.generate_arithmetic("validation", 800), [], random.Random(0)
    for start in range(0, len(problems), 100):
        some = problems[start : start + 100]
        prompts = [config.prompt_format(tokenizer).prompt(tokenizer, problem.question) for problem in some]
        rollout = generate(policy, tokenizer, prompts, **config.sampling(), seed=start)
        records = evaluator.grade(rollout, some, {}, config.prompt_format(tokenizer))
        for first in range(0, len(records), config.group_size):
            group = records[first : first + config.group_size]
            right, wrong = ([r["completion"] for r in group if r["correct"] == value] for value in (True, False))
            if right and wrong:
                pairs.append((group[0]["question"], rng.choice(right), rng.choice(wrong)))
    verdicts = ModelVerdicts("tiny", config)
    verdicts.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(verdicts.model.parameters(), lr=learning_rate, weight_decay=0.0)
    training, held_out = pairs[:-128], pairs[-128:]
    for step in range(steps):
        labels = [rng.randrange(2) for _ in range(batch)]
        chosen = rng.sample(training, batch)
        questions = [
            (q, wrong, right) if label else (q, right, wrong)
            for (q, right, wrong), label in zip(chosen, labels, strict=True)
        ]
        logprobs = verdicts.logprobs(questions)  # (batch, 2)
        loss = -logprobs[torch.arange(batch), labels].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"judge: step {step + 1}, loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        forward, backward = (
            verdicts([(q, a, b) if order else (q, b, a) for q, a, b in held_out]) for order in (True, False)
        )
    outcomes = list(zip(forward, backward, strict=True))
    right, wrong = outcomes.count((0, 1)), outcomes.count((1, 0))
    text = (
        f"{len(training)} pairs to train on; of {len(held_out)} others, in both orders: right {right}, wrong {wrong}, "
    )
    text += f"tie {len(held_out) - right - wrong}"
    print(text)
    verdicts.model.save_pretrained(JUDGE)
    tokenizer.save_pretrained(JUDGE)
    (HERE / "metrics").mkdir(exist_ok=True)
    (HERE / "metrics" / "judge.txt").write_text(text + "\n", encoding="utf-8")


def measure_preference(name: str, num_problems: int = 256) -> None:
    """What the weak judge thinks of each checkpoint of the run: the share of wins against the untrained policy, one
    answer to each test problem, beside accuracy and length -> metrics/NAME-preference.jsonl."""
    import torch

    import evaluator
    import llms
    import rldatasets
    from rewards.judge import Judge, ModelVerdicts
    from tracking.run_config import PRESETS, GRPOConfig

    config = GRPOConfig(**PRESETS["tiny"])
    problems = rldatasets.generate_arithmetic("test", num_problems)
    judge, rows, base = Judge(ModelVerdicts(str(JUDGE), config)), [], None
    for step in range(0, 31, 5):
        model, tokenizer = llms.load(str(RUNS / name / "checkpoints" / f"step-{step}") if step else "tiny")
        measured = evaluator.evaluate(model, tokenizer, problems, temperature=1.0, **config.answering(tokenizer))
        records = measured["records"]
        base = base or records
        with torch.no_grad():
            wins = [share for share, _ in judge([[r, b] for r, b in zip(records, base, strict=True)])]
        row = {"step": step, "preferred": sum(wins) / len(wins), "ties": wins.count(0.5) / len(wins)}
        row |= {key: measured[key] for key in ("accuracy", "accuracy_low", "accuracy_high", "length")}
        rows.append({key: round(value, 4) for key, value in row.items()})
        print(rows[-1], flush=True)
    write_rows(f"{name}-preference", rows)


# ---------------------------------------------------------------- the runs


def write_rows(name: str, rows: list[dict]) -> None:
    target = HERE / "metrics" / f"{name}.jsonl"
    target.parent.mkdir(exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(names: list[str]) -> None:
    for name in names:
        if (HERE / "metrics" / f"{name}.jsonl").exists():
            continue
        if name in JUDGED and not JUDGE.exists():
            train_judge()
        command = [sys.executable, "main.py", *SETTINGS, *VARIANTS[name], "--output_dir", str(RUNS / name)]
        subprocess.run(command, cwd=ROOT, check=True)
        rows = [json.loads(line) for line in (RUNS / name / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items() if k in KEPT} for row in rows]
        if name in JUDGED:
            measure_preference(name)
        write_rows(name, kept)


# ---------------------------------------------------------------- the pictures


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / "metrics" / f"{name}.jsonl").read_text().splitlines()]


def judge_figure():
    from matplotlib.figure import Figure

    from tracking import plotter

    panels = (
        ("preferred", "Weak judge: better than untrained"), ("accuracy", "True accuracy, test"),
        ("length", "Tokens of an answer"),
    )  # fmt: skip
    figure = Figure(figsize=(plotter.WIDTH, 3.0), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for (name, label), color in zip(JUDGED.items(), (plotter.VERMILLION, plotter.GREY, plotter.BLUE), strict=True):
            rows = rows_of(f"{name}-preference")
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], "o-", color=color, label=label)
        axes.set(title=title, xlabel="step", ylim=(0, None if key == "length" else 1))
    axes.legend(frameon=False, title="trained on")
    return figure


def show() -> None:
    from matplotlib import rc_context

    from tracking import plotter

    done = [name for name in VARIANTS if (HERE / "metrics" / f"{name}.jsonl").exists()]
    with rc_context(plotter.STYLE):
        plotter.save({"judge.png": judge_figure()}, HERE)

    lines = ["| run | accuracy, sampled | greedy | length | tokens sampled | |", "|---|---|---|---|---|---|"]
    for name in done:
        rows = rows_of(name)
        last, training = rows[-1], [row for row in rows if "reward" in row]
        interval = f"[{last['eval/accuracy_low']:.1%}, {last['eval/accuracy_high']:.1%}]"
        tokens = sum(row.get("sampled_tokens", row["completion_length"] * ROWS) for row in training)
        replaced = sum(row.get("replaced_groups", 0) for row in training)
        notes = [f"{replaced} groups replaced"] if replaced else []
        for key, what in JUDGE_METRICS.items():
            if key in training[0]:
                end = f"{training[-1][key]:.2f}" if key in training[-1] else "undefined, no answer is right"
                notes.append(f"{what} {training[0][key]:.2f} to {end}")
        lines.append(
            f"| {name} | {last['eval/accuracy']:.1%} {interval} | {last['eval/accuracy_greedy']:.1%} "
            f"| {last['eval/length']:.1f} | {tokens:,.0f} | {'; '.join(notes)} |"
        )
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["train"] and set(sys.argv[2:]) <= set(VARIANTS):
        train(sys.argv[2:] or list(VARIANTS))
    elif sys.argv[1:] == ["show"]:
        show()
    else:
        sys.exit(f"usage: run.py train [{' | '.join(VARIANTS)}], or run.py show")
