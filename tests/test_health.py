"""health.py: each check fires when it should and not on a good run."""

import pytest
from run_folders import evaluation, metric_rows

from tracking import health

FIRING = [  # (check, its level then, rows on which it fires)
    (health.accuracy_gain, "warning", [evaluation(0, 0.4), evaluation(8, 0.5)]),
    (health.accuracy_drop, "problem", [evaluation(0, 0.2), evaluation(4, 0.8), evaluation(8, 0.5)]),
    (health.format_rate, "warning", metric_rows(format_rate=0.7)),
    (health.zero_std_groups, "warning", metric_rows(zero_std_groups=0.75)),
    (health.truncation, "warning", metric_rows(truncated_rate=0.2)),
    (health.entropy_collapse, "warning", metric_rows(entropy=0.04)),
    (health.kl_drift, "warning", metric_rows(kl=0.6)),
    (health.logprob_gap, "problem", metric_rows(logprob_gap=0.06)),
    (health.skipped_updates, "warning", metric_rows(skipped_updates=1)),
]


@pytest.mark.parametrize("check, level, rows", FIRING, ids=lambda value: getattr(value, "__name__", ""))
def test_a_check_fires_on_a_bad_run_and_not_on_a_good_one(check, level, rows):
    fired = check(rows)
    assert fired.level == level and fired.rule.startswith(level) and fired.advice
    passed = check([*metric_rows(), evaluation(0, 0.2), evaluation(4, 0.82), evaluation(8, 0.8)])
    assert passed.level == "ok" and passed.message and passed.name == fired.name
    assert check([]) is None, "no finding without data"


def test_all_checks_are_tested():
    assert {check for check, _, _ in FIRING} == set(health.CHECKS)


def test_checks_consider_more_than_one_metric():
    solved = health.entropy_collapse(metric_rows(entropy=0.01, accuracy=0.95))
    assert solved.level == "ok", "a solved task needs no entropy"
    assert "harder" in health.zero_std_groups(metric_rows(zero_std_groups=0.9, accuracy=0.95)).advice
    assert "easier" in health.zero_std_groups(metric_rows(zero_std_groups=0.9, accuracy=0.01)).advice
    assert "20.0% to 80.0%" in health.accuracy_gain([evaluation(0, 0.2), evaluation(8, 0.8)]).message
    assert health.accuracy_drop([evaluation(0, 0.2), evaluation(8, 0.8)]).message.endswith("the highest")


def test_problems_come_first_then_warnings():
    findings = health.find_health(metric_rows(truncated_rate=0.5, kl=2.0, logprob_gap=1.0))
    assert [finding.level for finding in findings] == ["problem", "warning", "warning", *["ok"] * (len(findings) - 3)]


def test_one_bad_step_at_the_start_fires_no_check():
    rows = metric_rows()
    rows[0] |= {"truncated_rate": 1.0, "format_rate": 0.0, "kl": 9.0, "zero_std_groups": 1.0}
    assert all(finding.level == "ok" for finding in health.find_health(rows))
