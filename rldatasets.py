"""Problems with checkable answers, and the prompts that ask for them.

Three sources, one shape (question, gold answer, worked solution):
  gsm8k        8.5k grade-school word problems (Cobbe et al. 2021), official splits, from the hub
  any folder   the same JSON lines on disk: {"question": ..., "answer": "... #### 18"}, through `path`
  arithmetic   word problems generated here, for the embedded tiny model: no network, no end

Left out on purpose: few-shot examples, question rewriting, curricula. R1-Zero starts from the bare question.

    python rldatasets.py arithmetic test        # print a few problems and the prompt made of them
"""

import functools
import json
import random
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "validation", "test")
DATASETS = ("gsm8k", "arithmetic")


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the gold number as text, e.g. "1,234"
    solution: str  # worked steps, then "#### answer"


def load_problems(name: str, split: str, limit: int | None = None, path: str | None = None) -> list[Problem]:
    """The first `limit` problems of a split (all of them, or 8,192 of the endless `arithmetic`, when None).

    name: one of DATASETS; split: one of SPLITS (GSM8K has no validation split).
    path: a JSON-lines file, or a folder holding `<split>.jsonl`, read in place of the hub.
    Rows without a question or a "#### answer" are dropped, counted and named on stderr.
    Raises ValueError for an unknown name or split, a missing file, or when no row is left.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if path is not None:
        return _parse_rows(_read_json_lines(Path(path), split), limit, where=f"{path} ({split})")
    if name == "arithmetic":
        return generate_arithmetic(split, 8192 if limit is None else limit)
    if name == "gsm8k":
        return _parse_rows(enumerate(_download_gsm8k(split), start=1), limit, where=f"gsm8k ({split})")
    raise ValueError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}, or give a path to JSON lines")


# ---------------------------------------------------------------- GSM8K, and anything in its shape


def _download_gsm8k(split):
    if split == "validation":
        raise ValueError("gsm8k has no validation split: choose train or test")
    from datasets import load_dataset  # slow to import, and not needed for local files

    try:
        return load_dataset("openai/gsm8k", "main", split=split)
    except Exception as error:  # the hub client raises many kinds; the reader needs one way out
        raise ValueError(
            f"cannot fetch openai/gsm8k from the hub ({type(error).__name__}): "
            "give a local copy with --dataset_path, or use --dataset_name arithmetic"
        ) from error


def _read_json_lines(path: Path, split: str):
    """Yields (line number, what JSON it holds, or a ValueError with the reason why it holds none)."""
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no dataset file {file}: expected JSON lines with question and answer")
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield number, ValueError("not UTF-8")
            except (ValueError, RecursionError):
                yield number, ValueError("not JSON")


def _parse_rows(numbered_rows, limit, where) -> list[Problem]:
    problems, bad = [], []
    for number, row in numbered_rows:
        if limit is not None and len(problems) >= limit:
            break
        problem_or_reason = _parse_row(row)
        if isinstance(problem_or_reason, Problem):
            problems.append(problem_or_reason)
        else:
            bad.append(f"row {number}: {problem_or_reason}")
    if bad:
        print(f"{where}: dropped {len(bad)} malformed rows: {'; '.join(bad[:5])}", file=sys.stderr)
    if not problems:
        raise ValueError(f"no usable problem in {where}" + (f" ({bad[0]})" if bad else ""))
    return problems


def _parse_row(row) -> Problem | str:
    """A Problem, or the reason why the row is none."""
    if isinstance(row, ValueError):
        return str(row)
    if not isinstance(row, dict):
        return "not a JSON object"
    question, solution = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        return "empty question"
    if not isinstance(solution, str):
        return "no answer text"
    try:
        (question + solution).encode()
    except UnicodeEncodeError:
        return "half a surrogate pair"
    _, mark, gold = solution.rpartition("####")
    if not mark:
        return "no #### in the answer"
    if not gold.strip():
        return "nothing after ####"
    return Problem(question.strip(), gold.strip(), solution.strip())


# ---------------------------------------------------------------- the generated task

NAMES = "Mia Tom Ana Ben Eva Leo Zoe Max Ida Sam".split()
ITEMS = "apples coins books cards shells stamps pens eggs".split()
BUY = ("buys {} more", "finds {} more", "gets {} more")
LOSE = ("loses {}", "gives {} away", "sells {}")
DOUBLE = ("doubles them",)
TRIPLE = ("triples them",)
HALVE = ("gives half away", "loses half")


def generate_arithmetic(split: str, count: int) -> list[Problem]:
    """`count` different problems of a split: the same ones on every machine, more of them on demand.

    A problem belongs to the split that the hash of its question text picks (90 % train, 5 % each of the others),
    so no question can be in two splits however many are made.
    """
    rng = random.Random(f"arithmetic-{split}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = make_arithmetic_problem(rng)
        if arithmetic_split(problem.question) == split:
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def arithmetic_split(question: str) -> str:
    bucket = zlib.crc32(question.encode()) % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def make_arithmetic_problem(rng: random.Random) -> Problem:
    """Two to four steps of buying, losing, doubling, tripling, halving and selling; every number is 1-99.

    The solution has one line `a+b=c` a step and ends in `#### N`, as in GSM8K.
    """
    name, items = rng.choice(NAMES), rng.choice(ITEMS)
    have = rng.randint(2, 60)
    sentences, steps = [f"{name} has {have} {items}."], []
    wanted = items
    num_steps = rng.randint(2, 4)
    for step in range(num_steps):
        moves = [BUY] * 2 if have < 90 else []
        moves += [LOSE] * 2 if have > 5 else []
        moves += [DOUBLE] if have <= 49 else []
        moves += [TRIPLE] if have <= 33 else []
        moves += [HALVE] if have % 2 == 0 else []
        is_last = step == num_steps - 1
        if is_last and 2 <= have <= 49 and rng.random() < 0.3:
            price = rng.randint(2, min(9, 99 // have))
            sentences.append(f"{name} sells each for {price} dollars.")
            steps.append((have, "*", price))
            wanted = "dollars"
        else:
            move = rng.choice(moves)
            if move is BUY:
                operand = ("+", rng.randint(2, 99 - have))
            elif move is LOSE:
                operand = ("-", rng.randint(2, have - 2))
            else:
                operand = {DOUBLE: ("*", 2), TRIPLE: ("*", 3), HALVE: ("/", 2)}[move]
            sentences.append(f"{name} {rng.choice(move).format(operand[1])}.")
            steps.append((have, *operand))
        have = calculate(*steps[-1])
    question = " ".join(sentences) + f" How many {wanted} does {name} have?"
    lines = [f"{a}{sign}{b}={calculate(a, sign, b)}" for a, sign, b in steps]
    return Problem(question, str(have), "\n".join(lines) + f"\n#### {have}")


def calculate(a: int, sign: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]


# ---------------------------------------------------------------- prompts

INSTRUCTION = (
    "First think the problem through, step by step, between <{think}> and </{think}>. "
    "Then give the final number, and nothing else, between <answer> and </answer>."
)

# After the template of DeepSeek-R1-Zero (DeepSeek-AI 2025, table 1): a base model knows no chat markers,
# so the roles are plain words, and the instruction asks for the two blocks without saying how to think.
PLAIN_TEMPLATE = (
    "Below is a dialogue in which a User brings a problem and an Assistant solves it. {instruction}\n"
    "User: {question}\n"
    "Assistant:"
)

PROMPT_STYLES = ("auto", "chat", "plain")


def build_prompt(
    tokenizer, question: str, *, tags: str = "reasoning", style: str = "auto", prefill: bool = False
) -> str:
    """The text the model continues. tags: "reasoning" | "think" names the reasoning block. prefill: the prompt ends in
    `prefilled(tags)`, so that the answer begins inside the reasoning.

    style: "chat" uses the tokenizer's own template (instruction as system message), "plain" the R1-Zero template,
    "auto" takes chat where the tokenizer has a template.
    """
    if style not in PROMPT_STYLES:
        raise ValueError(f"unknown prompt style {style!r}: choose from {', '.join(PROMPT_STYLES)}")
    if style == "auto":
        style = "chat" if tokenizer.chat_template else "plain"
    instruction = INSTRUCTION.format(think=tags)
    begun = prefilled(tags) if prefill else ""
    if style == "plain":
        return (tokenizer.bos_token or "") + PLAIN_TEMPLATE.format(instruction=instruction, question=question) + begun
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: choose prompt style plain")
    messages = [{"role": "system", "content": instruction}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + begun


@dataclass(frozen=True)
class PromptFormat:
    """How problems are asked: the options of build_prompt, together."""

    tags: str = "reasoning"
    style: str = "auto"
    prefill: bool = False

    def prompt(self, tokenizer, question: str) -> str:
        return build_prompt(tokenizer, question, tags=self.tags, style=self.style, prefill=self.prefill)

    def full_text(self, completion: str) -> str:
        """The completion with the opening tag that `prefill` has written for the model: what is graded."""
        return (prefilled(self.tags) if self.prefill else "") + completion


DEFAULT_FORMAT = PromptFormat()


def prefilled(tags: str) -> str:
    """The opening tag that `prefill` writes for the model. With its line break, because `>` and a line break are one
    token of most vocabularies: after a bare `>` the model would be in a place it has hardly seen."""
    return f"<{tags}>\n"


def drop_long_prompts(
    problems: list[Problem], tokenizer, max_prompt_length: int, prompt_format: PromptFormat = DEFAULT_FORMAT
) -> list[Problem]:
    """The problems whose prompt has at most max_prompt_length tokens. Long prompts are dropped, never cut: a cut prompt
    would have lost its start. The number dropped is printed. Raises ValueError when none is left.
    """
    prompts = [prompt_format.prompt(tokenizer, problem.question) for problem in problems]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]]
    kept = [problem for problem, length in zip(problems, lengths, strict=True) if length <= max_prompt_length]
    if not kept:
        raise ValueError(f"max_prompt_length {max_prompt_length}: the shortest prompt has {min(lengths)} tokens")
    if len(kept) < len(problems):
        print(
            f"dropped {len(problems) - len(kept)} of {len(problems)} problems: prompt over {max_prompt_length} tokens"
        )
    return kept


def problems_of_step(problems: list[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The `count` problems of a step (from 1), shuffled anew every epoch. A function of its arguments alone, so that a
    resumed run continues with the next problems."""
    positions = (divmod(i, len(problems)) for i in range((step - 1) * count, step * count))
    return [problems[_epoch_order(len(problems), seed, epoch)[i]] for epoch, i in positions]


@functools.lru_cache(maxsize=2)
def _epoch_order(num_problems: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}-{epoch}").sample(range(num_problems), num_problems)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python rldatasets.py DATASET SPLIT [PATH]")
    try:
        examples = load_problems(sys.argv[1], sys.argv[2], limit=3, path=sys.argv[3] if len(sys.argv) == 4 else None)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    for example in examples:
        print(PLAIN_TEMPLATE.format(instruction=INSTRUCTION.format(think="reasoning"), question=example.question))
        print(f"{example.solution}\n")
