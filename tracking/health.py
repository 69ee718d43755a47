"""Health checks of a run: each reads the rows of metrics.jsonl and returns one Finding, or None without data.

To add a check, write a function rows -> Finding | None and put it into CHECKS. The thresholds are rules of thumb; each
finding states its own. A "problem" means that the result or the gradient is wrong; all else is a "warning".

Left out on purpose: checks that need the model or the samples, and checks before a run (tracking/doctor.py).
"""

import numpy as np

from tracking import plotter
from tracking.findings import LEVELS, Finding, judge

# ---------------------------------------------------------------- what the checks read


def first_and_last_quarter(rows: list[dict], key: str) -> tuple[float, float] | None:
    """Means of a metric over the first and over the last quarter of the steps that have it, at least one step each.

    None if no row has the metric. Most checks judge the last quarter alone: a bad start is no finding.
    """
    values = list(plotter.by_step(rows, key).values())
    quarter = max(1, len(values) // 4)
    return (float(np.mean(values[:quarter])), float(np.mean(values[-quarter:]))) if values else None


def evaluations(rows: list[dict]) -> list[dict]:
    """The rows with a held-out accuracy and its interval, in the order of their steps."""
    return [row for row in rows if {"eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"} <= row.keys()]


# ---------------------------------------------------------------- held-out accuracy


def accuracy_gain(rows: list[dict]) -> Finding | None:
    """Is the last held-out accuracy above the first one, beyond the sampling error of both?"""
    if len(results := evaluations(rows)) < 2:
        return None
    first, last = results[0], results[-1]
    return judge(
        last["eval/accuracy_low"] > first["eval/accuracy_high"],
        "Learning",
        f"held-out accuracy went from {first['eval/accuracy']:.1%} to {last['eval/accuracy']:.1%}",
        rule="warning if the last interval does not lie above the first",
        advice="train for more steps, try another --learning_rate, or measure smaller gains with more --eval_problems; "
        "first look at the other findings",
    )


def accuracy_drop(rows: list[dict]) -> Finding | None:
    """Is the last held-out accuracy below the highest one, beyond the sampling error of both?"""
    if len(results := evaluations(rows)) < 2:
        return None
    last, peak = results[-1], max(results, key=lambda row: (row["eval/accuracy"], row["step"]))
    message = "the last held-out accuracy is the highest"
    if peak is not last:
        message = (
            f"held-out accuracy was {peak['eval/accuracy']:.1%} after step {peak['step']} and is "
            f"{last['eval/accuracy']:.1%} after step {last['step']}"
        )
    return judge(
        last["eval/accuracy_high"] >= peak["eval/accuracy_low"],
        "Accuracy after its peak",
        message,
        rule="problem if the last interval lies below the peak's",
        advice="use checkpoints/best; lower --learning_rate or --final_lr_fraction, add --beta 0.01, and read samples "
        "of the steps after the peak",
        level="problem",
    )


# ---------------------------------------------------------------- the answers of the training steps


def format_rate(rows: list[dict]) -> Finding | None:
    """Do the answers have the form that the prompt asks for?"""
    if not (share := first_and_last_quarter(rows, "format_rate")):
        return None
    return judge(
        share[1] >= 0.8,
        "Format",
        f"in the last quarter of the steps, {share[1]:.0%} of the answers had the required form (in the first quarter "
        f"{share[0]:.0%})",
        rule="warning below 80%",
        advice="add format:0.5 to --rewards, or tag_count:0.5, which rewards each correct tag; try --prefill or "
        "--stop_at_answer",
    )


def zero_std_groups(rows: list[dict]) -> Finding | None:
    """Do the rewards within a group differ, so that the group has advantages other than 0?"""
    if not (share := first_and_last_quarter(rows, "zero_std_groups")):
        return None
    accuracy = (first_and_last_quarter(rows, "accuracy") or (0.5, 0.5))[1]  # games have none
    advice = "a lower --learning_rate or a higher --temperature keeps variety; --group_size 16 finds rarer answers"
    if accuracy >= 0.8:
        advice = "the problems are solved: stop here, or continue with harder ones (--dataset_path)"
    elif accuracy <= 0.1:
        advice = "nearly all answers are wrong: easier problems, a stronger model, or tag_count:0.5 in --rewards"
    message = f"in the last quarter of the steps, {share[1]:.0%} of the groups had equal rewards and gave no gradient"
    return judge(share[1] <= 0.7, "Groups of equal rewards", message, rule="warning above 70%", advice=advice)


def truncation(rows: list[dict]) -> Finding | None:
    """Do the answers end before the length limit?"""
    if not (share := first_and_last_quarter(rows, "truncated_rate")):
        return None
    return judge(
        share[1] <= 0.1,
        "Truncation",
        f"in the last quarter of the steps, {share[1]:.1%} of the answers were cut off at the length limit",
        rule="warning above 10%",
        advice="raise --max_completion_length; --mask_truncated leaves cut answers out of the loss; see the loop rate",
    )


def entropy_collapse(rows: list[dict]) -> Finding | None:
    """Did the entropy fall to almost nothing while many answers were still wrong? Needs 8 steps, and an accuracy."""
    entropy, accuracy = first_and_last_quarter(rows, "entropy"), first_and_last_quarter(rows, "accuracy")
    if entropy is None or accuracy is None or len(plotter.by_step(rows, "entropy")) < 8:
        return None
    return judge(
        entropy[1] >= 0.1 * entropy[0] or accuracy[1] >= 0.9,
        "Entropy",
        f"entropy went from {entropy[0]:.3g} to {entropy[1]:.3g} nats a token at {accuracy[1]:.0%} training accuracy",
        rule="warning below a tenth of its start, unless accuracy is 90% or more",
        advice="lower --learning_rate, raise --clip_high to 0.28, or keep the policy near its start with --beta 0.01",
    )


# ---------------------------------------------------------------- the updates


def kl_drift(rows: list[dict]) -> Finding | None:
    """Is the policy still close to the reference?"""
    if not (kl := first_and_last_quarter(rows, "kl")):
        return None
    return judge(
        kl[1] <= 0.5,
        "KL to the reference",
        f"in the last quarter of the steps, the KL to the reference was {kl[1]:.3g} nats a token",
        rule="warning above 0.5 nats",
        advice="raise --beta, lower --learning_rate, or refresh the reference with --reference_refresh_steps",
    )


def logprob_gap(rows: list[dict]) -> Finding | None:
    """Does training compute the same log-probs as sampling did? If not, the gradient is that of another policy."""
    if not (gap := first_and_last_quarter(rows, "logprob_gap")):
        return None
    return judge(
        gap[1] <= 0.05,
        "Log-prob gap",
        f"the log-probs of training and sampling differed by {gap[1]:.1e} nats a token",
        rule="problem above 0.05 nats",
        advice="correct for it with --rollout_is_cap 2, or sample in fp32 with --bf16 false",
        level="problem",
    )


def skipped_updates(rows: list[dict]) -> Finding | None:
    """Were all gradients finite?"""
    counts = plotter.by_step(rows, "skipped_updates")
    if not counts:
        return None
    total, steps = int(sum(counts.values())), [step for step, count in counts.items() if count]
    message = "every gradient was finite"
    if total:
        message = f"{total} updates were skipped because their gradient was not finite, the first in step {steps[0]}"
    advice = "lower --learning_rate or --max_grad_norm, or lengthen --warmup_steps"
    return judge(total == 0, "Skipped updates", message, rule="warning above 0", advice=advice)


CHECKS = (
    accuracy_gain, accuracy_drop, format_rate, zero_std_groups, truncation, entropy_collapse, kl_drift, logprob_gap,
    skipped_updates,
)  # fmt: skip


def find_health(rows: list[dict]) -> list[Finding]:
    """The findings of all checks that have data, problems first, then warnings. rows: of metrics.jsonl."""
    findings = [finding for check in CHECKS if (finding := check(rows))]
    return sorted(findings, key=lambda finding: -LEVELS.index(finding.level))
