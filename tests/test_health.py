"""health.py: each check fires when it should and not on a good run; the zoo's sick runs are found, its good ones not
accused."""

import gzip
import json
import math
import random
import sys

import pytest
from random_models import ROOT
from run_folders import evaluation, metric_rows

from engine.statistics import pack_outcomes, paired_z, unpack_outcomes, unpaired_z
from tracking import health

sys.path.append(str(ROOT / "plots"))
from zoo import run as zoo

GAINED = [evaluation(0, 0.2), evaluation(16, 0.82), evaluation(32, 0.8)]
GOOD = [*metric_rows(32), *GAINED]
FLAT = [evaluation(0, 0.4), evaluation(32, 0.4)]
FALLING = [evaluation(0, 0.2), evaluation(16, 0.8), evaluation(32, 0.5)]

FIRING = [  # (check, its level then, rows on which it fires)
    (health.accuracy_gain, "warning", [evaluation(0, 0.4), evaluation(32, 0.5)]),
    (health.accuracy_drop, "problem", FALLING),
    (health.greedy_drop, "problem", FALLING),
    (health.reward_without_accuracy, "warning", [*metric_rows(32, reward=1.2), *FLAT]),
    (health.train_test_gap, "warning", [*metric_rows(32, accuracy=0.75), *FLAT]),
    (health.format_rate, "warning", [{"step": step, "format_rate": 0.7} for step in range(1, 9)]),
    (health.zero_std_groups, "warning", metric_rows(zero_std_groups=0.85)),
    (health.truncation, "warning", metric_rows(truncated_rate=0.2)),
    (health.length_growth, "warning", [*metric_rows(32, completion_length=90), *FLAT]),
    (health.repetition, "warning", metric_rows(loop_rate=0.1)),
    (health.entropy_collapse, "warning", metric_rows(entropy=0.15)),
    (health.entropy_rise, "warning", metric_rows(entropy=0.8)),
    (health.gradient_spikes, "warning", [*metric_rows(16), *[{"step": 17 + i, "grad_norm": 2.0} for i in range(3)]]),
    (health.clipping, "warning", metric_rows(clip_frac=0.3)),
    (health.missing_updates, "warning", metric_rows(updates=1)),
    (health.kl_drift, "warning", metric_rows(kl=0.6)),
    (health.logprob_gap, "problem", metric_rows(logprob_gap=0.06)),
    (health.skipped_updates, "warning", metric_rows(skipped_updates=1)),
]


@pytest.mark.parametrize("check, level, rows", FIRING, ids=lambda value: getattr(value, "__name__", ""))
def test_a_check_fires_on_a_bad_run_and_not_on_a_good_one(check, level, rows):
    fired = check(rows)
    assert fired.level == level and fired.rule.startswith(level) and fired.advice
    passed = check(GOOD)
    assert passed.level == "ok" and passed.message and passed.name == fired.name
    assert check([]) is None, "no finding without data"


def test_all_checks_are_tested_and_documented():
    assert {check for check, _, _ in FIRING} == set(health.CHECKS)
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for check, _, rows in FIRING:
        assert f"| {check(rows).name} |" in text, "a row of the table of health checks"


def test_checks_read_only_the_keys_that_a_thinned_log_has():
    """And every key that they read is in it: a thinned log gives the same findings."""
    for _, _, rows in FIRING:
        assert {key for row in rows for key in row} <= set(health.KEYS)


def test_training_accuracy_of_chosen_groups_is_not_compared():
    """Dynamic sampling keeps groups that are neither all right nor all wrong."""
    rows = [*metric_rows(32, accuracy=0.75, replaced_groups=3), *FLAT]
    assert health.train_test_gap(rows) is None


# ---------------------------------------------------------------- the zoo


def test_the_zoo_is_complete():
    assert len(zoo.SICK) >= 10 and len(zoo.GOOD) >= 10
    assert zoo.kept_logs(zoo.SICK | zoo.GOOD) == [*zoo.SICK, *zoo.GOOD]


@pytest.mark.parametrize("name", zoo.SICK)
def test_the_right_check_finds_each_sick_run_of_the_zoo(name):
    found = {finding.name for finding in health.find_health(zoo.kept_log(name)) if finding.level != "ok"}
    assert zoo.SICK[name].finding in found


@pytest.mark.parametrize("name", zoo.GOOD)
def test_no_check_accuses_a_good_run_of_the_zoo(name):
    assert not [finding for finding in health.find_health(zoo.kept_log(name)) if finding.level != "ok"]


@pytest.mark.parametrize("name", [f"{mode}{seed}" for mode in ("seed", "soft") for seed in range(3)])
def test_no_check_accuses_a_run_of_the_results_page_at_any_of_its_evaluations(name):
    """Nor while it was young: the same findings are printed in the course of the run."""
    rows = committed(name)
    for end in [row["step"] for row in rows if "eval/accuracy" in row]:
        findings = health.find_health([row for row in rows if row["step"] <= end])
        assert not [finding for finding in findings if finding.level != "ok"], f"after step {end}"


def test_the_failure_of_the_log_page_is_called_a_collapse():
    assert [f.name for f in health.find_health(committed("lr6e-4")) if f.level != "ok"] == ["Entropy"]


def committed(name):
    with gzip.open(ROOT / f"plots/metrics/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---------------------------------------------------------------- the statistics behind the checks


def with_outcomes(step, outcomes):
    row = evaluation(step, sum(outcomes) / len(outcomes), len(outcomes))
    return row | {f"eval/outcomes{kind}": pack_outcomes(outcomes) for kind in ("", "_greedy")}


def test_outcomes_survive_packing():
    for n in (1, 4, 5, 1024, 1319):
        outcomes = [random.Random(n).random() < 0.5 for _ in range(n)]
        assert unpack_outcomes(pack_outcomes(outcomes), n) == outcomes
    assert pack_outcomes([True, False, False, True, True]) == "98"


def test_standard_errors_by_hand():
    assert paired_z([True] * 3 + [False] * 7, [True] * 2 + [False] + [True] * 5 + [False] * 2) == 4 / math.sqrt(6)
    assert paired_z([True], [True]) == 0
    # 62 and 66 % of 1,319 problems, review example: pooled standard error sqrt(.64 x .36 x 2 / 1319)
    assert unpaired_z(0.62, 1319, 0.66, 1319) == pytest.approx(0.04 / math.sqrt(0.64 * 0.36 * 2 / 1319))
    assert unpaired_z(1.0, 50, 1.0, 50) == 0


def test_false_alarms_are_as_rare_as_the_rules_say():
    """Two evaluations of an unchanged model: the paired test errs in about 2.5 % on each side."""
    rng, alarms = random.Random(0), 0
    for _ in range(400):
        before, after = ([rng.random() < 0.5 for _ in range(256)] for _ in range(2))
        alarms += abs(paired_z(before, after)) > health.SIGNIFICANT
    assert 5 <= alarms <= 40


def test_the_same_problems_show_a_gain_that_intervals_do_not():
    before = [i < 620 for i in range(1000)]
    after = [i < 600 or 700 < i < 760 for i in range(1000)]  # 20 lost, 59 gained
    assert health.accuracy_gain([with_outcomes(0, before), with_outcomes(40, after)]).level == "ok"
    unpaired = [evaluation(0, 0.62, 1000), evaluation(40, 0.659, 1000)]
    assert health.accuracy_gain(unpaired).level == "warning"
    assert health.accuracy_gain([evaluation(0, 0.62, 1319), evaluation(40, 0.66, 1319)]).level == "ok"
    # and a fall of ability: greedy 76 to 67 %
    fall = [with_outcomes(0, [i < 760 for i in range(1000)]), with_outcomes(40, [i < 670 for i in range(1000)])]
    assert health.greedy_drop(fall).level == "problem"


# ---------------------------------------------------------------- more than one metric


def test_checks_consider_more_than_one_metric():
    solved = metric_rows(entropy=0.01, accuracy=0.95, zero_std_groups=0.95, updates=1)
    for check in (health.entropy_collapse, health.zero_std_groups, health.missing_updates):
        assert check(solved).level == "ok", "a solved task needs neither entropy nor differing rewards"
    assert "harder" in health.zero_std_groups(solved).message
    assert "easier" in health.zero_std_groups(metric_rows(zero_std_groups=0.9, accuracy=0.01)).advice
    assert "20.0% to 80.0%" in health.accuracy_gain([evaluation(0, 0.2), evaluation(8, 0.8)]).message
    assert health.accuracy_drop([evaluation(0, 0.2), evaluation(8, 0.8)]).message.endswith("the highest")
    assert health.accuracy_gain([evaluation(0, 0.4), evaluation(8, 0.4)]).level == "ok", "8 steps old"
    rising = [{"step": step, "format_rate": 0.3 + 0.01 * step} for step in range(1, 31)]
    assert health.format_rate(rising).level == "ok", "younger than the format"
    longer = [*metric_rows(32, completion_length=90, reward=1.2), *GAINED]
    for check in (health.length_growth, health.reward_without_accuracy):
        assert check(longer).level == "ok", "the answers became better"


def test_a_collapse_within_the_first_quarter_is_seen():
    entropies = [1.2, 1.1, 1.0, 0.3, 0.1, *[0.02] * 35]
    rows = [{"step": i + 1, "entropy": e, "accuracy": 0.5} for i, e in enumerate(entropies)]
    assert health.entropy_collapse(rows).level == "warning"


def test_problems_come_first_then_warnings():
    findings = health.find_health(metric_rows(truncated_rate=0.5, kl=2.0, logprob_gap=1.0))
    assert [finding.level for finding in findings] == ["problem", "warning", "warning", *["ok"] * (len(findings) - 3)]


def test_one_bad_step_fires_no_check():
    for place in (0, 20):
        rows = metric_rows(32)
        rows[place] |= {"truncated_rate": 1.0, "kl": 9.0, "zero_std_groups": 1.0, "grad_norm": 9.0, "clip_frac": 1.0}
        assert all(finding.level == "ok" for finding in health.find_health([*rows, *GAINED]))
