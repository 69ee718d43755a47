"""Problems with checkable answers, and the prompts that ask for them.

Four sources, one shape (question, gold answer, worked solution):
  gsm8k        8.5k grade-school word problems (Cobbe et al. 2021), official splits, from the hub
  any file     the same rows on disk: {"question": ..., "answer": "... #### 18"}, through `path`; as JSON lines, a JSON
               array, CSV, Parquet, or a folder of them
  arithmetic   word problems generated here, for the embedded tiny model: no network, no end
  two_step     two additions or subtractions, generated here, for a real model too small for GSM8K (SmolLM2-135M)

Left out on purpose: few-shot examples, question rewriting, curricula. R1-Zero starts from the bare question.

    python rldatasets.py arithmetic test        # print a few problems and the prompt made of them
"""

import dataclasses
import functools
import random
import sys
import zlib
from dataclasses import dataclass

from engine import chat_templates, dataset_files

SPLITS = ("train", "validation", "test")
GENERATED = ("arithmetic", "two_step")
DATASETS = ("gsm8k", *GENERATED)
NUM_GENERATED = 8192  # problems of a split, where no other number is asked for


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the gold number as text, e.g. "1,234"
    solution: str  # worked steps, then "#### answer"


def load_problems(name: str, split: str, limit: int | None = None, path: str | None = None) -> list[Problem]:
    """The first `limit` problems of a split (all of them, or NUM_GENERATED generated ones, when None).

    name: one of DATASETS; split: one of SPLITS (GSM8K has no validation split).
    path: a file with rows (engine/dataset_files.py has the formats), or a folder with one for each split, read in
    place of the hub. The columns may have other names: see QUESTION and ANSWER.
    Rows without a question or a gold answer are dropped, counted and named on stderr. Gold answers that are no number
    are counted there too.
    Raises ValueError, one line, for an unknown name or split, a missing file, or when nothing usable is left.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if path is not None:
        return _parse_rows(dataset_files.read_rows(path, split), limit, where=f"{path} ({split})")
    if name in GENERATED:
        generate = {"arithmetic": generate_arithmetic, "two_step": generate_two_step}[name]
        return generate(split, NUM_GENERATED if limit is None else limit)
    if name == "gsm8k":
        return _parse_rows(enumerate(_download_gsm8k(split), start=1), limit, where=f"gsm8k ({split})")
    raise ValueError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}, or give a path to a file")


def bare_question(question: str) -> str:
    """What two problems are the same by: the question, however its white space is set."""
    return " ".join(question.split())


def overlap_note(train: list[Problem], test: list[Problem]) -> str | None:
    """Says how many test questions are in the training data too, or None if none is. White space does not count."""
    known = {bare_question(problem.question) for problem in train}
    both = sum(bare_question(problem.question) in known for problem in test)
    if not both:
        return None
    return (
        f"{both} of {len(test)} test questions are in the training data too, so the evaluation measures in part what "
        "was learned by heart; better: a folder with train.jsonl and test.jsonl that share no question"
    )


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


# What the columns may be called. Of several that a row has, the first counts; of answers, the first with a gold in it.
QUESTION = ("question", "problem", "prompt")
ANSWER = ("answer", "solution", "response")


def _parse_rows(numbered_rows, limit, where) -> list[Problem]:
    problems, bad, columns = [], [], None
    for number, row in numbered_rows:
        if limit is not None and len(problems) >= limit:
            break
        if columns is None and isinstance(row, dict):
            columns = ", ".join(map(str, row)) or "none"
        problem_or_reason = _parse_row(row)
        if isinstance(problem_or_reason, Problem):
            problems.append(problem_or_reason)
        else:
            bad.append(f"row {number}: {problem_or_reason}")
    if bad:
        print(f"{where}: dropped {len(bad)} malformed rows: {'; '.join(bad[:5])}", file=sys.stderr)
    if not problems:
        why = f" ({bad[0]})" if bad else ""
        if columns:
            why += f"; its columns are {columns}; wanted are {' or '.join(QUESTION)}, and {' or '.join(ANSWER)}, which "
            why += "ends in #### 18 or \\boxed{18}, or is a number"
        raise ValueError(f"no usable problem in {where}{why}")
    _check_golds(problems, where)
    return problems


def _check_golds(problems: list[Problem], where: str) -> None:
    """Says how many golds are not one number. Raises ValueError if all are such: no answer would ever be right."""
    bad = [problem.answer for problem in problems if not _is_number(problem.answer)]
    if bad:
        text = f"{where}: {len(bad)} of {len(problems)} gold answers are not one number (as {bad[0][:40]!r})"
        if len(bad) == len(problems):
            raise ValueError(f"{text}: no answer would ever be right")
        print(f"{text}: no answer to them is ever right", file=sys.stderr)


def _is_number(text: str) -> bool:
    from evaluator import parse_number  # here, because the evaluator asks with the prompts of this file

    return parse_number(text) is not None


def _parse_row(row) -> Problem | str:
    """A Problem, or the reason why the row is none."""
    if isinstance(row, ValueError):
        return str(row)
    if not isinstance(row, dict):
        return "not a JSON object"
    question = next((row[name] for name in QUESTION if name in row), None)
    if not isinstance(question, str) or not question.strip():
        return "empty question"
    texts = [_as_text(row[name]) for name in ANSWER if name in row]
    texts = [text for text in texts if text is not None]
    if not texts:
        return "no answer text"
    try:
        "".join([question, *texts]).encode()
    except UnicodeEncodeError:
        return "half a surrogate pair"
    found = [(text, gold) for text, gold in zip(texts, map(_gold, texts), strict=True) if gold]
    if not found:
        return "nothing after ####" if "####" in texts[0] else "no #### in the answer"
    text, gold = found[0]
    if "####" in text:
        return Problem(question.strip(), gold, text.strip())
    steps = text if "\\boxed" in text else next((other for other in texts if other is not text), "")
    return Problem(question.strip(), gold, f"{steps.strip()}\n#### {gold}".strip())


def _as_text(value) -> str | None:
    """The text of an answer's column: tables have numbers there."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return str(value)
    return value if isinstance(value, str) else None


def _gold(text: str) -> str | None:
    """The gold answer: behind the last ####, else in the last \\boxed{...}, else the whole text if it is a number."""
    _, mark, gold = text.rpartition("####")
    if mark:
        return gold.strip() or None
    _, mark, rest = text.rpartition("\\boxed{")
    if mark:
        depth = 1
        for end, character in enumerate(rest):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[:end].strip() or None
        return None
    return text.strip() if _is_number(text) else None


# ---------------------------------------------------------------- the generated tasks

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
    return _generate("arithmetic", make_arithmetic_problem, split, count)


def generate_two_step(split: str, count: int) -> list[Problem]:
    """As generate_arithmetic, of easier problems."""
    return _generate("two_step", make_two_step_problem, split, count)


def _generate(name, make_problem, split, count) -> list[Problem]:
    rng = random.Random(f"{name}-{split}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = make_problem(rng)
        if split_of(problem.question) == split:
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def split_of(question: str) -> str:
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


def make_two_step_problem(rng: random.Random) -> Problem:
    """Two steps of buying and losing; every number is 2-40. In shape as make_arithmetic_problem."""
    name, items = rng.choice(NAMES), rng.choice(ITEMS)
    have = rng.randint(2, 40)
    sentences, steps = [f"{name} has {have} {items}."], []
    for _ in range(2):
        signs = "+" * (have <= 38) + "-" * (have >= 4)
        sign = rng.choice(signs)
        amount = rng.randint(2, 40 - have if sign == "+" else have - 2)
        sentences.append(f"{name} {rng.choice(BUY if sign == '+' else LOSE).format(amount)}.")
        steps.append((have, sign, amount))
        have = calculate(*steps[-1])
    question = " ".join(sentences) + f" How many {items} does {name} have?"
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
    tokenizer,
    question: str,
    *,
    tags: str = "reasoning",
    style: str = "auto",
    prefill: bool = False,
    date: str | None = None,
) -> str:
    """The text the model continues. tags: "reasoning" | "think" names the reasoning block. prefill: the prompt ends in
    `prefilled(tags)`, so that the answer begins inside the reasoning; some chat templates do that by themselves.

    style: "chat" uses the tokenizer's own template (with the instruction as system message, if the template has such),
    "plain" the R1-Zero template, "auto" takes chat where the tokenizer has a template. date: YYYY-MM-DD, for templates
    that write today's; default: the day on which this process asked first.
    Raises ValueError, one line, if there is no template or it cannot be used.
    """
    instruction = INSTRUCTION.format(think=tags)
    if _uses_template(tokenizer, style):
        begun = "" if _template(tokenizer, tags, date).opening else prefilled(tags) * prefill
        return chat_templates.chat_prompt(tokenizer, instruction, question, tags=tags, date=date) + begun
    prompt = PLAIN_TEMPLATE.format(instruction=instruction, question=question)
    return (tokenizer.bos_token or "") + prompt + prefilled(tags) * prefill


def _uses_template(tokenizer, style: str) -> bool:
    if style not in PROMPT_STYLES:
        raise ValueError(f"unknown prompt style {style!r}: choose from {', '.join(PROMPT_STYLES)}")
    if style == "chat" and not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: choose prompt style plain")
    return style != "plain" and bool(tokenizer.chat_template)


def _template(tokenizer, tags: str, date: str | None) -> chat_templates.Template:
    return chat_templates.template_of(tokenizer, INSTRUCTION.format(think=tags), tags, date)


def layout_note(tokenizer, tags: str) -> str | None:
    """Says that the instruction is in the user turn, where the chat template does not show a system message."""
    if _template(tokenizer, tags, None).layout is chat_templates.in_system_turn:
        return None
    return "the template shows no system message: the instruction is in the user turn"


@dataclass(frozen=True)
class PromptFormat:
    """How problems are asked: the options of build_prompt, together. `resolve` adds what depends on the tokenizer."""

    tags: str = "reasoning"
    style: str = "auto"
    prefill: bool = False
    date: str | None = None
    opens_reasoning: str = ""  # how the tokenizer's chat template begins the answer, if with the reasoning tag

    def resolve(self, tokenizer) -> "PromptFormat":
        """The format for the prompts of this tokenizer. Raises ValueError as build_prompt does."""
        uses_template = _uses_template(tokenizer, self.style)
        opening = _template(tokenizer, self.tags, self.date).opening if uses_template else ""
        return dataclasses.replace(self, opens_reasoning=opening)

    def prompt(self, tokenizer, question: str) -> str:
        dated = {} if self.date is None else {"date": self.date}
        return build_prompt(tokenizer, question, tags=self.tags, style=self.style, prefill=self.prefill, **dated)

    @property
    def opening(self) -> str:
        """What of the answer the prompt holds: the opening tag of the reasoning, or nothing."""
        return self.opens_reasoning or prefilled(self.tags) * self.prefill

    def full_text(self, completion: str) -> str:
        """The completion with the opening tag that the prompt has written for the model: what is graded."""
        return self.opening + completion

    def left_to_write(self, full_text: str) -> str:
        """What of a whole answer is left to the model: without the opening tag, if the prompt has it."""
        if not self.opening or full_text.startswith(self.opening):
            return full_text.removeprefix(self.opening)
        return full_text.lstrip().removeprefix(f"<{self.tags}>").lstrip("\n")


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


def replacement_problems(problems: list[Problem], step: int, count: int, seed: int, limit: int) -> list[Problem]:
    """Up to `limit` different problems that problems_of_step(problems, step, count, seed) does not have, in random
    order. A function of its arguments alone too."""
    used = set(problems_of_step(problems, step, count, seed))
    order = random.Random(f"{seed}-{step}-replacements").sample(range(len(problems)), min(len(problems), limit + count))
    return [problem for i in order if (problem := problems[i]) not in used][:limit]


@functools.lru_cache(maxsize=2)
def _epoch_order(num_problems: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}-{epoch}").sample(range(num_problems), num_problems)


def show_problems(name: str, split: str, path: str | None = None) -> None:
    for example in load_problems(name, split, limit=3, path=path):
        print(PLAIN_TEMPLATE.format(instruction=INSTRUCTION.format(think="reasoning"), question=example.question))
        print(f"{example.solution}\n")


if __name__ == "__main__":
    from tracking import command_line

    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python rldatasets.py DATASET SPLIT [PATH]")
    command_line.run_script(show_problems, *sys.argv[1:])
