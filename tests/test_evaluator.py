"""Tests of evaluator.py: the grading tables, the reward hacks, hostile text, metrics and statistics against values
computed by hand or by brute force, and evaluate with a scripted stand-in for generate."""

import json
import math
import re
import signal
from fractions import Fraction
from itertools import combinations, product
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from grader_tables import DIGITS_5000, EQUAL, NEVER_18, NEVER_OTHER, STRUCTURE, blocks, expand
from hypothesis import given
from hypothesis import strategies as st

import evaluator
import rldatasets
import rollout
from evaluator import (
    REWARDS,
    TAGS,
    accuracy_reward,
    answers_match,
    behaviour_metrics,
    evaluate,
    extract_answer,
    extract_answer_flexible,
    format_reward,
    majority_at_k,
    parse_number,
    parse_rewards,
    pass_at_k,
    score,
    total,
    wilson_interval,
)
from rldatasets import Problem, PromptFormat

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


# ---- Behaviour metrics -----------------------------------------------------------------------------------------------


def test_behaviour_metrics_by_hand():
    completions = [
        "Wait, let me recheck: two and two is four",  # 9 words, reflects, one R1 word, six 4-grams all unlike
        "a b c d a b c d",  # 8 words, five 4-grams, four of them unlike
        "But I think again",  # 4 words, reflects, one R1 word, one 4-gram
        "no",  # 1 word, no 4-gram
    ]
    metrics = behaviour_metrics(
        completions, [10, 20, 30, 40], ["stop", "length", "stop", "length"], [True, False, False, False]
    )
    assert metrics == pytest.approx(
        {
            "reflect_rate": 0.5,
            "reflect_words": 1000 * 2 / 22,
            "reflection_lift": 0.5,
            "truncated_rate": 0.5,
            "stopped_length": 20.0,
            "repetition": (0 + 0.2 + 0) / 3,
            "loop_rate": 0.0,
            "length_correct": 10.0,
            "length_wrong": 30.0,
        }
    )


def one(text):
    return behaviour_metrics([text], [5], ["stop"], [True])


@pytest.mark.parametrize(
    "phrase",
    [
        "recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "re-examine", "reexamine", "reconsider",
        "double-check", "check again", "think again", "verify again", "go over the steps",
    ],
)  # fmt: skip
def test_every_reflection_phrase(phrase):
    assert one(f"let me {phrase}.")["reflect_rate"] == 1.0
    assert one(f"{phrase.upper()} it")["reflect_rate"] == 1.0
    assert one("I " + phrase.replace(" ", "\n"))["reflect_rate"] == 1.0


@pytest.mark.parametrize(
    "text", ["check against the list", "wait", "check it", "prerecheck", "think, again", "again", "the steps"]
)
def test_no_reflection(text):
    assert one(text)["reflect_rate"] == 0.0


@pytest.mark.parametrize(
    "word", ["wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check"]
)
def test_every_r1_word_is_counted(word):
    assert one(f"{word} {word.title()}, x x")["reflect_words"] == 500.0


@pytest.mark.parametrize("word", ["waiter", "button", "checks", "errors", "await"])
def test_parts_of_words_are_not_counted(word):
    assert one(f"{word} x")["reflect_words"] == 0.0


def test_reflect_words_are_over_all_completions_together():
    metrics = behaviour_metrics(["wait", "x " * 99], [1, 99], ["stop"] * 2, [True] * 2)
    assert metrics["reflect_words"] == pytest.approx(10.0)


@pytest.mark.parametrize(
    "correct, lift",
    [((True, True, False, False), 1.0), ((False, False, True, True), -1.0), ((True, False, True, False), 0.0),
     ((True, True, True, False), 0.5)],
)  # fmt: skip
def test_reflection_lift(correct, lift):
    completions = ["recheck", "rethink", "a", "b"]
    assert behaviour_metrics(completions, [1] * 4, ["stop"] * 4, list(correct))["reflection_lift"] == lift


TWENTY = " ".join(f"w{i}" for i in range(20)) + " "


@pytest.mark.parametrize(
    "text, loops",
    [
        (TWENTY * 3, 1),
        ("so " + TWENTY + "and " + TWENTY + "and " + TWENTY, 1),
        (TWENTY * 2, 0),
        (TWENTY * 3 + "end", 0),
        (TWENTY * 4 + "end", 0),
        ("x " * 22, 1),  # the last 20-gram starts at word 0, 1 and 2
        ("x " * 21, 0),
        ("x y " * 12, 1),
        ("x y " * 11, 0),
        ("x " * 19, 0),
        ("", 0),
    ],
)
def test_loop(text, loops):
    assert one(text)["loop_rate"] == loops


@pytest.mark.parametrize(
    "text, value", [("a b c d", 0.0), ("x x x x x", 0.5), ("x " * 13, 0.9), ("a\nb  c\td a b c d", 0.2)]
)
def test_repetition(text, value):
    assert one(text)["repetition"] == pytest.approx(value)


def test_what_no_row_defines_is_left_out():
    assert behaviour_metrics([], [], [], []) == {}
    everything_right = behaviour_metrics(["a b"], [2], ["length"], [True])
    assert set(everything_right) == {"reflect_rate", "reflect_words", "truncated_rate", "loop_rate", "length_correct"}
    everything_wrong = behaviour_metrics(["recheck"], [2], ["stop"], [False])
    assert set(everything_wrong) == {
        "reflect_rate",
        "reflect_words",
        "truncated_rate",
        "loop_rate",
        "stopped_length",
        "length_wrong",
    }
    assert set(behaviour_metrics([""], [1], ["stop"], [True])) == {
        "reflect_rate", "truncated_rate", "loop_rate", "stopped_length", "length_correct"
    }  # fmt: skip


# ---- Statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        (8, 10, 0.490, 0.943),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (0, 1, 0.0, 0.7935),
        (50, 100, 0.4038, 0.5962),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_known_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-4)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_the_score_equation(case):
    successes, n = case
    low, high = wilson_interval(successes, n, z=1.96)
    assert 0 <= low <= successes / n <= high <= 1
    for end in (low, high):
        assert (successes / n - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-9)


def test_wilson_is_exact_at_the_ends():
    for n in range(1, 300):
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0


def test_wilson_width():
    low, high = wilson_interval(8, 10)
    wider_low, wider_high = wilson_interval(8, 10, z=2.576)
    assert wider_low < low < high < wider_high
    more_low, more_high = wilson_interval(80, 100)
    assert low < more_low < more_high < high


@pytest.mark.parametrize("successes, n", [(-1, 10), (11, 10), (1, 0), (math.nan, 10)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_pass_at_k_equals_enumeration():
    for n in range(1, 8):
        for c, k in product(range(n + 1), range(1, n + 1)):
            draws = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_many_samples():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(10_000, 0, 100) == 0.0
    assert pass_at_k(10_000, 10_000, 1) == 1.0


@pytest.mark.parametrize("n, c, k", [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    "answers, expected",
    [
        (["18", "19", "18"], 1.0),
        (["19", "18", "19"], 0.0),
        (["19", "18", "19", "18.0", "$18"], 1.0),  # equal as numbers vote together
        (["18", "19"], 1.0),  # ties: the first
        (["19", "18"], 0.0),
        (["19", "18", "18", "19"], 0.0),
        ([None, None, None, "18"], 1.0),  # None votes for nothing
        (["18 or 19", "18 or 19", "18"], 1.0),
        ([None, None], 0.0),
        ([], 0.0),
    ],
)
def test_majority(answers, expected):
    assert majority_at_k(answers, "18") == expected


def test_majority_with_a_gold_that_is_no_number():
    assert majority_at_k([None, "x"], "x") == 0.0


# ---- evaluate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Puts a scripted generate in place. The autospec holds calls to the signatures of the real functions.

    Call it with {question: [completion, ...]}: row i of a prompt gets completion i. A completion that ends in "~" ran
    into the length limit; its length is its number of words. Returns the mock, for its calls.
    """

    def install(script):
        def fake_prompt(tokenizer, question, *, tags, style, prefill):
            return f"{tokenizer}|{question}|{tags}|{style}"

        def fake_generate(model, tokenizer, prompts, *, group_size, **settings):
            texts = [script[prompt.split("|")[1]][row] for prompt in prompts for row in range(group_size)]
            lengths = torch.tensor([len(text.split()) for text in texts])
            mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
            finish = ["length" if text.endswith("~") else "stop" for text in texts]
            is_soft = mask & (torch.arange(mask.shape[1]) == 0)  # the first step of every row, at weight 0.5
            return SimpleNamespace(
                texts=texts, finish=finish, completion_mask=mask, lengths=lengths, is_soft=is_soft,
                top_weight=1 - 0.5 * is_soft.float(), entropy=torch.zeros(mask.shape),
            )  # fmt: skip

        monkeypatch.setattr(
            rldatasets, "build_prompt", mock.create_autospec(rldatasets.build_prompt, side_effect=fake_prompt)
        )
        monkeypatch.setattr(rollout, "generate", mock.create_autospec(rollout.generate, side_effect=fake_generate))
        return rollout.generate

    return install


def problem(question, answer):
    return Problem(question=question, answer=answer, solution="")


PROBLEMS = [problem("q0", "18"), problem("q1", "5"), problem("q2", "1,234"), problem("q3", "-3"), problem("q4", "7")]
GREEDY = {
    "q0": [blocks("18", reasoning="let me recheck this")],  # right; 5 words
    "q1": [blocks("6", reasoning="a b c d e f")],  # wrong; 7 words
    "q2": ["<reasoning>r</reasoning> so <answer>$1,234</answer> end"],  # right, but bad format; 4 words
    "q3": ["it is -3"],  # right only to the flexible reading; 3 words
    "q4": ["<reasoning>on and on 8 ~"],  # cut off; 5 words
}


def test_evaluate_greedy(scripted):
    scripted(GREEDY)
    result = evaluate("model", "tok", PROBLEMS)
    low, high = wilson_interval(2, 5)
    expected = {
        "accuracy": 0.4,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_flexible": 0.6,
        "format_rate": 0.4,
        "format_rate_low": low,
        "format_rate_high": high,
        "length": (5 + 7 + 4 + 3 + 5) / 5,
        "soft_share": 5 / (5 + 7 + 4 + 3 + 5),
        "top_weight": 1 - 0.5 * (1 / 5 + 1 / 7 + 1 / 4 + 1 / 3 + 1 / 5) / 5,
        "truncated_rate": 0.2,
        "n": 5,
        "samples": 1,
        "reflect_rate": 0.2,
        "reflect_words": 0.0,
        "reflection_lift": 1.0 - 0.25,
        "stopped_length": (5 + 7 + 4 + 3) / 4,
        "repetition": 0.0,
        "loop_rate": 0.0,
        "length_correct": 4.5,
        "length_wrong": 5.0,
    }
    records = result.pop("records")
    assert result == pytest.approx(expected)
    assert records[2] == {
        "question": "q2",
        "gold": "1,234",
        "completion": GREEDY["q2"][0],
        "finish": "stop",
        "length": 4,
        "soft_steps": 1,
        "top_weight": pytest.approx(1 - 0.5 / 4),
        "correct": True,
        "format": False,
    }
    assert [record["question"] for record in records] == ["q0", "q1", "q2", "q3", "q4"]
    assert [record["correct"] for record in records] == [True, False, True, False, False]
    assert [record["format"] for record in records] == [True, True, False, False, False]
    assert [record["finish"] for record in records] == ["stop"] * 4 + ["length"]
    json.dumps({**result, "records": records})  # plain numbers and text, ready for a log


def test_evaluate_passes_its_settings_on(scripted):
    generate = scripted({"q0": [blocks("18", tags="think")] * 2})
    result = evaluate(
        "model", "tok", PROBLEMS[:1], samples=2, temperature=0.7, max_new_tokens=33, seed=5,
        prompt_format=PromptFormat("think", "plain"),
    )  # fmt: skip
    generate.assert_called_once_with(
        "model",
        "tok",
        ["tok|q0|think|plain"],
        group_size=2,
        max_new_tokens=33,
        temperature=0.7,
        stop_tag=None,
        soft=None,
        seed=5,
        places=[0],
    )
    assert result["accuracy"] == result["format_rate"] == 1.0


@pytest.mark.parametrize("rows_per_batch, sizes", [(256, [5]), (2, [2, 2, 1]), (1, [1] * 5), (5, [5])])
def test_batches_change_nothing_but_the_seeds(scripted, rows_per_batch, sizes):
    generate = scripted(GREEDY)
    result = evaluate("model", "tok", PROBLEMS, rows_per_batch=rows_per_batch, seed=10)
    assert [len(call.args[2]) for call in generate.call_args_list] == sizes
    assert [call.kwargs["seed"] for call in generate.call_args_list] == [10 + i for i in range(len(sizes))]
    assert result == evaluate("model", "tok", PROBLEMS)


SAMPLED = {
    "q0": [blocks("18"), blocks("18.0"), blocks("4")],  # 2 right, majority right
    "q1": [blocks("6"), blocks("6"), blocks("5")],  # 1 right, majority wrong
    "q2": [blocks("1"), "none", blocks("2")],  # 0 right
    "q3": ["so 5", blocks("-3"), "so 5"],  # 1 right, majority right: an answer outside its block has no vote
}


@pytest.mark.parametrize("rows_per_batch, sizes", [(256, [4]), (6, [2, 2]), (7, [2, 2]), (3, [1] * 4), (1, [1] * 4)])
def test_evaluate_several_samples(scripted, rows_per_batch, sizes):
    generate = scripted(SAMPLED)
    result = evaluate("model", "tok", PROBLEMS[:4], samples=3, temperature=1.0, rows_per_batch=rows_per_batch)
    assert [len(call.args[2]) for call in generate.call_args_list] == sizes
    assert (result["n"], result["samples"], len(result["records"])) == (4, 3, 12)
    assert result["accuracy"] == pytest.approx(4 / 12)
    assert result["format_rate"] == pytest.approx(9 / 12)
    assert result["pass@3"] == pytest.approx(3 / 4)
    assert result["maj@3"] == pytest.approx(2 / 4)
    # the interval is over the 4 problems, not the 12 rows
    assert (result["accuracy_low"], result["accuracy_high"]) == pytest.approx(wilson_interval(4 / 3, 4))
    assert (result["format_rate_low"], result["format_rate_high"]) == pytest.approx(wilson_interval(3, 4))
    assert [record["question"] for record in result["records"]] == [
        q for q in ("q0", "q1", "q2", "q3") for _ in range(3)
    ]
    assert [record["completion"] for record in result["records"]] == sum(SAMPLED.values(), [])


def test_one_sample_has_no_pass_or_majority(scripted):
    scripted(GREEDY)
    assert not [key for key in evaluate("model", "tok", PROBLEMS, temperature=1.0) if "@" in key]


def test_the_same_seed_is_asked_for_again(scripted):
    generate = scripted(SAMPLED)
    for _ in range(2):
        evaluate("model", "tok", PROBLEMS[:4], samples=3, temperature=1.0, rows_per_batch=3)
        torch.rand(1)  # moves the global random state between the two
    seeds = [call.kwargs["seed"] for call in generate.call_args_list]
    assert seeds[:4] == seeds[4:] and len(set(seeds)) == 4


def test_metrics_stay_plain_when_nothing_is_right(scripted):
    scripted({"q0": [""]})
    result = evaluate("model", "tok", PROBLEMS[:1])
    assert result["accuracy"] == result["length"] == 0.0
    assert "length_correct" not in result
    assert all(math.isfinite(value) for key, value in result.items() if key != "records")


@pytest.mark.parametrize(
    "problems, settings, message",
    [
        (PROBLEMS, {"samples": 2}, "temperature > 0"),
        (PROBLEMS, {"samples": 2, "temperature": 0.0}, "temperature > 0"),
        (PROBLEMS, {"samples": 0}, "at least 1"),
        ([], {}, "no problems"),
        (PROBLEMS, {"tags": "xml"}, "'xml'"),
    ],
)
def test_evaluate_refuses(scripted, problems, settings, message):
    scripted(GREEDY)
    with pytest.raises(ValueError, match=message):
        evaluate("model", "tok", problems, **settings)


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_only_shown_on_request(scripted, capsys, progress):
    scripted(GREEDY)
    evaluate("model", "tok", PROBLEMS, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("evaluate" in captured.err) is progress


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
