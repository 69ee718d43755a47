"""The samples of the report: groups of training answers, and test problems in the first and the last evaluation.

samples.jsonl of a long run is larger than a page may be. It is read twice: once to index where each group is and how
large (no text is kept), and once to read the groups that are selected. A last line that a killed run left incomplete is
skipped.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tracking.pages import to_json
from tracking.report_curves import evenly_spaced

MAX_STEPS = 50  # with samples, if not all samples fit
SAMPLE_BYTES = 20_000_000  # of JSON, all samples together
MAX_CHARS = 20_000  # of one text
MAX_TOKENS = 4_000  # of an answer whose tokens are shown one by one


@dataclass
class AnswerGroup:
    """Where the answers to one problem of a training step are in samples.jsonl."""

    offsets: list[int]  # bytes from the start of the file, one per answer
    size: int  # estimated bytes of JSON on the page
    has_tokens: bool  # whether the first answer has its tokens one by one


# ---------------------------------------------------------------- reading samples.jsonl


def read_rows(file: Path) -> Iterator[tuple[int, int, dict]]:
    """(offset, size in bytes, row) of every complete row of samples.jsonl."""
    offset = 0
    with open(file, "rb") as lines:
        for line in lines:
            row = parse_row(line)
            if row:
                yield offset, len(line), row
            offset += len(line)


def parse_row(line: bytes) -> dict | None:
    """None if the line is incomplete, or lacks the step, the problem or the answer.

    Python writes NaN and Infinity into JSON, which browsers refuse: they become None.
    """
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except ValueError:
        return None
    named = isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("completion"), str)
    problem = "prompt" if named and row.get("split") == "train" else "question"
    return row if named and isinstance(row.get(problem), str) else None


def has_token_detail(row: dict) -> bool:
    """Whether a row has its tokens one by one, with three values each, and few enough of them to show."""
    tokens = row.get("tokens")
    lists = [tokens, row.get("logprobs"), row.get("entropy"), row.get("ratio")]
    return all(isinstance(x, list) and len(x) == len(tokens) for x in lists) and len(tokens) <= MAX_TOKENS


def index_samples(file: Path, group_size: int | None) -> tuple[dict[int, list[AnswerGroup]], dict[int, list[dict]]]:
    """({step: its groups}, {step: the test rows} of the first and the last evaluation). Both empty without a file.

    Consecutive rows of the same step and prompt are one group, of at most `group_size` answers.
    """
    groups, evaluations, previous = {}, {}, None
    for offset, size, row in read_rows(file) if file.exists() else ():
        step = row["step"]
        if "game" in row:  # report_games.py shows it
            continue
        if row.get("split") != "train":
            evaluations.setdefault(step, []).append(row)
            for between in sorted(evaluations)[1:-1]:
                del evaluations[between]
            continue
        of_step = groups.setdefault(step, [])
        if previous != (step, row["prompt"]) or len(of_step[-1].offsets) == group_size:
            of_step.append(AnswerGroup([], len(row["prompt"]), has_token_detail(row)))
            previous = (step, row["prompt"])
        of_step[-1].offsets.append(offset)
        of_step[-1].size += size - len(row["prompt"])  # the prompt is on the page once per group
    return groups, evaluations


def shorten(text: str) -> str:
    """The text; without its middle if it has more than MAX_CHARS characters."""
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out here ...]\n{text[-half:]}"


def read_group(source, group: AnswerGroup) -> str:
    """One group as JSON text: prompt and gold answer once, then what differs. source: samples.jsonl, open as bytes."""
    rows = []
    for offset in group.offsets:
        source.seek(offset)
        rows.append(parse_row(source.readline()))
    answers = []
    for row in rows:
        answer = {name: row.get(name) for name in ("reward", "advantage", "finish", "length")}
        answer["parts"] = {k.removeprefix("reward/"): v for k, v in row.items() if k.startswith("reward/")}
        answer["text"] = shorten(row["completion"])
        if has_token_detail(row):
            answer["tokens"] = row["tokens"]
            for name in ("logprobs", "entropy", "ratio"):
                answer[name] = [x if x is None else float(f"{x:.4g}") for x in row[name]]
        answers.append(answer)
    return to_json({"prompt": shorten(rows[0]["prompt"]), "gold": rows[0].get("gold"), "answers": answers})


# ---------------------------------------------------------------- what fits on the page


def choose_steps(groups: dict[int, list[AnswerGroup]]) -> list[int]:
    """The steps whose samples the page shows, ordered by priority: the first, the last, then the others.

    All steps if all samples fit. Otherwise at most MAX_STEPS, evenly spaced, half of them steps with token detail.
    """
    steps = sorted(groups)
    if sum(group.size for step in steps for group in groups[step]) > SAMPLE_BYTES:
        detailed = [step for step in steps if any(group.has_tokens for group in groups[step])]
        detailed = evenly_spaced(detailed, MAX_STEPS // 2)
        steps = sorted({*detailed, *evenly_spaced(steps, MAX_STEPS - len(detailed))})
    return steps[:1] + steps[-1:] * (len(steps) > 1) + steps[1:-1]


def select_samples(file: Path, groups: dict[int, list[AnswerGroup]]) -> dict[int, list[str]]:
    """{step: its groups as JSON text}, ordered by step, at most SAMPLE_BYTES together.

    Takes the first group of every chosen step, then the second of every step, and so on until the bytes are used up.
    """
    steps = choose_steps(groups)
    selected, bytes_left = {step: [] for step in steps}, SAMPLE_BYTES
    for i in range(max((len(groups[step]) for step in steps), default=0)):
        with open(file, "rb") as source:
            for step in steps:
                if i < len(groups[step]) and bytes_left > 0:
                    text = read_group(source, groups[step][i])
                    bytes_left -= len(text)
                    if bytes_left > 0:
                        selected[step].append(text)
    return {step: selected[step] for step in sorted(selected) if selected[step]}


def samples_note(groups: dict[int, list[AnswerGroup]], selected: dict[int, list[str]]) -> str:
    """One or two sentences above the samples: how many of them the page shows."""
    if not selected:
        return "No samples yet."
    total, shown = sum(map(len, groups.values())), sum(map(len, selected.values()))
    if total == shown:
        return f"All {total:,} groups of {len(groups):,} steps are shown."
    return (
        f"To keep this page small, it shows {shown:,} of {total:,} groups, from {len(selected):,} of {len(groups):,} "
        f"steps (evenly spaced). samples.jsonl has all of them."
    )


def pair_evaluations(evaluations: dict[int, list[dict]]) -> dict:
    """The test problems of the first evaluation, each with its answers in the first and the last: {"steps", "pairs"}.

    An answer is None if that evaluation did not ask the problem. With one evaluation, each pair has one answer.
    """
    steps = sorted(evaluations)
    by_question = [{row["question"]: row for row in evaluations[step]} for step in steps]
    pairs = []
    for question, row in (by_question[0] if by_question else {}).items():
        answers = [rows.get(question) for rows in by_question]
        shown = [
            a and {"text": shorten(a["completion"]), **{k: a.get(k) for k in ("correct", "length", "finish")}}
            for a in answers
        ]
        pairs.append({"question": shorten(question), "gold": row.get("gold"), "answers": shown})
    return {"steps": steps, "pairs": pairs}
