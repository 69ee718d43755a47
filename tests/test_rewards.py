"""rewards/functions.py: functions of the user's own file as rewards. What they get, and what happens when they fail."""

import json
import math
import random

import processes
import pytest
import torch
from small_runs import metrics_of, small_dataset, tiny_config, without_times

import evaluator
import main
from rewards.functions import RewardError, Rewards, UserReward
from tracking import report_curves
from tracking.run_config import parse_config
from tracking.training_run import TrainingStopped

GOOD = '''
import numpy

def brevity(completion, gold, tags):
    return -len(completion) / 100

def gold_length(gold, question=None, *, tags):
    return numpy.float32(len(gold) + len(question) / 1000 + (tags == "reasoning"))

def ranked(prompt, completions, golds):
    """Share of the others that are longer."""
    assert isinstance(prompt, str) and len(golds) == len(completions)
    return [sum(len(a) < len(b) for b in completions) / max(1, len(completions) - 1) for a in completions]

def all_of_it(completions, **everything):
    return numpy.full(len(completions), float(len(everything)))

NOT_A_FUNCTION = 3
'''


def user_file(folder, text: str):
    folder.mkdir(exist_ok=True)
    file = folder / "my_rewards.py"
    file.write_text(text, encoding="utf-8")
    return file


def records(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "completion": "x" * rng.randrange(9),
            "gold": "18",
            "question": "How many?",
            "prompt": "User:",
            "tags": "think",
        }
        for _ in range(count)
    ]


def failing(folder, body: str, parameters: str = "completion", count: int = 3, time_limit: float = 10.0) -> str:
    """The one line of a function with that body."""
    file = user_file(folder, f"import math, time\n\ndef f({parameters}):\n    {body}\n")
    with pytest.raises(RewardError) as error:
        UserReward(str(file), "f", time_limit)([records(count)])
    line = str(error.value)
    assert "\n" not in line and line.startswith("rewards: my_rewards.py, line ") and ", in f: " in line
    return line


# ---------------------------------------------------------------- what is read


def test_rewards_of_a_file_stand_beside_the_built_in_ones(tmp_path):
    file = user_file(tmp_path / "a folder", GOOD)
    weights = evaluator.parse_rewards(f"accuracy:1, {file}:brevity:0.2,{file}:ranked")
    assert weights == {"accuracy": 1.0, "brevity": 0.2, "ranked": 1.0} and isinstance(weights, Rewards)
    assert list(weights.functions) == ["brevity", "ranked"] and weights.files == [file]


def test_a_function_gets_what_its_parameters_name(tmp_path):
    file = str(user_file(tmp_path, GOOD))
    groups = [records(4, seed=0), records(3, seed=1)]
    for name, expected in (
        ("brevity", lambda r, group: -len(r["completion"]) / 100),
        ("gold_length", lambda r, group: 2.009),
        ("ranked", lambda r, group: sum(len(r["completion"]) < len(o["completion"]) for o in group) / (len(group) - 1)),
        ("all_of_it", lambda r, group: 4.0),
    ):
        values = UserReward(file, name)(groups)
        slow = [[expected(r, group) for r in group] for group in groups]
        assert [len(v) for v in values] == [4, 3] and all(type(x) is float for v in values for x in v)
        assert sum(values, []) == pytest.approx(sum(slow, []), abs=1e-6)


@pytest.mark.parametrize(
    "rewards, fragments",
    [
        ("{file}:none", ["my_rewards.py has no function 'none'", "brevity, gold_length, ranked, all_of_it"]),
        ("{file}:NOT_A_FUNCTION", ["has no function 'NOT_A_FUNCTION'"]),
        ("/nowhere/x.py:f", ["there is no file '/nowhere/x.py'"]),
        ("{file}:brevity,{file}:brevity:2", ["'brevity' is given twice"]),
        ("{file}:brevity:much", ["weight 'much' of 'brevity'"]),
        ("{file}:brevity:", ["weight '' of 'brevity'"]),
        ("brevity", ["unknown reward 'brevity'", "file.py:function"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_command_line(tmp_path, rewards, fragments):
    file = user_file(tmp_path, GOOD)
    with pytest.raises(ValueError) as error:
        parse_config(["--preset", "tiny", "--rewards", rewards.format(file=file)])
    assert all(fragment in str(error.value) for fragment in fragments) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, fragment",
    [
        ("import os\nimport no_such_package\n", "line 2, in f: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def f(:\n", "line 1, in f: SyntaxError: "),
        ("\n\n1 / 0\n", "line 3, in f: ZeroDivisionError: division by zero"),
        ("exit()", "line 1, in f: SystemExit: "),
        (
            "def f(completion, answer):\n    return 1",
            "line 1, in f: parameter 'answer': a function of one completion can",
        ),
        (
            "\ndef f(completions, gold):\n    return 1",
            "line 2, in f: parameter 'gold': a function of a group can ask for",
        ),
        ("def f(completion, /):\n    return 1", "parameter 'completion'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, text, fragment):
    with pytest.raises(RewardError) as error:
        evaluator.parse_rewards(f"{user_file(tmp_path, text)}:f")
    assert f"rewards: my_rewards.py, {fragment}" in str(error.value) or fragment in str(error.value)
    assert "\n" not in str(error.value) and error.value.sample is None


def test_a_file_may_import_its_neighbour_and_is_read_again_when_mended(tmp_path):
    (tmp_path / "neighbour_of_rewards.py").write_text("HALF = 0.5\n")
    file = user_file(tmp_path, "from neighbour_of_rewards import HALF\ndef f(completion):\n    return HALF\n")
    assert UserReward(str(file), "f")([records(1)]) == [[0.5]]
    file.write_text("def f(completion):\n    return 12\n")
    assert UserReward(str(file), "f")([records(1)]) == [[12.0]]


# ---------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    "body, fragment",
    [
        ("return completion[100]", "line 4, in f: IndexError: string index out of range; the sample: '"),
        ("return None", "line 3, in f: it returned None, not a number; the sample: '"),
        ("return 'good'", "it returned 'good', not a number"),
        ("return math.nan", "it returned nan, not a finite number"),
        ("return -math.inf", "it returned -inf, not a finite number"),
        ("return [1.0]", "it returned [1.0], not a number"),
        ("import numpy; return numpy.ones(2)", "it returned array([1., 1.]), not a number"),
        ("import torch; return torch.ones(2)", "it returned tensor([1., 1.]), not a number"),
        ("raise KeyError('several\\n   lines')", "line 4, in f: KeyError: 'several"),
        ("import no_such_package", "line 4, in f: ModuleNotFoundError: No module named 'no_such_package'"),
        ("exit(3)", "in f: SystemExit: 3"),
    ],
)
def test_one_completion(tmp_path, body, fragment):
    assert fragment in failing(tmp_path, body)


@pytest.mark.parametrize(
    "body, fragment",
    [
        ("return [1.0, 2.0]", "line 3, in f: it returned 2 numbers for 3 completions; the sample: ['"),
        ("return 1.0", "it returned 1.0, not a list of 3 numbers"),
        ("return None", "it returned None, not a list of 3 numbers"),
        ("return [1.0, None, 2.0]", "number 1 of its list is None, not a number"),
        ("return [1.0, 2.0, math.nan]", "number 2 of its list is nan, not a finite number"),
        ("return (completions[0][99] for _ in completions)", "<generator object"),
    ],
)
def test_a_group(tmp_path, body, fragment):
    assert fragment in failing(tmp_path, body, "completions")


def test_a_function_that_sleeps_is_left_behind(tmp_path):
    line = failing(tmp_path, "time.sleep(60)", time_limit=0.2)
    assert "line 3, in f: a call took longer than 0.2 seconds (--reward_timeout)" in line


def test_what_a_function_prints_is_left_out_and_mentioned_once(tmp_path, capsys):
    file = user_file(tmp_path, "def f(completion):\n    print('hello\\nthere', completion)\n    return 1\n")
    reward = UserReward(str(file), "f")
    assert reward([records(3)]) == [[1.0] * 3] and reward([records(3)]) == [[1.0] * 3]
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("rewards: my_rewards.py, in f: it printed 'hello\\nthere")


# ---------------------------------------------------------------- whole runs

FAILS_LATER = """
import pathlib

def later(completion):
    with open(pathlib.Path(__file__).with_name("calls"), "a") as calls:
        calls.write(".")
        if calls.tell() > 40:
            return float("nan")
    return len(completion) / 100
"""


def run_config(tmp_path, file, **overrides):
    data = small_dataset(tmp_path / "data")
    settings = dict(dataset_path=data, max_completion_length=24, eval_problems=4, save_steps=9, eval_steps=9)
    weights = f"accuracy:1,{file}:later:0.5"
    settings |= dict(output_dir=tmp_path / "run", rewards=weights, max_steps=4)
    return tiny_config(**settings | overrides)


def test_a_run_learns_from_a_function_and_keeps_its_file(tmp_path):
    file = user_file(
        tmp_path / "mine", "def later(completions):\n    return [len(text) / 10 for text in completions]\n"
    )
    folder = main.train(run_config(tmp_path, file, max_steps=1))
    row = metrics_of(folder)[-1]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    samples = [row for row in samples if row["split"] == "train"]
    assert all(math.isclose(s["reward/later"], len(s["completion"]) / 10) for s in samples)
    assert all(math.isclose(s["reward"], s["reward/accuracy"] + s["reward/later"] / 2) for s in samples)
    assert row["reward/later"] == pytest.approx(sum(s["reward/later"] for s in samples) / len(samples))
    assert (folder / "rewards" / "my_rewards.py").read_text() == file.read_text()
    panels = {p["title"]: p for s in report_curves.chart_sections(metrics_of(folder), {}) for p in s["panels"]}
    curve = next(c for c in panels["Parts of the reward"]["curves"] if c["key"] == "reward/later")
    assert curve["values"] == [pytest.approx(row["reward/later"])] and "user's file" in curve["what"]


def test_a_run_whose_reward_fails_keeps_everything_and_goes_on_when_it_is_mended(tmp_path):
    """16 rows a step: the first two steps are rewarded, the third fails at its ninth row."""
    file = user_file(tmp_path / "mine", FAILS_LATER)
    with pytest.raises(TrainingStopped) as error:
        main.train(run_config(tmp_path, file))
    folder = tmp_path / "run"
    line = str(error.value)
    assert error.value.exit_code == 1 and "\n" not in line
    assert "my_rewards.py, line 4, in later: it returned nan, not a finite number; the sample: '" in line
    assert f"{folder / 'refused_sample.json'}; step 2 is saved; once the file is mended, go on with python" in line
    refused = json.loads((folder / "refused_sample.json").read_text())
    assert refused["step"] == 3 and set(refused["sample"]) == {"question", "gold", "completion"}
    assert [row["step"] for row in metrics_of(folder)] == [0, 1, 2]

    file.write_text("def later(completion):\n    return len(completion) / 100\n")
    main.train(run_config(tmp_path, file, resume_from_checkpoint="latest"))
    (tmp_path / "whole").mkdir()
    whole = main.train(run_config(tmp_path, file, output_dir=str(tmp_path / "whole" / "run")))
    assert without_times(metrics_of(folder)) == without_times(metrics_of(whole))


def test_a_reward_that_fails_at_once_leaves_a_run_that_can_be_made_again(tmp_path):
    file = user_file(tmp_path / "mine", "def later(completion):\n    return None\n")
    with pytest.raises(TrainingStopped, match="it returned None.*nothing was learned yet"):
        main.train(run_config(tmp_path, file))
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0]
    file.write_text("def later(completion):\n    return 0\n")
    main.train(run_config(tmp_path, file, overwrite_output_dir=True, max_steps=1))
    assert not (tmp_path / "run" / "refused_sample.json").exists()


def test_a_function_that_fails_in_one_process_ends_both(tmp_path):
    file = user_file(
        tmp_path / "mine", "import os\ndef f(completion):\n    return None if os.environ['RANK'] == '1' else 1"
    )
    data = small_dataset(tmp_path / "data")
    flags = "--preset tiny --problems_per_step 4 --group_size 2 --minibatches 2 --max_completion_length 8 --max_steps 2"
    flags += f" --dataset_path {data} --eval_problems 2 --rewards {file}:f --output_dir {tmp_path / 'run'}"
    done = processes.run("main.py", *flags.split(), num_processes=2)
    assert done.returncode == 1 and "my_rewards.py, line 2, in f: it returned None" in done.stderr
    assert "Traceback" not in done.stderr


def test_grading_as_if_there_were_no_functions(tmp_path):
    """A function that does the same as a built-in reward gives the same total."""
    text = "import evaluator\ndef same(completion, gold, tags, question):\n"
    file = user_file(tmp_path, text + "    return evaluator.accuracy_reward(completion, gold, tags, question)\n")
    texts = ["<reasoning>a</reasoning><answer>18</answer>", "18", "<reasoning>a</reasoning><answer>1</answer>", ""]

    class FakeRollout:
        finish, lengths = ["stop"] * 4, torch.tensor([3, 1, 2, 1])
        completion_mask = torch.ones(4, 3, dtype=torch.bool)
        is_soft, entropy, top_weight = torch.zeros(4, 3, dtype=torch.bool), torch.rand(4, 3), torch.ones(4, 3)

    FakeRollout.texts = texts
    problems = [main.rldatasets.Problem("How many?", "18", "#### 18")] * 2
    own, ours = (
        evaluator.grade(FakeRollout, problems, evaluator.parse_rewards(rewards))
        for rewards in (f"{file}:same:2,format:0.5", "accuracy:2,format:0.5")
    )
    assert [r["reward"] for r in own] == [r["reward"] for r in ours] == [2.5, 0.0, 0.5, 0.0]
