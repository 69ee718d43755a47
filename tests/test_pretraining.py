"""models/pretrain_tiny.py: what pretraining may see of the generated task, and the tokenizer of the embedded models."""

import random
import re
import unicodedata
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from models import pretrain_tiny
from rldatasets import (
    build_prompt,
    drop_long_prompts,
    generate_arithmetic,
    split_of,
)

EQUATION = re.compile(r"([1-9]\d*)([-+*/])([1-9]\d*)=([1-9]\d*)")


def exact(a: str, sign: str, b: str) -> Fraction | int:
    """What an equation's left side is worth, with no rounding anywhere."""
    a, b = int(a), int(b)
    return Fraction(a, b) if sign == "/" else {"+": a + b, "-": a - b, "*": a * b}[sign]


SIZES = {"train": 30_000, "validation": 3_000, "test": 3_000}


@pytest.fixture(scope="module")
def splits():
    return {name: generate_arithmetic(name, count) for name, count in SIZES.items()}


# ---- What pretraining may see ----------------------------------------------------------------------------------------


def test_pretraining_never_draws_a_held_out_question(splits):
    held_out = {problem.question for name in ("validation", "test") for problem in splits[name]}
    rng = random.Random(0)
    for _ in range(20_000):
        question = pretrain_tiny.draw_problem(rng).question
        assert question not in held_out
        assert split_of(question) == "train"


def test_pretraining_passes_over_held_out_questions_it_comes_upon(splits, monkeypatch):
    """The questions are too many to meet one by chance: so here every second one is held out."""
    pool = splits["train"][:200] + splits["validation"][:100] + splits["test"][:100]
    monkeypatch.setattr(pretrain_tiny, "make_arithmetic_problem", lambda rng: rng.choice(pool))
    rng = random.Random(0)
    drawn = {pretrain_tiny.draw_problem(rng) for _ in range(5000)}
    assert drawn == set(splits["train"][:200])


def test_no_slips_at_rate_0(splits):
    rng = random.Random(0)
    for problem in splits["train"][:1000]:
        steps, answer = pretrain_tiny.with_slips(problem, rng, rate=0.0)
        assert f"{steps}\n#### {answer}" == problem.solution
        assert steps == pretrain_tiny.worked_steps(problem)


def test_every_line_slips_at_rate_1_and_the_next_goes_on_from_it(splits):
    rng = random.Random(0)
    for problem in splits["train"][:2000]:
        steps, answer = pretrain_tiny.with_slips(problem, rng, rate=1.0)
        previous = None
        for line, true_line in zip(steps.split("\n"), problem.solution.split("\n")[:-1], strict=True):
            left, sign, right, stated = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()
            true_left, true_sign, true_right, _ = EQUATION.fullmatch(true_line).groups()
            assert (sign, right) == (true_sign, true_right)
            assert left == (true_left if previous is None else previous)
            # No number is below 0, so a slip down from 0 (after an earlier slip) ends where it began.
            assert int(stated) != exact(left, sign, right) or (stated == "0" and exact(left, sign, right) == 0)
            previous = stated
        assert str(answer) == previous


def test_slips_come_at_their_rate(splits):
    rng, slips, lines = random.Random(1), 0, 0
    for problem in splits["train"][:3000]:
        for line in pretrain_tiny.with_slips(problem, rng, rate=0.2)[0].split("\n"):
            left, sign, right, stated = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()
            lines += 1
            # half of an odd number is rounded down; a result below 0 is 0
            slips += int(stated) != max(0, exact(left, sign, right) // 1)
    assert slips / lines == pytest.approx(0.2, abs=0.02)


def test_drill_pages_are_true():
    rng, signs = random.Random(0), Counter()
    for _ in range(500):
        page = pretrain_tiny.drill(rng)
        assert [learned for _, learned in page] == [False, True] * 8  # only the results are to be predicted
        lines = "".join(text for text, _ in page).splitlines()
        assert len(lines) == 8
        for line, (_, result) in zip(lines, zip(page[::2], page[1::2], strict=True), strict=True):
            left, sign, right, stated = EQUATION.fullmatch(line).groups()
            assert exact(left, sign, right) == int(stated)
            assert result[0] == f"{stated}\n"
            assert all(1 <= int(number) <= 99 for number in (left, right, stated))
            signs[sign] += 1
    assert all(signs[sign] / signs.total() == pytest.approx(0.25, abs=0.03) for sign in "+-*/")


WEB_STYLES = {
    r"<reasoning>(?P<body>.*)</reasoning>\n<answer>(?P<answer>\d+)</answer>": 0.47,
    r"<think>(?P<body>.*)</think>\n<answer>(?P<answer>\d+)</answer>": 0.13,
    r"(?P<body>.*)\n#### (?P<answer>\d+)": 0.15,
    r"(?P<body>.*)\nThe answer is (?P<answer>\d+)\.": 0.15,
    r"(?P<body>)The answer is (?P<answer>\d+)\.": 0.10,
}


def test_web_answers_come_in_the_stated_shares(splits):
    rng = random.Random(0)
    styles, bodies, worked_right = Counter(), Counter(), Counter()
    for problem in splits["train"][:20_000]:
        text = pretrain_tiny.web_answer(problem, rng)
        [(style, match)] = [(s, m) for s in WEB_STYLES if (m := re.fullmatch(s, text, re.DOTALL))]
        styles[style] += 1
        if match["body"] == "I guess.":
            bodies["blurted"] += 1
            assert match["answer"] == problem.answer
        elif match["body"]:
            bodies["worked"] += 1
            right = match["answer"] == problem.answer
            worked_right[right] += 1
            assert match["body"].endswith(f"={match['answer']}")
            assert not right or len(match["body"].split("\n")) == problem.solution.count("\n")
    for style, share in WEB_STYLES.items():
        assert styles[style] / 20_000 == pytest.approx(share, abs=0.015), style
    assert bodies["blurted"] / bodies.total() == pytest.approx(0.5, abs=0.015)
    # 4 % slips a step, two to four steps: 1 - mean(0.96^2, 0.96^3, 0.96^4) = 11 %
    assert worked_right[False] / worked_right.total() == pytest.approx(0.11, abs=0.015)


# ---- The tiny models' tokenizer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return pretrain_tiny.train_tokenizer(random.Random(0))


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


ODD_TEXTS = [
    "", " ", "  \n\n \t\r\n", "18", "a , b . do n't  x ?", " leading and trailing ", "naïve café Straße",
    "数学の問題、三つ", "😀👩‍👩‍👧‍👦🇩🇪",
    "\x00\x01\x1b[31m\x7f\x85", "\u200b\u202e\ufeff\u2028", "العربية עברית", "</reasoning>\n<answer>$1,234</answer>",
    "\U0010ffff\ue000\ufffd", "a\u0300" * 3, "#### 5", "{question} {{ 1 }} %s", "x" * 5000,
]  # fmt: skip


def assert_round_trip(tokenizer, text):
    """NFC is Qwen's one normalisation: e + accent becomes é. Beyond that, nothing is lost."""
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    ids = ids_of(tokenizer, text)
    assert tokenizer.decode(ids) == normal
    for marker in tokenizer.all_special_tokens:
        normal = normal.replace(marker, "")
    assert tokenizer.decode(ids, skip_special_tokens=True) == normal


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_round_trip(tiny, text):
    text = unicodedata.normalize("NFC", text)
    assert tiny.decode(ids_of(tiny, text)) == text
    assert_round_trip(tiny, text)


def test_any_text_round_trips(tiny):
    @settings(max_examples=80, deadline=None, database=None)
    @given(st.text(max_size=60))
    def check(text):
        assert_round_trip(tiny, text)

    check()


def test_the_vocabulary_is_full_and_has_every_byte(tiny):
    assert len(tiny) == 512
    assert sorted(tiny.get_vocab().values()) == list(range(512))
    every_byte = set(pre_tokenizers.ByteLevel.alphabet())
    assert len(every_byte) == 256
    assert every_byte <= set(tiny.get_vocab())


@pytest.mark.parametrize("tag", ["reasoning", "think", "answer"])
def test_tags_are_ordinary_text(tiny, tag):
    for text in (f"<{tag}>", f"</{tag}>"):
        ids = ids_of(tiny, text)
        assert len(ids) > 1
        assert not set(ids) & set(tiny.all_special_ids)
        assert tiny.decode(ids, skip_special_tokens=True) == text


def test_chat_markers_are_special(tiny):
    for marker in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        [marker_id] = ids_of(tiny, marker)
        assert marker_id in tiny.all_special_ids
        assert tiny.decode([marker_id], skip_special_tokens=True) == ""
    assert len(tiny.all_special_ids) == 3
    assert (tiny.eos_token, tiny.pad_token, tiny.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


def test_digits_stand_alone(tiny):
    assert [tiny.decode([i]) for i in ids_of(tiny, "12345+99")] == ["1", "2", "3", "4", "5", "+", "9", "9"]


def test_the_tokenizer_is_the_same_every_time(tiny):
    random.seed(1)
    again = pretrain_tiny.train_tokenizer(random.Random(0))
    assert again.backend_tokenizer.to_str() == tiny.backend_tokenizer.to_str()


def test_every_problem_fits_the_tiny_preset(tiny, splits):
    problems = splits["test"][:1024] + splits["train"][:2000]
    assert drop_long_prompts(problems, tiny, 128) == problems


@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_learns_answers_and_not_questions(tiny, splits, stage, monkeypatch):
    pool = splits["train"][:50] + splits["test"][:50]
    monkeypatch.setattr(pretrain_tiny, "make_arithmetic_problem", lambda rng: rng.choice(pool))
    input_ids, labels = pretrain_tiny.make_batch(tiny, 24, stage, random.Random(0))
    assert input_ids.shape == labels.shape
    questions = {problem.question: problem for problem in splits["train"][:50]}
    for row, row_labels in zip(input_ids, labels, strict=True):
        learned = row_labels != -100
        assert (row[learned] == row_labels[learned]).all()
        text, answer = tiny.decode(row), tiny.decode(row[learned])
        if text.startswith("<|im_start|>"):
            body = text.split("<|endoftext|>")[0]  # the padding
            question = body.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
            assert question in questions
            assert body == build_prompt(tiny, question) + answer
            assert answer.endswith("<|im_end|>")
            if stage == 1:
                assert answer == questions[question].solution + "<|im_end|>"
        else:
            assert stage == 1
            results = [line.split("=")[1] for line in text.split("<|endoftext|>")[0].splitlines()]
            assert answer.splitlines() == results
