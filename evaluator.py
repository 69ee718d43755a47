"""Grade completions, reward them, describe their behaviour, and measure a model on held-out problems.

What it leaves out on purpose: symbolic mathematics (an answer is one number, compared exactly; anything that
would have to be calculated is refused), `eval` and floats (a completion is hostile text: nothing in it is ever
executed, and no answer is right by rounding), partial credit for a nearly right number. The rewards of a user's file
and the judge are in rewards/.

How to use it:

    weights = parse_rewards("accuracy:1,format:0.5")
    scores = score(completion, "18", weights, tags="reasoning")     # {"accuracy": 1.0, "format": 0.0}
    reward = total(scores, weights)                                 # 1.0
    result = evaluate(model, tokenizer, load_problems("gsm8k", "test", limit=200))

From top to bottom: grading, rewards, behaviour metrics, `grade` for a whole rollout, and `evaluate`, the only part that
runs a model. All the rest is plain functions of text and numbers, linear in the length of the text.
"""

import math
import re
from collections import Counter
from itertools import chain, compress
from statistics import fmean

from tqdm import tqdm

from engine.numbers import MAX_ANSWER_CHARS, last_number, parse_number  # noqa: F401 (for those who import this module)
from engine.statistics import pass_at_k, powers_of_two, wilson_interval
from rewards.functions import IN_A_FILE, Rewards, UserReward
from rldatasets import DEFAULT_FORMAT, PromptFormat

# ---- Grading: the blocks of a completion -----------------------------------------------------------------------------

# Names of the reasoning block and the answer block; "think" is the pair of the DeepSeek-R1 paper.
TAGS = {"reasoning": ("reasoning", "answer"), "think": ("think", "answer")}


def _markers(tags):
    """The four literal tags in their order, for example <think> </think> <answer> </answer>."""
    if tags not in TAGS:
        raise ValueError(f"tags: unknown style {tags!r} (choose from {', '.join(TAGS)})")
    reasoning, answer = TAGS[tags]
    return f"<{reasoning}>", f"</{reasoning}>", f"<{answer}>", f"</{answer}>"


def _split_blocks(completion, tags):
    """Cut at the four tags into (before, reasoning, between, answer, after).

    None if a tag is missing, out of order, or occurs again before the answer is closed, or if the text after
    the answer has another answer tag. Other text around the blocks is allowed: only the format reward minds it.
    """
    markers = _markers(tags)
    parts, rest = [], completion
    for marker in markers:
        part, found, rest = rest.partition(marker)
        if not found or any(other in part for other in markers):
            return None
        parts.append(part)
    if any(answer_tag in rest for answer_tag in markers[2:]):
        return None
    return (*parts, rest)


def extract_answer(completion: str, tags: str = "reasoning") -> str | None:
    """The text of the answer block without surrounding white space, or None.

    Strict: one reasoning block and after it one answer block, both closed, neither nested. Several answer
    blocks, or an answer inside the reasoning or before it, give None. Other text around the blocks does not
    matter here. Raises ValueError for an unknown `tags`.
    """
    blocks = _split_blocks(completion, tags)
    return None if blocks is None else blocks[3].strip()


# ---- Grading: numbers (engine/numbers.py reads them) -----------------------------------------------------------------


def extract_answer_flexible(completion: str) -> str | None:
    """The last number anywhere in the completion, without commas and currency, or None.

    It needs no tags, so it tells "cannot calculate" from "does not keep the format": much of the early gain of
    R1-style training is format. Report it beside the strict accuracy, never in its place.
    """
    return last_number(completion)


def answers_match(candidate: str | None, gold: str, question: str | None = None) -> bool:
    """Whether both texts state the same number, compared exactly. False if either states no single number.

    question: if given, the nouns that it counts ("eggs") are accepted as units in the candidate.
    """
    value = parse_number(candidate, question)
    return value is not None and value == parse_number(gold)


def accuracy_reward(completion: str, gold: str, tags: str = "reasoning", question: str | None = None) -> float:
    """1.0 if the one answer block states the gold number, else 0.0 (DeepSeek-R1, section 2.2.2)."""
    return float(answers_match(extract_answer(completion, tags), gold, question))


def format_reward(completion: str, tags: str = "reasoning") -> float:
    """1.0 if the completion is one reasoning block that is not empty, then one answer block, and nothing but
    white space around them; else 0.0 (DeepSeek-R1, section 2.2.2). What the answer says does not matter.
    """
    blocks = _split_blocks(completion, tags)
    if blocks is None:
        return 0.0
    before, reasoning, between, _, after = blocks
    return float(reasoning.strip() != "" and (before + between + after).strip() == "")


# ---- Rewards by name, with weights -----------------------------------------------------------------------------------


def _tag_count_reward(completion, gold, tags, question=None):
    """A quarter for each of the four tags that occurs exactly once: a gradient towards the format."""
    return sum(completion.count(marker) == 1 for marker in _markers(tags)) / 4


def _integer_reward(completion, gold, tags, question=None):
    """1.0 if the answer block states an integer, right or wrong: useful where every gold is one, as in GSM8K."""
    value = parse_number(extract_answer(completion, tags), question)
    return float(value is not None and value.denominator == 1)


# Every reward is a function of (completion, gold, tags, question); a new one is a new line here.
REWARDS = {
    "accuracy": accuracy_reward,
    "format": lambda completion, gold, tags, question=None: format_reward(completion, tags),
    "tag_count": _tag_count_reward,
    "integer": _integer_reward,
}
JUDGE = "judge"  # rewards/judge.py: it compares the answers of a group


def parse_rewards(text: str, time_limit: float = 10.0) -> Rewards:
    """Read "accuracy:1,format:0.5" into {"accuracy": 1.0, "format": 0.5}; a missing weight is 1.

    "my_rewards.py:brevity:0.2" is the function `brevity` of a file, and named `brevity` from here on. time_limit:
    seconds that a call of such a function may take. Raises ValueError, in one line with the valid choices, for an empty
    or unknown name, a name given twice, a weight that is not a finite number, or a file that cannot be used.
    """
    choices = f"choose from {', '.join((*REWARDS, JUDGE))}, or file.py:function, each as name or name:weight"
    weights = Rewards()
    for item in text.split(","):
        name, colon, weight = (part.strip() for part in item.partition(":"))
        file = None
        if in_a_file := IN_A_FILE.fullmatch(item.strip()):
            file, name, weight = in_a_file["file"], in_a_file["name"], in_a_file["weight"]
            colon, weight = weight is not None, (weight or "").strip()
        if name not in (*REWARDS, JUDGE) and not file:
            raise ValueError(f"rewards: unknown reward {name!r} in {text!r} ({choices})")
        if name in weights or file and name in (*REWARDS, JUDGE):
            raise ValueError(f"rewards: {name!r} is given twice in {text!r} ({choices})")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ValueError(f"rewards: weight {weight!r} of {name!r} is not a finite number ({choices})")
        if file:
            weights.functions[name] = UserReward(file, name, time_limit)
    return weights


def score(
    completion: str, gold: str, weights: dict[str, float], tags: str = "reasoning", question: str | None = None
) -> dict[str, float]:
    """Each reward of REWARDS that `weights` names, before weighting, so that logs can be compared between settings."""
    return {name: REWARDS[name](completion, gold, tags, question) for name in weights if name in REWARDS}


def total(scores: dict[str, float], weights: dict[str, float]) -> float:
    """The weighted sum: the number that training maximises."""
    return sum(weight * scores[name] for name, weight in weights.items())


# ---- Behaviour metrics -----------------------------------------------------------------------------------------------

# Phrases that almost only occur when a text turns back on itself, in lower case: a pattern that ignores case is slow.
_REFLECTS = re.compile(
    r"\b(?:recheck|rethink|reassess|re-?evaluate|re-?examine|reconsider|double-check"
    r"|check\s+again|think\s+again|verify\s+again|go\s+over\s+the\s+steps)\b",
)
# The words counted in the DeepSeek-R1 paper: a noisier figure, since "but" and "check" have other uses.
_REFLECT_WORDS = re.compile(r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b")


def _repetition(words):
    """1 - unique / total 4-grams; needs four words."""
    four_grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(four_grams)) / len(four_grams)


def _loops(words):
    """Whether the last 20-gram occurs three times or more: the text ends in a loop."""
    if len(words) < 20:
        return False
    text, last = (" ".join(["", *some, ""]) for some in (words, words[-20:]))  # searched as text: ten times as fast
    place = -1
    for _ in range(3):
        place = text.find(last, place + 1)
        if place < 0:
            return False
    return True


def behaviour_metrics(
    completions: list[str], lengths: list[int], finish: list[str], correct: list[bool]
) -> dict[str, float]:
    """How completions look, whatever they answer. Log it from step 0: base models reflect before any training.

    All four lists have one entry per completion: text, length in tokens, "stop" or "length", graded correct.
    "Words" are what white space separates. A metric that no row defines is left out, so that no NaN reaches a log.

    reflect_rate     share with a phrase of self-correction (recheck, think again, ...)
    reflect_words    the DeepSeek-R1 paper's words (wait, however, ...) per 1,000 words, all completions together
    reflection_lift  P(correct | reflects) - P(correct | does not)
    truncated_rate   share cut off at the length limit
    stopped_length   mean length of those that ended by themselves, tokens
    repetition       1 - unique / total 4-grams of words, mean over completions of four words or more
    loop_rate        share whose last 20 words occur three times or more, overlaps counted
    length_correct, length_wrong    mean length in tokens
    """
    assert len(completions) == len(lengths) == len(finish) == len(correct), "one entry per completion"
    words = [text.split() for text in completions]
    lower = [text.lower() for text in completions]
    reflects = [_REFLECTS.search(text) is not None for text in lower]
    values = {
        "reflect_rate": reflects,
        "truncated_rate": [how == "length" for how in finish],
        "stopped_length": list(compress(lengths, [how == "stop" for how in finish])),
        "repetition": [_repetition(row) for row in words if len(row) >= 4],
        "loop_rate": [_loops(row) for row in words],
        "length_correct": list(compress(lengths, correct)),
        "length_wrong": list(compress(lengths, [not ok for ok in correct])),
    }
    metrics = {name: fmean(rows) for name, rows in values.items() if rows}
    num_words = sum(map(len, words))
    if num_words:
        metrics["reflect_words"] = 1000 * sum(len(_REFLECT_WORDS.findall(text)) for text in lower) / num_words
    if 0 < sum(reflects) < len(reflects):
        without = [not reflecting for reflecting in reflects]
        metrics["reflection_lift"] = fmean(compress(correct, reflects)) - fmean(compress(correct, without))
    return metrics


def majority_at_k(answers: list[str | None], gold: str, question: str | None = None) -> float:
    """1.0 if the most frequent number among `answers` is the gold one, else 0.0 (Wang et al. 2022).

    Answers that are equal as numbers vote together; None, and an answer that is no single number, votes for
    nothing; of equally frequent numbers the one that occurs first wins.
    """
    votes = Counter(value for value in (parse_number(answer, question) for answer in answers) if value is not None)
    return float(bool(votes) and max(votes, key=votes.get) == parse_number(gold))


# ---- Held-out evaluation ---------------------------------------------------------------------------------------------


def _summarise(records, samples, tags):
    """The numbers that `evaluate` returns, from its records; `samples` successive records belong to one problem."""
    columns = {name: [record[name] for record in records] for name in records[0]}
    n = len(records) // samples
    accuracy, format_rate = fmean(columns["correct"]), fmean(columns["format"])
    accuracy_low, accuracy_high = wilson_interval(accuracy * n, n)
    format_rate_low, format_rate_high = wilson_interval(format_rate * n, n)
    summary = {
        "accuracy": accuracy,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "accuracy_flexible": fmean(
            answers_match(extract_answer_flexible(record["completion"]), record["gold"]) for record in records
        ),
        "format_rate": format_rate,
        "format_rate_low": format_rate_low,
        "format_rate_high": format_rate_high,
        "length": fmean(columns["length"]),
        "soft_share": sum(columns["soft_steps"]) / max(1, sum(columns["length"])),
        "top_weight": fmean(columns["top_weight"]),
        "n": n,
        "samples": samples,
        **behaviour_metrics(columns["completion"], columns["length"], columns["finish"], columns["correct"]),
    }
    if samples > 1:
        groups = [records[first : first + samples] for first in range(0, len(records), samples)]
        right = [sum(row["correct"] for row in group) for group in groups]
        for k in powers_of_two(samples):
            summary[f"pass@{k}"] = fmean(pass_at_k(samples, c, k) for c in right)
        summary[f"maj@{samples}"] = fmean(
            majority_at_k(
                [extract_answer(row["completion"], tags) for row in group], group[0]["gold"], group[0]["question"]
            )
            for group in groups
        )
    return summary


def grade(
    rollout,
    problems,
    weights: dict[str, float],
    prompt_format: PromptFormat = DEFAULT_FORMAT,
    prompts: list[str] | None = None,
) -> list[dict]:
    """Grades a rollout.Rollout: one record per row.

    problems: of the rollout's prompts; a group of rows shares its problem. weights: of the rewards, as parse_rewards
    gives them; {} for none. prompts: as the model read them; default: the questions. Raises RewardError, a ValueError,
    when a reward of the user's file fails. The keys of a record:

      question, gold, prompt, tags    the problem, and how it was asked
      completion, finish, length    text (a prefilled tag before it), "stop" or "length", tokens
      soft_steps           steps that were mixtures
      mean_entropy         of the sampling distributions, nats per token
      top_weight           weight of the readable token, mean over the row's steps
      correct, format      whether the answer is right, whether the form is the one asked for
      reward/NAME, reward  each reward that `weights` names, and their weighted sum, the number that training maximises
    """
    if not problems:
        return []
    group_size = len(rollout.texts) // len(problems)
    lengths = rollout.lengths.clamp(min=1)  # (B,)
    soft_steps = (rollout.is_soft & rollout.completion_mask).sum(dim=1)  # (B,)
    mean_entropy = (rollout.entropy * rollout.completion_mask).sum(dim=1) / lengths  # (B,)
    top_weight = (rollout.top_weight * rollout.completion_mask).sum(dim=1) / lengths  # (B,)
    records = []
    for row, text in enumerate(rollout.texts):
        problem, text = problems[row // group_size], prompt_format.full_text(text)
        named = {"accuracy": 0, "format": 0} | weights
        scores = score(text, problem.answer, named, prompt_format.tags, problem.question)
        record = {
            "question": problem.question,
            "gold": problem.answer,
            "prompt": prompts[row // group_size] if prompts else problem.question,
            "tags": prompt_format.tags,
            "completion": text,
            "finish": rollout.finish[row],
            "length": int(rollout.lengths[row]),
            "soft_steps": int(soft_steps[row]),
            "mean_entropy": mean_entropy[row].item(),
            "top_weight": top_weight[row].item(),
            "correct": scores["accuracy"] == 1,
            "format": scores["format"] == 1,
        }
        records.append(record | {f"reward/{name}": scores.get(name) for name in weights})
    groups = [records[start : start + group_size] for start in range(0, len(records), group_size)]
    for name in [name for name in weights if name not in REWARDS]:  # of the user's file, or the judge
        for record, value in zip(records, chain(*weights.functions[name](groups)), strict=True):
            record[f"reward/{name}"] = value
    for record in records if weights else []:
        record["reward"] = total({name: record[f"reward/{name}"] for name in weights}, weights)
    return records


def without(record: dict, *names: str) -> dict:
    return {name: value for name, value in record.items() if name not in names}


def evaluate(
    model,
    tokenizer,
    problems,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    prompt_format: PromptFormat = DEFAULT_FORMAT,
    stop_tag: str | None = None,
    rows_per_batch: int = 256,
    soft=None,
    seed: int = 0,
    progress: bool = False,
    log=None,
) -> dict:
    """Sample `samples` completions for each problem (greedy by default), grade them, and summarise.

    problems: list of rldatasets.Problem. soft: a SoftThinking, or None for ordinary tokens. rows_per_batch bounds the
    rows decoded together (at least one problem's), and so the memory. Sampling depends on `seed` and on how
    rows_per_batch cuts the batches, never on global random state. log: a run_folder.JsonLines to which each batch's
    records are appended; whole batches that it holds already are not sampled again.

    Returns fractions from 0 to 1 and lengths in tokens:
      accuracy, accuracy_flexible, format_rate   means over all rows; flexible = last number anywhere
      accuracy_low, accuracy_high, format_rate_low, format_rate_high   95 % Wilson interval. Rows of one problem
                       are correlated, so n is the number of problems, also when samples > 1 (conservative)
      length           mean completion length
      n, samples       problems, and rows per problem
      pass@k           if samples > 1, for k = 2, 4, 8, ... and samples: share of problems with a right one among k,
                       unbiased from all samples (pass@1 is the accuracy)
      maj@k            if samples > 1, for k = samples
      the keys of behaviour_metrics
      soft_share, top_weight   share of steps that were mixtures; weight of the readable token, mean over rows
      records          a dict per row, in the order of the problems: question, gold, completion, finish, length,
                       soft_steps, mean_entropy, top_weight, correct, format

    Raises ValueError if there are no problems, or if several samples would be greedy copies of each other.
    """
    from engine import distributed  # here, because these import torch, which grading and a command line do without
    from rollout import generate

    problems = list(problems)
    if not problems:
        raise ValueError("evaluate: no problems given")
    if samples < 1:
        raise ValueError(f"evaluate: samples must be at least 1, got {samples}")
    if samples > 1 and temperature <= 0:
        raise ValueError(f"evaluate: samples={samples} needs temperature > 0, got {temperature}")

    problems_per_batch = max(1, rows_per_batch // samples)
    batches = [problems[start : start + problems_per_batch] for start in range(0, len(problems), problems_per_batch)]
    records = log.read() if log else []
    done = len(records) // (problems_per_batch * samples) if len(records) < len(problems) * samples else len(batches)
    if log:
        records = records[: done * problems_per_batch * samples]  # an unfinished batch is made again
        log.replace(records)
    for number in tqdm(
        range(done, len(batches)), desc="evaluate", disable=not (progress and distributed.is_main_process())
    ):
        indices, own = distributed.shard_range(len(batches[number])), []
        batch = [batches[number][i] for i in indices]
        if batch:
            rollout = generate(
                model,
                tokenizer,
                [prompt_format.prompt(tokenizer, problem.question) for problem in batch],
                group_size=samples,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_tag=stop_tag,
                soft=soft,
                seed=seed + number,  # one seed for all batches would give each of them the same random draws
                prompt_indices=indices,
            )
            own = [without(record, "prompt", "tags") for record in grade(rollout, batch, {}, prompt_format)]
        gathered = distributed.all_gather(own)
        records += gathered
        if log:
            log.append(*gathered)
    return {**_summarise(records, samples, prompt_format.tags), "records": records}
