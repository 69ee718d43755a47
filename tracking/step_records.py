"""What a step of main.py writes down: a record for every row of the rollout, and the means of them.

A record is a line of samples.jsonl, and all that is left of a row once it is learned from. The means are a line of
metrics.jsonl; metrics.md explains them.
"""

import torch

import evaluator
import rldatasets


def rollout_records(rollout, rows, prompts, golds, weights, config) -> list[dict]:
    """What a rollout's rows are and what they scored, as samples.jsonl has it. rows: their numbers in the step."""
    entropy = (rollout.entropy * rollout.completion_mask).sum(dim=1) / rollout.lengths  # (B,) nats a token
    soft_steps = (rollout.is_soft & rollout.completion_mask).sum(dim=1)  # (B,)
    records = []
    for i, text in enumerate(rollout.texts):
        answer = rldatasets.prefilled(config.tags) * config.prefill + text
        scores = evaluator.score(answer, golds[i], {"accuracy": 0, "format": 0} | weights, config.tags)
        records.append({
            "row": rows[i],
            "prompt": prompts[i // config.group_size],
            "gold": golds[i],
            "completion": answer,
            "finish": rollout.finish[i],
            "length": int(rollout.lengths[i]),
            "soft_steps": int(soft_steps[i]),
            "mean_entropy": entropy[i].item(),
            "correct": scores["accuracy"] == 1,
            "format": scores["format"] == 1,
            **{f"reward/{name}": scores[name] for name in weights},
            "reward": evaluator.total(scores, weights),
        })  # fmt: skip
    return records


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
        **evaluator.behaviour_metrics([r["completion"] for r in records], lengths, finish, correct),
    }


def add_token_details(rows: list[dict], tokenizer, rollout, logprobs_after: torch.Tensor) -> None:
    """To the records of a rollout's first rows: their tokens, log-probs and entropies when they were sampled (nats),
    and the ratio of their probability after the step's updates to that. logprobs_after: (B, T, K)."""
    readable = (rollout.draws == rollout.trace_ids[..., None]).int().argmax(dim=-1, keepdim=True)  # (B, T, 1)
    before, after = (x.gather(-1, readable).squeeze(-1) for x in (rollout.logprobs, logprobs_after))  # (B, T)
    columns = {"logprobs": before, "entropy": rollout.entropy, "ratio": (after - before).exp()}
    for i, row in enumerate(rows):
        n = row["length"]
        row["tokens"] = [tokenizer.decode([token]) for token in rollout.trace_ids[i, :n].tolist()]
        row |= {name: rounded(column[i, :n]) for name, column in columns.items()}


def rounded(numbers: torch.Tensor) -> list[float]:
    return [round(number, 6) for number in numbers.tolist()]
