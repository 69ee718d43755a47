"""From the teacher's answers to what a student learns from: records, the filter, training examples."""

import dataclasses
import random
import re
from typing import NamedTuple

import torch

import evaluator
from rldatasets import bare_question
from rollout import Rollout, generate


def sample(model, tokenizer, problems, config, seed: int, indices: list[int] | None = None) -> Rollout:
    """group_size answers to each problem (anything with a question), sampled as in main.py. indices: where the problems
    stand in a larger batch, see rollout.generate."""
    return generate(
        model,
        tokenizer,
        [config.prompt_format().prompt(tokenizer, problem.question) for problem in problems],
        group_size=config.group_size,
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        stop_tag=config.stop_tag(),
        seed=seed,
        prompt_indices=indices,
    )


def answer_records(problems, rollout: Rollout, config, tokenizer=None) -> list[dict]:
    """The rows of teacher.jsonl. The ids are kept, because a text that is decoded and encoded again can have others.
    tokenizer: the teacher's, whose chat template may begin the answer."""
    prompt_format = config.prompt_format(tokenizer)
    records = evaluator.grade(rollout, problems, {"accuracy": 1, "format": 1}, prompt_format)
    return [
        {
            **dataclasses.asdict(problems[row // config.group_size]),
            "completion": record["completion"],
            "ids": rollout.trace_ids[row][rollout.completion_mask[row]].tolist(),
            **{name: record[name] for name in ("finish", "length", "reward/accuracy", "reward/format")},
        }
        for row, record in enumerate(records)
    ]


def filter_rows(rows: list[dict], keep_per_problem: int, test_questions: set[str]) -> tuple[list[dict], dict[str, int]]:
    """(the rows to learn from, {"kept" or the first reason against a row: how many}). The counts add up to all rows.
    test_questions: as rldatasets.bare_question gives them."""
    counts = dict.fromkeys(("kept", "test problem", "truncated", "badly formed", "wrong", "duplicate", "surplus"), 0)
    kept: list[dict] = []
    seen: dict[str, set[str]] = {}  # the kept completions of each question, white space aside
    for row in rows:
        texts, text = seen.setdefault(row["question"], set()), " ".join(row["completion"].split())
        reasons = {
            "test problem": bare_question(row["question"]) in test_questions,
            "truncated": row["finish"] != "stop",
            "badly formed": row["reward/format"] != 1,
            "wrong": row["reward/accuracy"] != 1,
            "duplicate": text in texts,
            "surplus": len(texts) >= keep_per_problem,
        }
        verdict = next((reason for reason, holds in reasons.items() if holds), "kept")
        counts[verdict] += 1
        if verdict == "kept":
            kept.append(row)
            texts.add(text)
    return kept, counts


class SFTExample(NamedTuple):
    question: str
    completion: list[int]  # ids, the stop token last


def completion_ids(row: dict, tokenizer, stops: list[int], keep_ids: bool, config) -> list[int]:
    """The ids that the student learns to write after the prompt, with a stop token last.

    keep_ids: the student has the teacher's token ids, so the teacher's own ids are used. A row without ids is encoded.
    With stop_at_answer the teacher's answer may lack the stop token; it is added.
    """
    ids = row["ids"] if keep_ids else None
    if ids is None:
        text = config.prompt_format(tokenizer).left_to_write(row["completion"])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids and ids[-1] in stops:
        return ids
    return [*ids, stops[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id]


def unchecked_rows(rows: list[dict], count: int, seed: int, test_questions: set[str]) -> list[dict]:
    """`count` of the answers at random, whatever they say, among those that ended by themselves: the others have no end
    that could be learned. No answer to a test question. The control of a filter that kept so many."""
    ended = [row for row in rows if row["finish"] == "stop" and bare_question(row["question"]) not in test_questions]
    return random.Random(seed).sample(ended, count)


def gold_rows(rows: list[dict], config) -> list[dict]:
    """The rows with the data set's own solutions, in the asked-for form, in place of the teacher's answers."""
    return [row | {"completion": gold_completion(row, config), "ids": None} for row in rows]


def gold_completion(row: dict, config) -> str:
    steps = re.sub(r"<<.*?>>", "", row["solution"].rpartition("####")[0]).strip()  # GSM8K's notes for a calculator
    opening = config.prompt_format().full_text("") or f"<{config.tags}>"
    return f"{opening}{steps}</{config.tags}>\n<answer>{row['answer']}</answer>"


def as_rollout(examples: list[SFTExample], tokenizer, config, device: torch.device) -> Rollout:
    """The examples as the Rollout that would have sampled them (one draw per position), so that the training pass is
    the one of main.py. Log-probs and entropies at sampling time are unknown, and nothing here reads them."""
    prompts = [config.prompt_format().prompt(tokenizer, example.question) for example in examples]
    prompt_ids = [torch.tensor(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    completions = [torch.tensor(example.completion) for example in examples]
    lengths = torch.tensor([len(ids) for ids in completions])
    ids = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True).to(device)  # (B, T)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)  # (B, T)
    unknown = torch.zeros(ids.shape, device=device)
    return Rollout(
        prompt_ids=prompt_ids,
        draws=ids[..., None],
        weights=mask[..., None].float(),
        draw_mask=mask[..., None],
        logprobs=unknown[..., None],
        trace_ids=ids,
        completion_mask=mask,
        is_soft=torch.zeros_like(mask),
        entropy=unknown,
        finish=["stop"] * len(examples),
        texts=tokenizer.batch_decode(completions, skip_special_tokens=True),
    )
