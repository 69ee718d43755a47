"""What a step of main.py logs: a record of every row of the rollout (samples.jsonl), and their means (metrics.jsonl).

docs/metrics.md explains the metrics.
"""

import torch

import evaluator
from analysis.tokens import token_texts
from engine import distributed
from rewards import judge
from rewards.functions import Rewards


def run_rewards(config) -> Rewards:
    """The rewards of a run, ready to be called. config: GRPOConfig. Raises ValueError, one line."""
    rewards = evaluator.parse_rewards(config.rewards, config.reward_timeout)
    if evaluator.JUDGE in rewards:
        rewards.functions[evaluator.JUDGE] = judge.make_judge(config)
    return rewards


def graded_records(
    rollout,
    problems,
    prompts: list[str],
    indices: list[int],
    config,
    rewards: Rewards | None = None,
    prompt_format=None,
) -> list[dict]:
    """Grades this process's rows -> the records of all processes' rows, in the order of the step.

    rollout: None without any problem here. problems, prompts: this process's. indices: where they stand among the
    step's problems (distributed.shard_indices).
    rewards: default, those of the config. prompt_format: what made the prompts; default: the config's, which knows no
    tokenizer. Raises RewardError on all processes when a reward fails on one.
    """
    G, prompt_format = config.group_size, prompt_format or config.prompt_format()
    rewards = run_rewards(config) if rewards is None else rewards
    records = []
    own = distributed.run_on_all(evaluator.grade, rollout, problems, rewards, prompt_format, prompts)
    for i, record in enumerate(own):
        position = {"row": indices[i // G] * G + i % G, "prompt": record["prompt"]}
        records.append(position | evaluator.without(record, "question", "top_weight", "tags"))
    return sorted(distributed.all_gather(records), key=lambda record: record["row"])


def metrics(records: list[dict], config) -> dict[str, float]:
    """What to log about the samples of a step. Fractions are 0-1, lengths are tokens, entropy is nats a token."""
    B, num_tokens = len(records), sum(r["length"] for r in records)
    groups = [records[start : start + config.group_size] for start in range(0, B, config.group_size)]
    lengths, finish, correct = ([r[name] for r in records] for name in ("length", "finish", "correct"))

    def mean(name):
        return sum(r[name] for r in records) / B

    return {
        "reward": mean("reward"),
        **{name: mean(name) for name in records[0] if name.startswith("reward/")},
        "accuracy": mean("correct"),
        "format_rate": mean("format"),
        "completion_length": num_tokens / B,
        "soft_share": sum(r["soft_steps"] for r in records) / num_tokens,
        "entropy": sum(r["mean_entropy"] * r["length"] for r in records) / num_tokens,
        "zero_std_groups": sum(len({r["reward"] for r in group}) == 1 for group in groups) / len(groups),
        **judge.metrics(records),
        **evaluator.behaviour_metrics([r["completion"] for r in records], lengths, finish, correct),
    }


def add_token_details(rows: list[dict], tokenizer, rollout, logprobs_after: torch.Tensor) -> None:
    """Adds token details to the records of a rollout's first rows: tokens, log-probs and entropies at sampling time
    (nats), and the ratio of each token's probability after the step's updates to before. logprobs_after: (B, T, K)."""
    readable = (rollout.draws == rollout.trace_ids[..., None]).int().argmax(dim=-1, keepdim=True)  # (B, T, 1)
    before, after = (x.gather(-1, readable).squeeze(-1) for x in (rollout.logprobs, logprobs_after))  # (B, T)
    columns = {"logprobs": before, "entropy": rollout.entropy, "ratio": (after - before).exp()}
    for i, row in enumerate(rows):
        n = row["length"]
        row["tokens"] = token_texts(tokenizer, rollout.trace_ids[i, :n].tolist())
        row |= {name: rounded(column[i, :n]) for name, column in columns.items()}


def rounded(numbers: torch.Tensor) -> list[float]:
    return [round(number, 6) for number in numbers.tolist()]


def samples(records: list[dict], advantages: torch.Tensor) -> list[dict]:
    """The rows of samples.jsonl: records with their advantages (B,)."""
    pairs = zip(records, rounded(advantages), strict=True)
    return [{"split": "train", **record, "advantage": advantage} for record, advantage in pairs]


def progress_note(metrics: dict[str, float]) -> str:
    return (
        f"reward {metrics['reward']:.2f}, accuracy {metrics['accuracy']:.0%}, "
        f"length {metrics['completion_length']:.0f}, {metrics['tokens_per_second']:.0f} tokens/s"
    )
