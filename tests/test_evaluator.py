"""Tests of evaluator.py: the grading tables, the reward hacks, hostile text, metrics and statistics against values
computed by hand or by brute force, and evaluate with a scripted stand-in for generate."""

import json
import math
import re
import signal
from fractions import Fraction

import pytest
from grader_tables import CHANGED_18, DIGITS_5000, EQUAL, NEVER_18, NEVER_OTHER, STRUCTURE, blocks, expand
from hypothesis import given
from hypothesis import strategies as st

import evaluator
from engine.units import BEHIND, CHANGING, COUNTED_PLURALS, LABEL_WORDS, LENGTHS, LINKS, SUBJECTS, UNITS
from evaluator import (
    REWARDS,
    TAGS,
    accuracy_reward,
    answers_match,
    behaviour_metrics,
    extract_answer,
    extract_answer_flexible,
    format_reward,
    parse_number,
    parse_rewards,
    score,
    total,
)

# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gold, candidate", [(gold, text) for gold, texts in EQUAL.items() for text in texts])
def test_equal_answers(gold, candidate):
    assert answers_match(candidate, gold) is True
    assert answers_match(candidate, "7") is False
    for tags in TAGS:
        assert accuracy_reward(blocks(candidate, tags=tags), gold, tags) == 1.0


@pytest.mark.parametrize("candidate", NEVER_18)
def test_never_18(candidate):
    assert answers_match(candidate, "18") is False
    assert accuracy_reward(blocks(candidate), "18") == 0.0


def test_a_thing_that_the_question_counts_is_a_unit():
    question = "How many zorbs and 12 quarters does he own, if half of the 30 Flings are gone and 3 dozen kleps came?"
    for text in ("18 zorbs", "18 flings", "18 quarters", "18 fling", "$18 zorbs", "18 zorbs in total", "zorbs: 18"):
        assert answers_match(text, "18", question) is True
        assert answers_match(text, "18") is False
        assert accuracy_reward(blocks(text), "18", "reasoning", question) == 1.0
    for text in ("18 half", "18 halves", "18 dozen", "18 gone", "18 many", "18 owns", "18 if", "half: 18", *CHANGED_18):
        assert answers_match(text, "18", question) is False or text == "18 quarters"


@pytest.mark.parametrize("question", [" ", "a" * 10**6, "how many " * 10**5, "1 " * 10**6, "\ud800s", "18 halves"])
def test_a_hostile_question_names_nothing(question, no_hang):
    assert answers_match("18 halves", "18", question) is False
    assert answers_match("18", "18", question) is True


def test_a_word_that_changes_a_value_is_never_a_unit():
    for word in CHANGING:
        assert answers_match(f"18 {word} eggs", "18", f"how many {word}") is (word in ("more", "fewer")), word
        if word not in LABEL_WORDS | LINKS | SUBJECTS:
            assert answers_match(f"{word.capitalize()} has 18 eggs", "18", f"how many {word}") is False, word


def test_no_word_is_a_unit_and_changes_a_value():
    assert not CHANGING & (UNITS | LENGTHS | COUNTED_PLURALS | BEHIND)


@pytest.mark.parametrize("candidate, gold", NEVER_OTHER)
def test_never_equal(candidate, gold):
    assert answers_match(candidate, gold) is False


# Refused because it is not one plain number, whatever the gold may be.
@pytest.mark.parametrize(
    "candidate",
    [
        "18 or 19", "18, 19", "18\n19", "18 eggs and 3 hens", "18-19", "9*2", "2×9", "18!", "18^1", "1.8e1",
        "1e999999999", "9**9**9", DIGITS_5000, "0x12", "1_8", "1 8", "12,34", "1, 234", "{18}", "١٨", "１８",
        "nan", "inf", "", "1/0", "--3",
    ],
)  # fmt: skip
def test_not_a_number_at_all(candidate):
    assert parse_number(candidate) is None


def test_a_missing_answer_matches_nothing():
    assert answers_match(None, "18") is False
    assert parse_number(None) is None


def test_length_is_capped_after_white_space_is_dropped():
    cap = evaluator.MAX_ANSWER_CHARS
    assert parse_number("1" * cap) == int("1" * cap)
    assert parse_number("1" * (cap + 1)) is None
    assert parse_number(" " * 10_000 + "18" + "\n" * 10_000) == 18


def test_arithmetic_is_exact():
    big = "123456789012345678901234567890"
    assert answers_match(big, big)
    assert not answers_match(big[:-1] + "1", big)
    assert answers_match("0.1", "1/10")
    assert not answers_match("0." + "3" * 40, "1/3")
    assert parse_number("2.50") == Fraction(5, 2)


@given(st.integers(-(10**12), 10**12))
def test_every_usual_way_to_write_an_integer(n):
    for text in (f"{n}", f"{n:,}", f"{n}.0", f"**{n:,}**", rf"\boxed{{{n}}}", f"{n} dollars", f"x = {n}", f"{2 * n}/2"):
        assert parse_number(text) == n
        assert answers_match(text, f"{n:,}")
        assert not answers_match(text, str(n + 1))


@given(st.integers(0, 10**9), st.integers(1, 8))
def test_decimals_and_fractions_agree(n, places):
    decimal = f"{n // 10**places}.{n % 10**places:0{places}d}"
    assert parse_number(decimal) == Fraction(n, 10**places) == parse_number(f"{n}/{10**places}")


@given(st.integers(0, 999), st.integers(0, 99_999), st.sampled_from([",", ", ", " ", "_", " ,", ".,"]))
def test_only_groups_of_three_are_thousands(head, tail, separator):
    text = f"{head}{separator}{tail}"
    grouped = separator == "," and head > 0 and len(str(tail)) == 3
    assert parse_number(text) == (int(f"{head}{tail}") if grouped else None)


# ---- Structure -------------------------------------------------------------------------------------------------------


# R, /R, A, /A stand for the four tags. (completion, accuracy with gold 18, format)
@pytest.mark.parametrize("tags", ["reasoning", "think"])
@pytest.mark.parametrize("text, accuracy, well_formed", STRUCTURE)
def test_structure(text, accuracy, well_formed, tags):
    completion = expand(text, tags)
    assert accuracy_reward(completion, "18", tags) == accuracy
    assert format_reward(completion, tags) == well_formed
    if well_formed:
        assert extract_answer(completion, tags) is not None


def test_tag_styles():
    assert TAGS == {"reasoning": ("reasoning", "answer"), "think": ("think", "answer")}
    r1 = "<think>Nine and nine.</think>\n<answer>18</answer>"
    ours = "<reasoning>Nine and nine.</reasoning>\n<answer>18</answer>"
    assert (extract_answer(r1, "think"), extract_answer(r1)) == ("18", None)
    assert (extract_answer(ours), extract_answer(ours, "think")) == ("18", None)
    assert (format_reward(r1, "think"), format_reward(r1), format_reward(ours), format_reward(ours, "think")) == (
        1,
        0,
        1,
        0,
    )


@pytest.mark.parametrize("outer", ["Reasoning", "reasoning ", " reasoning", "REASONING", "reason.ng", "reasoning/"])
def test_tags_are_literal(outer):
    completion = f"<{outer}>r</{outer}><answer>18</answer>"
    assert format_reward(completion) == 0.0
    assert extract_answer(completion) is None


def test_extract_answer_strips_and_keeps_lines():
    assert extract_answer(blocks("\n 18 dollars \n")) == "18 dollars"
    assert extract_answer(blocks("18\n19")) == "18\n19"
    assert extract_answer(blocks("")) == ""
    assert extract_answer(blocks("18") + " So the total is 19.") == "18"


def test_unknown_tags_are_named():
    for grade in (extract_answer, format_reward):
        with pytest.raises(ValueError, match="'xml'.*reasoning, think"):
            grade(blocks("18"), "xml")


PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "<think>", " ", "\n", "18", "r", "<", ">", "answer>"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_format_equals_one_anchored_pattern(completion):
    """The naive form: one pattern over the whole string, with a look-ahead at every character."""
    inside = r"((?:(?!</?(?:reasoning|answer)>).)*)"
    pattern = rf"\s*<reasoning>{inside}</reasoning>\s*<answer>{inside}</answer>\s*"
    match = re.fullmatch(pattern, completion, re.DOTALL)
    expected = match is not None and match[1].strip() != ""
    assert format_reward(completion) == expected
    if match:
        assert extract_answer(completion) == match[2].strip()


@given(st.permutations(PIECES[:4]))
def test_only_one_order_of_the_tags_counts(order):
    completion = "18".join(["", *order, ""])
    in_order = list(order) == PIECES[:4]
    assert (extract_answer(completion) is not None) == in_order


# ---- Reward hacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion",
    [
        blocks("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18"),
        blocks(" ".join(map(str, range(100)))),
        blocks("18 18 18"),
        blocks("18, 18"),
        blocks("17 18"),
        blocks("18 17"),
        blocks("18 18 19 18"),
        blocks("18 or maybe 20"),
        blocks("between 17 and 18"),
        blocks("", reasoning="The answer is 18."),
        blocks("see above", reasoning="18"),
        blocks("18", reasoning="<answer>18</answer>"),
        "<reasoning>18</reasoning>",
        "<reasoning>r</reasoning>" + "".join(f"<answer>{n}</answer>" for n in range(17, 20)),
        "<reasoning>r</reasoning><answer>18</answer><answer>18</answer>",
        "<answer>18</answer><reasoning>r</reasoning>",
        "</reasoning>r<reasoning></answer>18<answer>",
        "<reasoning><reasoning>r</reasoning></reasoning><answer>18</answer>",
        "<reasoning>r</reasoning><answer><answer>18</answer></answer>",
        "<reasoning>r<answer>18</answer></reasoning>",
        "<answer><reasoning>r</reasoning>18</answer>",
    ],
)
def test_reward_hacks_score_nothing(completion):
    assert accuracy_reward(completion, "18") == 0.0


# ---- Flexible answer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("The answer is 18.", "18"),
        ("18", "18"),
        ("#### 18", "18"),
        ("First 12, then 18", "18"),
        ("She has 18 eggs and 3 hens.", "3"),
        ("It costs $18.50 in all.", "18.50"),
        ("It costs $1,234.", "1234"),
        ("1,234,567 people", "1234567"),
        ("It is 1,234.50!", "1234.50"),
        ("12, 34", "34"),
        ("1,2345", "2345"),
        # whole numbers or none, never a piece of one
        ("So the total is 9{,}500.", "9500"),
        (r"So the total is $9\,500$.", "9500"),
        (r"So \$1{,}234{,}567.50 in all", "1234567.50"),
        ("9\u202f500 km", "9500"),
        ("9'500 km", "9500"),
        ("It costs $1.000.000", None),
        ("It costs 1.000.000,50", "50"),
        ("on 12/25/2020", None),
        ("on 2020-12-25", None),
        ("at 3:30", None),
        ("1.8e1", None),
        ("1e-5", None),
        ("0x12", None),
        ("10^2", None),
        ("10^{2}", None),
        ("10^{-2}", None),
        ("x_1", None),
        ("1_8", None),
        ("192.168.1.1", None),
        (r"so \frac{1}{2} of it", "1/2"),
        (r"so $\frac12$", "1/2"),
        (r"so $-\dfrac{3}{4}$", "-3/4"),
        ("2 1/2 hours", "2 1/2"),
        ("2½ hours", "2 1/2"),
        ("9 36/2", "36/2"),
        ("It costs €18.", "18"),
        ("= −18", "-18"),
        ("x=-18", "-18"),
        ("(5)-3", "3"),
        ("between 17-18", "18"),
        ("1111,234", "234"),
        ("so -3", "-3"),
        ("so −3 degrees", "-3"),
        ("so –3", "-3"),
        ("a loss of -$3.", "-3"),
        ("(-3)", "-3"),
        ("20-2", "2"),
        ("x-2", "2"),
        ("(20)-2", "2"),
        ("17–18", "18"),
        ("about .5 of it", ".5"),
        ("and so...5", "5"),
        ("half, 1/2", "1/2"),
        (r"\boxed{18}", "18"),
        ("**18**", "18"),
        ("18%", "18"),
        ("<reasoning>9 + 9</reasoning><answer>18</answer>", "18"),
        ("<answer>18", "18"),
        ("18" + " words" * 1000, "18"),
        ("18 and then １９ and ٢٠", "18"),
        ("no number", None),
        ("", None),
        ("１８", None),
        (DIGITS_5000, None),
    ],
)
def test_flexible_answer_is_the_last_number(completion, expected):
    assert extract_answer_flexible(completion) == expected
    if expected:
        assert parse_number(expected) is not None


@given(st.text("abc \n.<>()", max_size=300), st.integers(-(10**9), 10**9), st.text("abc \n.<>()!$", max_size=300))
def test_flexible_answer_is_found_anywhere(before, n, after):
    assert answers_match(extract_answer_flexible(f"7 {before} {n:,}{after}"), str(n))


# ---- Hostile text ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hang():
    """Turns an endless match into a failure; far above any real run time."""

    def give_up(signum, frame):
        raise TimeoutError("grading hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


HOSTILE = [
    "a", "1", "9", " ", "\n", "\x00", "<", ">", "<reasoning>", "</reasoning>", "<answer>", "</answer>",
    "<reasoning><answer>", "<reasoning></reasoning>", "<answer>18</answer>", "1,", "1,234,", "1.", "0.", "1/",
    "1 ", "-", "- ", "$", "$1", "(", "()", "(1)", "**", "`", "\\", "\\text{", "\\text{1}", "\\frac{",
    "\\frac{1}{2}", "\\boxed{", "{", "}", "x = ", "x", "a b ", "18 a", "check ", "check \n", "go over the ",
    "wait ", "re-", "１", "é", "\ud800", "😀",
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_a_megabyte_of_anything_is_graded(unit, no_hang):
    text = (unit * (1_000_000 // len(unit) + 1))[:1_000_000]
    for completion in (text, "<reasoning>" + text, "<answer>" + text + "</answer>"):
        assert accuracy_reward(completion, "18") == 0.0
        assert format_reward(completion) == 0.0
    assert answers_match(text, "18") is False
    assert answers_match("18" + text, "18") is (text.strip() == "")
    # the same text inside a well-formed completion does no harm, unless it has tags of its own
    tags_inside = "reasoning>" in unit or "answer>" in unit
    completion = f"<reasoning>r{text}</reasoning><answer>18</answer>"
    assert accuracy_reward(completion, "18") == format_reward(completion) == float(not tags_inside)
    assert parse_number(extract_answer_flexible(text + " 18 ")) == 18
    metrics = behaviour_metrics([text], [1], ["stop"], [False])
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("unit", HOSTILE)
def test_the_longest_text_that_is_parsed_does_not_hang(unit, no_hang):
    text = (unit * evaluator.MAX_ANSWER_CHARS)[: evaluator.MAX_ANSWER_CHARS]
    for candidate in (text, text[:-2] + "18", text[:49] + "18" + text[:49][::-1], "18 " + text[:-3], "x" + text[:-1]):
        assert len(candidate) <= evaluator.MAX_ANSWER_CHARS
        assert answers_match(candidate, "7") is False


def test_nested_and_markup_completions(no_hang):
    assert format_reward("<reasoning>" * 50_000 + "</reasoning>" * 50_000 + "<answer>18</answer>") == 0.0
    script = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    assert format_reward(blocks("18", reasoning=script)) == 1.0
    assert accuracy_reward(blocks(script), "18") == 0.0


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "touched"
    assert accuracy_reward(blocks(f"open({str(target)!r}, 'w')"), "18") == 0.0
    assert not target.exists()


fragments = st.sampled_from(
    PIECES + EQUAL["18"] + EQUAL["-3"] + ["\\frac{", "}{", "{", "}", "$", "(", ")", "\ud800", "\x00"]
)


@given(
    st.one_of(st.text(), st.lists(fragments, max_size=10).map("".join)), st.sampled_from(["18", "-3", "", "x", "1/0"])
)
def test_grading_never_raises(text, gold):
    for completion in (text, blocks(text)):
        for tags in TAGS:
            weights = dict.fromkeys(REWARDS, 1.0)
            assert all(0.0 <= value <= 1.0 for value in score(completion, gold, weights, tags).values())
        answer = extract_answer_flexible(completion)
        assert answer is None or re.search("[0-9]", answer)
    metrics = behaviour_metrics([text, text], [1, 2], ["stop", "length"], [True, False])
    assert all(math.isfinite(value) for value in metrics.values())


# ---- Rewards by name -------------------------------------------------------------------------------------------------


def test_registry_names():
    assert set(REWARDS) == {"accuracy", "format", "tag_count", "integer"}


@pytest.mark.parametrize(
    "completion, tags, expected",
    [
        (blocks("18"), "reasoning", (1, 1, 1, 1)),
        (blocks("19"), "reasoning", (0, 1, 1, 1)),
        (blocks("18.0"), "reasoning", (1, 1, 1, 1)),
        (blocks("37/2"), "reasoning", (0, 1, 1, 0)),
        (blocks("18 or 19"), "reasoning", (0, 1, 1, 0)),
        (blocks("18", tags="think"), "think", (1, 1, 1, 1)),
        (blocks("18", tags="think"), "reasoning", (0, 0, 0.5, 0)),
        ("Hm. " + blocks("18"), "reasoning", (1, 0, 1, 1)),
        ("18", "reasoning", (0, 0, 0, 0)),
        ("<reasoning>18", "reasoning", (0, 0, 0.25, 0)),
        ("<reasoning>18</reasoning>", "reasoning", (0, 0, 0.5, 0)),
        ("<reasoning>r</reasoning><answer>18", "reasoning", (0, 0, 0.75, 0)),
        ("<reasoning>r</reasoning><answer>18</answer></answer>", "reasoning", (0, 0, 0.75, 0)),
        ("<answer>18</answer>" * 2, "reasoning", (0, 0, 0, 0)),
        ("</answer><answer></reasoning><reasoning>", "reasoning", (0, 0, 1, 0)),
    ],
)
def test_each_reward(completion, tags, expected):
    weights = {"accuracy": 1.0, "format": 1.0, "tag_count": 1.0, "integer": 1.0}
    assert score(completion, "18", weights, tags) == dict(zip(weights, expected, strict=True))


def test_score_is_unweighted_and_total_weighted():
    weights = {"format": 0.5, "accuracy": 2.0}
    scores = score(blocks("18"), "18", weights, "reasoning")
    assert scores == {"format": 1.0, "accuracy": 1.0}
    assert total(scores, weights) == 2.5
    assert total(score(blocks("19"), "18", weights, "reasoning"), weights) == 0.5
    assert total({"accuracy": 1.0, "format": 1.0}, {"accuracy": 1.0, "format": -0.25}) == 0.75


@pytest.mark.parametrize(
    "text, expected",
    [
        ("accuracy:1,format:0.5", {"accuracy": 1.0, "format": 0.5}),
        ("accuracy", {"accuracy": 1.0}),
        ("format,accuracy:2", {"format": 1.0, "accuracy": 2.0}),
        (" accuracy : 1 , tag_count : .25 ", {"accuracy": 1.0, "tag_count": 0.25}),
        ("integer:0,format:-1", {"integer": 0.0, "format": -1.0}),
    ],
)
def test_parse_rewards(text, expected):
    weights = parse_rewards(text)
    assert weights == expected
    assert list(weights) == list(expected)


@pytest.mark.parametrize(
    "text, bad",
    [
        ("speed:1", "'speed'"),
        ("accuracy:1,Format:1", "'Format'"),
        ("accuracy:one", "'one'"),
        ("accuracy:", "''"),
        ("accuracy:1:2", "'1:2'"),
        ("accuracy:nan", "'nan'"),
        ("accuracy:inf", "'inf'"),
        ("format:-inf", "'-inf'"),
        ("accuracy:1e999", "'1e999'"),
        ("accuracy:1,accuracy:1", "'accuracy' is given twice"),
        ("accuracy,format,accuracy:2", "'accuracy' is given twice"),
        ("", "''"),
        ("accuracy:1,", "''"),
        (",", "''"),
        (":1", "''"),
    ],
)
def test_parse_rewards_names_the_bad_value_and_the_choices(text, bad):
    with pytest.raises(ValueError) as error:
        parse_rewards(text)
    message = str(error.value)
    assert bad in message
    assert all(name in message for name in REWARDS)
    assert "\n" not in message


# ---- The real golds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_every_gsm8k_gold_parses(gsm8k, split, count):
    with open(gsm8k / f"{split}.jsonl", encoding="utf-8") as lines:
        golds = [json.loads(line)["answer"].split("#### ")[1] for line in lines]
    assert len(golds) == count
    for gold in golds:
        value = int(gold.replace(",", ""))
        assert parse_number(gold) == value
        assert answers_match(gold, gold) is True
        assert answers_match(f"${value:,}.00" if value >= 0 else f"{value}", gold) is True
        assert answers_match(str(value + 1), gold) is False
