"""evaluator.py, what is said about many completions: behaviour metrics, statistics, and `evaluate`."""

import json
import math
from itertools import combinations, product
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from grader_tables import blocks
from hypothesis import given
from hypothesis import strategies as st

import rldatasets
import rollout
from evaluator import (
    behaviour_metrics,
    evaluate,
    majority_at_k,
    pass_at_k,
    powers_of_two,
    wilson_interval,
)
from rldatasets import Problem, PromptFormat

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


@pytest.mark.parametrize("n, ks", [(2, [2]), (3, [2, 3]), (4, [2, 4]), (9, [2, 4, 8, 9]), (32, [2, 4, 8, 16, 32])])
def test_powers_of_two(n, ks):
    assert powers_of_two(n) == ks


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
                top_weight=1 - 0.5 * is_soft.float(), entropy=2.0 * is_soft.float(),
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
        "mean_entropy": 2 / 4,
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
        prompt_indices=[0],
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
    assert result["pass@2"] == pytest.approx((1 + 2 / 3 + 0 + 2 / 3) / 4)  # of the three pairs of each problem
    assert [key for key in result if key.startswith("pass@")] == ["pass@2", "pass@3"]
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
        (PROBLEMS, {"prompt_format": PromptFormat("xml")}, "'xml'"),
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
