"""Health checks of a run: each reads the rows of metrics.jsonl and returns one Finding, or None without data.

To add a check, write a function rows -> Finding | None and put it into CHECKS. docs/metrics.md has each rule with its
reason and its source. tests/test_health.py holds the thresholds against the good runs of plots/metrics and the zoo.
A "problem" means that the result or the gradient is wrong; all else is a "warning".

Left out on purpose: checks that need the model or the samples, and checks before a run (tracking/doctor.py).
"""

import math

import numpy as np

from engine.statistics import paired_z, unpack_outcomes, unpaired_z
from tracking import plotter
from tracking.findings import LEVELS, Finding, judge

# The metrics that some check reads, so that a log can be thinned to them.
KEYS = (
    "step", "reward", "accuracy", "format_rate", "completion_length", "truncated_rate", "loop_rate", "repetition",
    "entropy", "zero_std_groups", "grad_norm", "clip_frac", "kl", "logprob_gap", "updates", "skipped_updates",
    "replaced_groups", "eval/n", "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/accuracy_greedy",
    "eval/outcomes", "eval/outcomes_greedy",
)  # fmt: skip

SIGNIFICANT = 1.96  # standard errors: 5 %, both sides
DECISIVE = 3.0  # for a difference that was looked for at many places, as the fall from the highest of many evaluations
SOLVED = 0.9  # training accuracy from which little is left to learn
YOUNG = 20  # steps; before that, nothing has to be learned yet
COLLAPSE = 0.4  # of the entropy against the errors; good runs of the embedded model end at 0.6 to 0.7
BEGINNING = 3  # steps that tell how a run began: a quarter of it may hide a collapse within that quarter

# ---------------------------------------------------------------- what the checks read


def values_of(rows: list[dict], key: str) -> list[float]:
    """The finite values of a metric, in the order of the steps."""
    return [value for value in plotter.by_step(rows, key).values() if math.isfinite(value)]


def last_quarter(rows: list[dict], key: str) -> float | None:
    """Mean over the last quarter of the steps that have the metric, one at least; None if no row has it."""
    values = values_of(rows, key)
    return float(np.mean(values[-max(1, len(values) // 4) :])) if values else None


def beginning(rows: list[dict], key: str) -> float | None:
    """Mean over the first BEGINNING steps that have the metric; None if no row has it."""
    values = values_of(rows, key)
    return float(np.mean(values[:BEGINNING])) if values else None


def num_steps(rows: list[dict]) -> int:
    return max((row["step"] for row in rows), default=0)


def evaluations(rows: list[dict]) -> list[dict]:
    """The rows with a held-out accuracy and its interval, in the order of their steps."""
    return [row for row in rows if {"eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"} <= row.keys()]


def change(before: dict, after: dict, kind: str = "") -> float:
    """How many standard errors the held-out accuracy rose from one evaluation to another.

    kind: "" for the sampled accuracy, "_greedy". Paired, problem by problem, where both rows have the outcomes of the
    same number of problems; else from the two rates as if the problems were different ones, which sees less.
    """
    outcomes, n, m = f"eval/outcomes{kind}", before["eval/n"], after["eval/n"]
    if n == m and before.get(outcomes) and after.get(outcomes):
        return paired_z(unpack_outcomes(before[outcomes], n), unpack_outcomes(after[outcomes], n))
    return unpaired_z(before[f"eval/accuracy{kind}"], n, after[f"eval/accuracy{kind}"], m)


def has_gained(rows: list[dict]) -> bool:
    """Whether the last sampled or greedy accuracy is significantly above the first one."""
    results = [row for row in evaluations(rows) if "eval/accuracy_greedy" in row]
    return len(results) > 1 and max(change(results[0], results[-1], kind) for kind in ("", "_greedy")) > SIGNIFICANT


def is_solved(rows: list[dict]) -> bool:
    return (last_quarter(rows, "accuracy") or 0) >= SOLVED


# ---------------------------------------------------------------- held-out accuracy


def accuracy_gain(rows: list[dict]) -> Finding | None:
    """Is the last held-out accuracy above the first one, on the same problems?"""
    if len(results := evaluations(rows)) < 2:
        return None
    first, last = results[0], results[-1]
    young = num_steps(rows) < YOUNG
    message = f"held-out accuracy went from {first['eval/accuracy']:.1%} to {last['eval/accuracy']:.1%}, "
    message += f"{change(first, last):.1f} standard errors" + (f" in {num_steps(rows)} steps" if young else "")
    return judge(
        change(first, last) > SIGNIFICANT or young or first["eval/accuracy"] >= SOLVED,
        "Learning",
        message,
        rule=f"warning below {SIGNIFICANT} standard errors from step {YOUNG} on, unless it began at {SOLVED:.0%}",
        advice="train for more steps, try another --learning_rate, or measure smaller gains with more --eval_problems; "
        "first look at the other findings",
    )


def fall_from_peak(rows: list[dict], kind: str, name: str, what: str) -> Finding | None:
    key = f"eval/accuracy{kind}"
    results = [row for row in evaluations(rows) if key in row]
    if len(results) < 2:
        return None
    last, peak = results[-1], max(results, key=lambda row: (row[key], row["step"]))
    message = f"the last {what} is the highest"
    if peak is not last:
        message = (
            f"{what} was {peak[key]:.1%} after step {peak['step']} and is {last[key]:.1%} after step {last['step']}"
        )
        message += f", {-change(peak, last, kind):.1f} standard errors less"
    return judge(
        peak is last or change(peak, last, kind) > -DECISIVE,
        name,
        message,
        rule=f"problem from {DECISIVE:.0f} standard errors below the highest evaluation",
        advice="use checkpoints/best; lower --learning_rate or --final_lr_fraction, add --beta 0.01, and read samples "
        "of the steps after the peak",
        level="problem",
    )


def accuracy_drop(rows: list[dict]) -> Finding | None:
    """Is the last sampled accuracy below the highest one?"""
    return fall_from_peak(rows, "", "Accuracy after its peak", "held-out accuracy")


def greedy_drop(rows: list[dict]) -> Finding | None:
    """Is the last greedy accuracy below the highest one? It shows lost ability, the sampled one also lost sharpness."""
    return fall_from_peak(rows, "_greedy", "Greedy accuracy after its peak", "greedy accuracy")


def reward_without_accuracy(rows: list[dict]) -> Finding | None:
    """Does the reward rise while the held-out accuracy does not? Then the rules are being gamed. Needs 8 steps.

    The reward of the last quarter is compared with that around each earlier evaluation.
    """
    rewards, results = plotter.by_step(rows, "reward"), evaluations(rows)
    if len(rewards) < 8 or len(results) < 2:
        return None
    steps, last = list(rewards), results[-1]
    width = len(steps) // 4
    end = [rewards[step] for step in steps[-width:]]
    name, message = "Reward without accuracy", "the reward did not rise without the held-out accuracy"
    gamed = False
    for earlier in results[:-1]:
        seen = [rewards[step] for step in steps if step <= earlier["step"]][-width:]
        start = seen if len(seen) == width else [rewards[step] for step in steps[:width]]
        error = math.sqrt((np.var(start, ddof=1) + np.var(end, ddof=1)) / width)  # of the difference of the means
        rose = np.mean(end) - np.mean(start) > DECISIVE * error
        kinds = [kind for kind in ("", "_greedy") if f"eval/accuracy{kind}" in last.keys() & earlier.keys()]
        changes = [change(earlier, last, kind) for kind in kinds]
        from_start = earlier is results[0] and earlier["eval/accuracy"] < SOLVED and max(changes) <= SIGNIFICANT
        if rose and (from_start or min(changes) <= -DECISIVE):
            gamed = True
            message = f"since step {earlier['step']} the reward went from {np.mean(start):.2f} to {np.mean(end):.2f}, "
            message += f"held-out accuracy from {earlier['eval/accuracy']:.0%} to {last['eval/accuracy']:.0%}"
            if "_greedy" in kinds:
                message += f", greedy {earlier['eval/accuracy_greedy']:.0%} to {last['eval/accuracy_greedy']:.0%}"
    return judge(
        not gamed,
        name,
        message,
        rule=f"warning if the reward rose by {DECISIVE:.0f} standard errors, and the sampled or greedy accuracy fell "
        f"by {DECISIVE:.0f} since then, or neither rose since the start",
        advice="read samples with high rewards: answers may earn them without being right; give accuracy more weight "
        "in --rewards",
    )


def train_test_gap(rows: list[dict]) -> Finding | None:
    """Is the training accuracy above the held-out one? Both are sampled at the same temperature. Needs 8 steps."""
    accuracy, results = values_of(rows, "accuracy"), evaluations(rows)
    if len(accuracy) < 8 or not results or not results[-1]["step"]:
        return None
    if values_of(rows, "replaced_groups"):  # the training accuracy is that of the groups that were kept
        return None
    late, test = accuracy[-max(3, len(accuracy) // 4) :], results[-1]["eval/accuracy"]
    gap, n = float(np.mean(late)) - test, results[-1]["eval/n"]
    error = math.sqrt(np.var(late, ddof=1) / len(late) + test * (1 - test) / n)
    return judge(
        gap < max(0.1, DECISIVE * error),
        "Training against test",
        f"in the last quarter of the steps, {np.mean(late):.0%} of the training answers were right, and "
        f"{test:.0%} of the held-out ones",
        rule=f"warning if training is ahead by 10 points and by {DECISIVE:.0f} standard errors",
        advice="the training problems are being memorised: more of them (--dataset_path), or fewer steps",
    )


# ---------------------------------------------------------------- the answers of the training steps


def format_rate(rows: list[dict]) -> Finding | None:
    """Do the answers have the form that the prompt asks for, or more of them than at first? Needs 8 steps."""
    if len(values_of(rows, "format_rate")) < 8:
        return None
    start, end = beginning(rows, "format_rate"), last_quarter(rows, "format_rate")
    return judge(
        end >= 0.8 or end >= start + 0.1,
        "Format",
        f"in the last quarter of the steps, {end:.0%} of the answers had the required form (in the first steps "
        f"{start:.0%})",
        rule="warning below 80%, unless it rose by 10 points",
        advice="add format:0.5 to --rewards, or tag_count:0.5, which rewards each correct tag; try --prefill or "
        "--stop_at_answer",
    )


def zero_std_groups(rows: list[dict]) -> Finding | None:
    """Do the rewards within a group differ, so that the group has advantages other than 0?"""
    if (share := last_quarter(rows, "zero_std_groups")) is None:
        return None
    accuracy = last_quarter(rows, "accuracy")  # games have none
    advice = "a lower --learning_rate or a higher --temperature keeps variety; --group_size 16 finds rarer answers"
    if accuracy is not None and accuracy <= 0.1:
        advice = "nearly all answers are wrong: easier problems, a stronger model, or tag_count:0.5 in --rewards"
    message = f"in the last quarter of the steps, {share:.0%} of the groups had equal rewards and gave no gradient"
    if solved := is_solved(rows):
        message += "; the problems are solved: continue with harder ones (--dataset_path)" if share > 0.8 else ""
    return judge(
        share <= 0.8 or solved, "Groups of equal rewards", message, advice=advice,
        rule=f"warning above 80%, unless {SOLVED:.0%} of the answers are right",
    )  # fmt: skip


def truncation(rows: list[dict]) -> Finding | None:
    """Do the answers end before the length limit?"""
    if (share := last_quarter(rows, "truncated_rate")) is None:
        return None
    return judge(
        share <= 0.1,
        "Truncation",
        f"in the last quarter of the steps, {share:.1%} of the answers were cut off at the length limit",
        rule="warning above 10%",
        advice="raise --max_completion_length; --mask_truncated leaves cut answers out of the loss; if all are cut, "
        "look at the stop ids that main.py --doctor prints; see the loop rate",
    )


def length_growth(rows: list[dict]) -> Finding | None:
    """Do the answers grow without becoming better? Needs 8 steps."""
    if len(values_of(rows, "completion_length")) < 8 or not evaluations(rows):
        return None
    start, end = beginning(rows, "completion_length"), last_quarter(rows, "completion_length")
    return judge(
        end <= 1.5 * start or has_gained(rows),
        "Length",
        f"the mean length went from {start:.0f} to {end:.0f} tokens",
        rule="warning above 1.5 times its start, unless the held-out accuracy rose",
        advice="--loss_type dr_grpo or dapo, which do not pay for long wrong answers; read samples: length may earn "
        "rewards",
    )


def repetition(rows: list[dict]) -> Finding | None:
    """Do the answers repeat themselves, or end in a loop?"""
    loops, repeated = last_quarter(rows, "loop_rate"), last_quarter(rows, "repetition")
    if loops is None or repeated is None:
        return None
    start = beginning(rows, "repetition")
    return judge(
        loops <= 0.05 and repeated <= start + 0.1,
        "Repetition",
        f"in the last quarter of the steps, {loops:.1%} of the answers ended in a loop, and {repeated:.0%} of their "
        f"4-word sequences were repeated (in the first steps {start:.0%})",
        rule="warning above 5% loops, or 10 points more repetition than at first",
        advice="lower --learning_rate, add --beta 0.01, and read samples: repeated text may earn a reward",
    )


def entropy_collapse(rows: list[dict]) -> Finding | None:
    """Did the entropy fall much further than the errors did? Then wrong answers have become certain. Needs 8 steps."""
    if len(values_of(rows, "entropy")) < 8 or len(values_of(rows, "accuracy")) < 8:
        return None
    (start, end), (first, last) = ((beginning(rows, k), last_quarter(rows, k)) for k in ("entropy", "accuracy"))
    fall, errors = end / max(start, 1e-9), (1 - last) / max(1 - first, 1e-9)
    return judge(
        fall >= COLLAPSE * errors or last >= SOLVED,
        "Entropy",
        f"entropy went from {start:.3g} to {end:.3g} nats a token, training accuracy from {first:.0%} to {last:.0%}",
        rule=f"warning if it fell to under {COLLAPSE} of the share to which the errors fell, unless {SOLVED:.0%} of "
        "the answers are right",
        advice="lower --learning_rate, raise --clip_high to 0.28, or keep the policy near its start with --beta 0.01",
    )


def entropy_rise(rows: list[dict]) -> Finding | None:
    """Did the entropy rise? A policy that learns from rewards becomes more certain. Needs 8 steps."""
    if len(values_of(rows, "entropy")) < 8:
        return None
    start, end = beginning(rows, "entropy"), last_quarter(rows, "entropy")
    return judge(
        end <= 1.5 * start or end < 0.05,
        "Rising entropy",
        f"entropy went from {start:.3g} to {end:.3g} nats a token",
        rule="warning above 1.5 times its start, and 0.05 nats",
        advice="lower --learning_rate or --clip_high, and check the sign of the rewards",
    )


# ---------------------------------------------------------------- the updates


def gradient_spikes(rows: list[dict]) -> Finding | None:
    """Are gradients of one order of magnitude? One spike is clipped and did no visible harm. Needs 8 gradients."""
    norms = {step: norm for step, norm in plotter.by_step(rows, "grad_norm").items() if norm and math.isfinite(norm)}
    if len(norms) < 8:
        return None
    median, worst = float(np.median(list(norms.values()))), max(norms, key=norms.get)
    spikes = sum(norm > 10 * median for norm in norms.values())
    return judge(
        spikes < 3,
        "Gradient norm",
        f"{spikes} gradients were over 10 times the median {median:.2g}; the largest was {norms[worst]:.2g} in step "
        f"{worst}",
        rule="warning from 3 such steps on",
        advice="lower --learning_rate or --max_grad_norm, lengthen --warmup_steps, and read the step's samples",
    )


def clipping(rows: list[dict]) -> Finding | None:
    """Does the clip leave most of the gradient?"""
    if (share := last_quarter(rows, "clip_frac")) is None:
        return None
    return judge(
        share <= 0.1,
        "Clipping",
        f"in the last quarter of the steps, the clip cut the gradient of {share:.1%} of the tokens",
        rule="warning above 10%",
        advice="fewer --updates_per_rollout or --minibatches, a lower --learning_rate, or a wider --clip_low and "
        "--clip_high",
    )


def missing_updates(rows: list[dict]) -> Finding | None:
    """Were as many optimizer steps taken as at best? A minibatch without any advantage has none."""
    updates = values_of(rows, "updates")
    if not updates or not max(updates):
        return None if not updates else judge(
            False, "Updates", "no optimizer step was taken", rule="warning if none was taken",
            advice="all rewards of every group are equal: see the groups",
        )  # fmt: skip
    share = last_quarter(rows, "updates") / max(updates)
    return judge(
        share >= 0.5 or is_solved(rows),
        "Updates",
        f"in the last quarter of the steps, {share:.0%} of the updates were taken",
        rule=f"warning below 50% of the most that a step took, unless {SOLVED:.0%} of the answers are right",
        advice="minibatches without any advantage are left out: fewer --minibatches, or larger groups",
    )


def kl_drift(rows: list[dict]) -> Finding | None:
    """Is the policy still close to the reference?"""
    if (kl := last_quarter(rows, "kl")) is None:
        return None
    return judge(
        kl <= 0.5,
        "KL to the reference",
        f"in the last quarter of the steps, the KL to the reference was {kl:.3g} nats a token",
        rule="warning above 0.5 nats",
        advice="raise --beta, lower --learning_rate, or refresh the reference with --reference_refresh_steps",
    )


def logprob_gap(rows: list[dict]) -> Finding | None:
    """Does training compute the same log-probs as sampling did? If not, the gradient is that of another policy."""
    if (gap := last_quarter(rows, "logprob_gap")) is None:
        return None
    return judge(
        gap <= 0.05,
        "Log-prob gap",
        f"the log-probs of training and sampling differed by {gap:.1e} nats a token",
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
    accuracy_gain, accuracy_drop, greedy_drop, reward_without_accuracy, train_test_gap, format_rate, zero_std_groups,
    truncation, length_growth, repetition, entropy_collapse, entropy_rise, gradient_spikes, clipping, missing_updates,
    kl_drift, logprob_gap, skipped_updates,
)  # fmt: skip


def find_health(rows: list[dict]) -> list[Finding]:
    """The findings of all checks that have data, problems first, then warnings. rows: of metrics.jsonl."""
    findings = [finding for check in CHECKS if (finding := check(rows))]
    return sorted(findings, key=lambda finding: -LEVELS.index(finding.level))
