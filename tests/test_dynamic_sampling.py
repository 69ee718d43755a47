"""dynamic_sampling.py: which groups are sampled again, with which problems, and what becomes of the rollout."""

import collections
import json

import pytest
import torch
from small_runs import metrics_of, small_dataset, tiny_config, without_times

import llms
import main
import rldatasets
from dynamic_sampling import StepGroups, replace_groups
from rollout import generate

PROBLEMS = rldatasets.generate_arithmetic("train", 64)


def config_of(**settings):
    return tiny_config("unused", problems_per_step=4, group_size=2, **settings)


def records_of(slots, rewards) -> list[dict]:
    """Two rows for each slot; rewards: {slot: (first, second)}."""
    return [{"row": 2 * slot + n, "reward": rewards[slot][n], "length": 5} for slot in slots for n in (0, 1)]


EQUAL, DIFFERENT = (1.0, 1.0), (0.0, 1.0)


def play(groups: StepGroups, outcomes) -> list[tuple[list, list[int], int]]:
    """Goes through the rounds; outcomes: {slot: rewards} of each. Returns what each round sampled, and its seed."""
    seen = []
    for (problems, slots), rewards in zip(groups.rounds(), outcomes, strict=False):
        seen.append((problems, list(slots), groups.sampling()["seed"]))
        groups.add(None, records_of(slots, rewards))
    return seen


def test_without_dynamic_sampling_there_is_one_round():
    groups = StepGroups(PROBLEMS, config_of(), 3, [0, 1, 2, 3])
    seen = play(groups, [dict.fromkeys(range(4), EQUAL)] * 3)
    assert seen == [(rldatasets.problems_of_step(PROBLEMS, 3, 4, 0), [0, 1, 2, 3], 3)]
    assert groups.cost() == {} and groups.num_tokens == 40


def test_groups_of_equal_rewards_are_replaced_until_they_differ_or_the_rounds_are_over():
    groups = StepGroups(PROBLEMS, config_of(dynamic_sampling=2), 3, [0, 1, 2, 3])
    outcomes = [{0: EQUAL, 1: DIFFERENT, 2: EQUAL, 3: EQUAL}, {0: DIFFERENT, 2: EQUAL, 3: DIFFERENT}, {2: EQUAL}]
    seen = play(groups, outcomes)
    assert [slots for _, slots, _ in seen] == [[0, 1, 2, 3], [0, 2, 3], [2]]
    problems = [problem for problems, _, _ in seen for problem in problems]
    assert len(set(problems)) == len(problems) == 8, "every problem is a new one"
    assert len({seed for _, _, seed in seen}) == 3
    assert groups.equal_slots() == [2] and [r["row"] for r in groups.records] == list(range(8))
    assert groups.cost() == {"replaced_groups": 4, "sampled_tokens": 80}


def test_it_ends_early_when_all_groups_differ():
    groups = StepGroups(PROBLEMS, config_of(dynamic_sampling=5), 1, [0, 1, 2, 3])
    assert len(play(groups, [dict.fromkeys(range(4), DIFFERENT)] * 6)) == 1


def test_a_small_dataset_gives_what_it_has():
    groups = StepGroups(PROBLEMS[:6], config_of(dynamic_sampling=3), 1, [0, 1, 2, 3])
    seen = play(groups, [dict.fromkeys(range(4), EQUAL)] * 4)
    assert [slots for _, slots, _ in seen] == [[0, 1, 2, 3], [0, 1]]
    assert {problem for problems, _, _ in seen for problem in problems} == set(PROBLEMS[:6])


def test_every_process_takes_the_problems_that_one_would():
    """All records are known to all processes; each samples for its own slots."""
    outcomes = [{0: EQUAL, 1: DIFFERENT, 2: EQUAL, 3: EQUAL}, {0: DIFFERENT, 2: EQUAL, 3: EQUAL}, {2: EQUAL, 3: EQUAL}]
    alone = play(StepGroups(PROBLEMS, config_of(dynamic_sampling=2), 7, [0, 1, 2, 3]), outcomes)
    shares = []
    for own in ([0, 1], [2, 3]):
        groups, seen = StepGroups(PROBLEMS, config_of(dynamic_sampling=2), 7, own), []
        for (problems, slots), rewards in zip(groups.rounds(), outcomes, strict=False):
            seen.append((problems, list(slots), groups.sampling()["seed"]))
            groups.add(None, records_of(list(rewards), rewards))
        shares.append(seen)
    for whole, a, b in zip(alone, *shares, strict=True):
        assert whole == (a[0] + b[0], a[1] + b[1], a[2]) and a[2] == b[2]
    assert shares[0][2][:2] == ([], []), "a process without anything to sample joins the round"


def test_replacement_problems_are_a_function_of_the_step():
    options = dict(count=4, seed=5, limit=8)
    one, again = (rldatasets.replacement_problems(PROBLEMS, 2, **options) for _ in range(2))
    assert one == again and len(set(one)) == 8
    assert not set(one) & set(rldatasets.problems_of_step(PROBLEMS, 2, 4, 5))
    assert one != rldatasets.replacement_problems(PROBLEMS, 3, **options)
    counts = collections.Counter()
    for step in range(1, 400):
        counts.update(p.question for p in rldatasets.replacement_problems(PROBLEMS, step, **options))
    assert len(counts) == 64 and max(counts.values()) < 2 * min(counts.values()), "no problem is preferred"


@pytest.mark.parametrize("longer", [False, True])
def test_replaced_groups_are_the_new_ones_and_the_others_stay(longer):
    model, tokenizer = llms.load("tiny")
    lengths = (12, 30) if longer else (30, 12)
    prompts = [problem.question for problem in PROBLEMS]
    old, new = (
        generate(model, tokenizer, prompts[i : i + n], group_size=2, max_new_tokens=T, seed=i)
        for i, n, T in ((0, 3, lengths[0]), (3, 2, lengths[1]))
    )  # fmt: skip
    merged = replace_groups(old, new, [2, 0])
    sources = [(new, 2), (new, 3), (old, 2), (old, 3), (new, 0), (new, 1)]
    assert merged.completion_mask.shape[1] == merged.lengths.max()
    for row, (source, i) in enumerate(sources):
        n = source.lengths[i]
        assert merged.lengths[row] == n and merged.prompt_ids[row] is source.prompt_ids[i]
        assert (merged.finish[row], merged.texts[row]) == (source.finish[i], source.texts[i])
        for name, column in vars(merged).items():
            if isinstance(column, torch.Tensor):
                assert torch.equal(column[row, :n], getattr(source, name)[i, :n]) and not column[row, n:].any(), name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic")
    settings = dict(
        dataset_path=small_dataset(folder / "data", 64), dynamic_sampling=2, max_completion_length=40, eval_problems=2,
        save_steps=2, eval_steps=4,
    )  # fmt: skip
    return main.train(tiny_config(folder / "run", max_steps=4, **settings)), settings


def test_a_run_replaces_groups_and_logs_what_it_cost(run):
    folder, _ = run
    rows = metrics_of(folder)[1:]
    assert sum(row["replaced_groups"] for row in rows) > 0
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        of_step = [s for s in samples if s["step"] == row["step"] and s["split"] == "train"]
        groups = [of_step[i : i + 4] for i in range(0, 16, 4)]
        assert row["zero_std_groups"] == sum(len({r["reward"] for r in g}) == 1 for g in groups) / 4
        kept = sum(s["length"] for s in of_step)
        assert row["sampled_tokens"] >= kept and (row["sampled_tokens"] > kept) == (row["replaced_groups"] > 0)
        assert all(len({s["prompt"] for s in group}) == 1 for group in groups)


def test_a_resumed_run_replaces_the_same_groups(run, tmp_path):
    folder, settings = run
    main.train(tiny_config(tmp_path / "run", max_steps=2, **settings))
    main.train(tiny_config(tmp_path / "run", max_steps=4, resume_from_checkpoint="latest", **settings))
    whole, resumed = (without_times(metrics_of(f)) for f in (folder, tmp_path / "run"))
    for a, b in zip(whole, resumed, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith("eval/")} == {
            k: v for k, v in b.items() if not k.startswith("eval/")
        }
