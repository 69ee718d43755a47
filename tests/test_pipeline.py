"""pipeline.py: every stage begins with the weights that it should, learns what it should and no test problem, a
pipeline that was killed anywhere ends as the uninterrupted one, and the table says what was measured."""

import dataclasses
import inspect
import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from random_models import ROOT
from small_runs import InThisProcess, Stop, small_dataset, stop_at, without_times
from small_runs import pipeline_config as config_of
from transformers import AutoModelForCausalLM

import distill
import evaluator
import main
import pipeline
import rldatasets
from distillation import measurement, pipeline_config, pipeline_report
from distillation.pipeline_config import CONTROLS, PRESETS, STAGES, PipelineConfig, parse_config
from engine.statistics import paired_difference
from tracking import command_line, run_config, run_folder
from tracking.training_run import TrainingStopped


@pytest.fixture(scope="module", autouse=True)
def here():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "ProcessPoolExecutor", InThisProcess)
        yield


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """24 problems to train on, of which 4 are test problems too, spelled with other white space."""
    folder = Path(small_dataset(tmp_path_factory.mktemp("data") / "problems", 24))
    shared = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][:4]
    for row in shared:
        row["question"] = row["question"].replace(" ", "  ")
    train = (folder / "train.jsonl").read_text().splitlines()[:20]
    random.Random(0).shuffle(train := train + [json.dumps(row) for row in shared])
    (folder / "train.jsonl").write_text("\n".join(train) + "\n")
    return str(folder)


class Record:
    """What every training of a pipeline began with and learned from."""

    def __init__(self, patch):
        self.name, self.weights, self.rows, self.questions, self.configs = None, {}, {}, {}, {}
        train_student, train_or_resume = distill.train_student, distill.train_or_resume
        as_rollout, generate = distill.as_rollout, main.generate

        def students(config, start, rows, folder, signals=None):
            self.name, self.rows[folder.name], self.configs[folder.name] = folder.name, rows, config
            train_student(config, start, rows, folder, signals)

        def rl(config, announcement):
            self.name = Path(config.output_dir).name
            self.configs[self.name] = config
            return train_or_resume(config, announcement)

        def lessons(examples, *rest):
            self.questions.setdefault(self.name, set()).update(example.question for example in examples)
            return as_rollout(examples, *rest)

        def samples(actor, tokenizer, prompts, **options):
            self.questions.setdefault(self.name, set()).update(prompts)
            return generate(actor, tokenizer, prompts, **options)

        def first_update(original):
            def update(policy, *rest):
                if self.name not in self.weights:
                    self.weights[self.name] = [p.detach().clone() for p in policy.parameters()]
                return original(policy, *rest)

            return update

        patch.setattr(distill, "train_student", students)
        patch.setattr(distill, "train_or_resume", rl)
        patch.setattr(distill, "as_rollout", lessons)
        patch.setattr(main, "generate", samples)
        patch.setattr(distill, "update", first_update(distill.update))
        patch.setattr(main, "update", first_update(main.update))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, problems):
    """(the folder of a whole pipeline, made in the default folder of another working folder; its Record)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        record = Record(patch)
        return pipeline.run(config_of(None, dataset_path=problems)), record


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def weights_of(name):
    return list(AutoModelForCausalLM.from_pretrained(name).parameters())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- what begins where


@pytest.mark.parametrize("name", ["cold_start", "rejection", "zero", "base_answers", "random_answers"])
def test_it_begins_with_the_base(finished, name):
    assert same(finished[1].weights[name], weights_of(ROOT / "models" / "tiny"))


@pytest.mark.parametrize(
    "name, start", [("rl", "cold_start"), ("shuffled", "cold_start"), ("rl_again", "rejection"), ("longer_rl", "rl")]
)
def test_it_begins_where_another_stage_ended(finished, name, start):
    folder, record = finished
    assert same(record.weights[name], weights_of(folder / start / "checkpoints" / "latest"))
    assert not same(record.weights[name], weights_of(ROOT / "models" / "tiny"))


def test_every_stage_learns_what_it_should(finished, problems):
    folder, record = finished
    gold = {row["question"]: row["answer"] for row in lines(folder / "data/train.jsonl")}
    assert len(record.rows["cold_start"]) == 8
    for row in record.rows["cold_start"]:
        assert evaluator.format_reward(row["completion"]) == 1
        assert row["completion"].startswith("<reasoning>" + gold[row["question"]].splitlines()[0])
    answers = {writer: lines(folder / f"answers-{writer}/teacher.jsonl") for writer in ("rl", "base")}
    for name, writer in (("rejection", "rl"), ("base_answers", "base")):
        assert record.rows[name] == pipeline.right_answers(config_of(folder), answers[writer])
        for row in record.rows[name]:
            assert row["reward/accuracy"] == row["reward/format"] == 1 and row["finish"] == "stop"
    chosen = record.rows["random_answers"]
    assert len(chosen) == len(record.rows["rejection"]) > 1
    assert all(row in answers["rl"] for row in chosen)
    assert any(row["reward/accuracy"] == 0 for row in chosen), "nobody has checked them"
    assert (record.configs["shuffled"].control, record.configs["rl"].control) == ("shuffled_advantages", "none")
    steps = {name: lines(folder / name / "metrics.jsonl")[-1]["step"] for name in pipeline.STAGES}
    assert steps["rejection"] == steps["base_answers"] == steps["random_answers"]
    assert steps["rl"] == steps["rl_again"] == steps["zero"] == steps["shuffled"] == 2
    assert record.configs["rl"].seed == record.configs["zero"].seed != record.configs["rl_again"].seed


def test_no_test_problem_reaches_any_stage(finished, problems):
    folder, record = finished
    test = {" ".join(problem.question.split()) for problem in rldatasets.load_problems("", "test", path=problems)}
    train = {" ".join(problem.question.split()) for problem in rldatasets.load_problems("", "train", path=problems)}
    assert len(test & train) == 4, "the data has what must not get through"
    assert set(record.questions) == set(pipeline.STAGES)
    for writer in ("rl", "base"):
        record.questions[writer] = {row["question"] for row in lines(folder / f"answers-{writer}/teacher.jsonl")}
    for name, texts in record.questions.items():
        for text in texts:  # a question, or a prompt with one in it
            assert not any(question in " ".join(text.split()) for question in test), name
    assert [row["question"] for row in lines(folder / "data/test.jsonl")] == [
        problem.question for problem in rldatasets.load_problems("", "test", path=problems)
    ]


def test_problems_are_the_same_after_they_were_written(tmp_path):
    config = config_of(tmp_path / "run", dataset_name="arithmetic")
    pipeline.begin(config, tmp_path / "run")
    for split in ("train", "test"):
        again = rldatasets.load_problems("", split, 300, str(tmp_path / "run/data"))
        assert again == rldatasets.load_problems("arithmetic", split, 300)


@pytest.mark.parametrize("asked, made", [(5, 10), (14, 14)])
def test_as_many_problems_are_generated_as_are_asked_for(tmp_path, monkeypatch, asked, made):
    monkeypatch.setattr(rldatasets, "NUM_GENERATED", 10)
    pipeline.begin(config_of(tmp_path, train_problems=asked, dataset_name="two_step"), tmp_path)
    rows = {split: (tmp_path / f"data/{split}.jsonl").read_text().splitlines() for split in ("train", "test")}
    assert len(rows["train"]) == made and len(rows["test"]) == 10


def test_fewer_problems_than_were_asked_for_are_said(tmp_path, problems, capsys):
    pipeline.begin(config_of(tmp_path, dataset_path=problems, train_problems=25), tmp_path)
    assert "20 training problems in all, fewer than --train_problems 25" in capsys.readouterr().out


def test_data_that_is_all_test_problems_is_refused(tmp_path, problems):
    config = config_of(tmp_path / "run", dataset_path=problems + "/test.jsonl")
    with pytest.raises(ValueError, match="every training problem is a test problem too"):
        pipeline.run(config)
    assert not (tmp_path / "run").exists()


def test_longer_rl_takes_as_many_steps_as_stage_4_and_those_that_fit_into_stage_3(tmp_path, monkeypatch):
    for name, steps, seconds in (("rl", 4, 2.0), ("rl_again", 4, 4.0), ("rejection", 3, 2.0), ("answers-rl", 2, 4.5)):
        (tmp_path / name).mkdir()
        rows = ({"step": i, "time/rollout": seconds / 4, "time/train": seconds * 3 / 4} for i in range(1, steps + 1))
        run_folder.JsonLines(tmp_path / name / "metrics.jsonl").append({"step": 0}, *rows)
    asked = []
    monkeypatch.setattr(distill, "train_or_resume", lambda config, _: asked.append(config))
    pipeline.grpo(config_of(tmp_path, rl_steps=4), "longer_rl", tmp_path)
    # Stage 3 took 3 * 2 + 2 * 4.5 = 15 s, a step of RL (4 * 2 + 4 * 4) / 8 = 3 s.
    assert asked[0].max_steps == 4 + 5 and asked[0].model_name == str(tmp_path / "rl/checkpoints/latest")


def answers_without_a_right_one(folder, writer, config):
    row = {"question": "q", "answer": "1", "solution": "#### 1", "completion": "no", "ids": [1], "finish": "stop",
           "length": 1, "reward/accuracy": 0.0, "reward/format": 0.0}  # fmt: skip
    (folder / f"answers-{writer}").mkdir(parents=True)
    log = run_folder.JsonLines(folder / f"answers-{writer}" / "teacher.jsonl")
    log.append(*[row] * config.train_problems * config.samples_per_problem)


def test_without_a_right_answer_there_is_nothing_to_learn(tmp_path, capsys):
    config = config_of(tmp_path, model_name=str(ROOT / "models/tiny"))
    shutil.copytree(ROOT / "models/tiny", tmp_path / "rl/checkpoints/latest")
    for writer in ("rl", "base"):
        answers_without_a_right_one(tmp_path, writer, config)
    with pytest.raises(ValueError, match="--train_problems 16: not one of 32 answers of the RL model") as error:
        pipeline.learn_answers(config, "rejection", tmp_path)
    assert "\n" not in str(error.value)
    pipeline.learn_answers(config, "base_answers", tmp_path)  # a result, and no failure
    assert "not one of 32 answers of the base is right" in capsys.readouterr().out
    assert not (tmp_path / "base_answers").exists()


def test_a_stage_by_itself_does_what_it_is_built_on_and_no_more():
    def names(stage, controls="none"):
        return pipeline.wanted(config_of(None, stage=stage, controls=controls))

    assert names("all") == list(STAGES)
    assert names("all", "all") == list(pipeline.STAGES) == [*STAGES, *CONTROLS]
    assert names("cold_start") == ["cold_start"] and names("zero") == ["zero"]
    assert names("rejection") == ["cold_start", "rl", "rejection"]
    assert names("base_answers") == ["cold_start", "rl", "base_answers"]
    assert names("longer_rl") == [*STAGES, "longer_rl"]
    assert names("all", "shuffled, zero") == [*STAGES, "zero", "shuffled"]


# ---------------------------------------------------------------- stopping and going on


def test_a_pipeline_that_is_killed_in_every_stage_ends_as_the_uninterrupted_one(finished, problems, tmp_path):
    whole, folder = finished[0], tmp_path / "run"
    config = config_of(folder, dataset_path=problems, controls="random_answers")
    steps = lines(whole / "rejection/metrics.jsonl")[-1]["step"]
    for owner, name, call in (
        (pipeline.rldatasets, "load_problems", 2),  # before there is anything
        (distill, "update", 2),  # cold_start
        (main, "update", 2),  # rl
        (distill, "answer_records", 2),  # the RL model's answers
        (distill, "update", 2),  # rejection
        (main, "update", 1),  # rl_again
        (distill, "update", steps),  # random_answers
        (pipeline_report, "measure", 3),
    ):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, owner, name, call)
            with pytest.raises(Stop):
                pipeline.run(config)
    pipeline.run(config)
    for name in (*STAGES, "random_answers"):
        a, b = (without_times(lines(place / name / "metrics.jsonl")) for place in (folder, whole))
        assert a == b, name
        assert same(*(weights_of(place / name / "checkpoints/latest") for place in (folder, whole))), name
    assert (folder / "answers-rl/teacher.jsonl").read_bytes() == (whole / "answers-rl/teacher.jsonl").read_bytes()
    batches = [row["step"] for row in lines(folder / "answers-rl/metrics.jsonl")]
    assert batches == [1, 2], "each batch's cost is there once"
    tables = [json.loads((place / "report/pipeline.json").read_text())["models"] for place in (folder, whole)]
    for name, row in tables[0].items():
        costs = ("seconds", "tokens", "total_seconds", "total_tokens")
        assert all(tables[1][name][key] == value for key, value in row.items() if key not in costs)
    with pytest.MonkeyPatch.context() as patch:  # what is finished is not done again
        for owner, name in ((distill, "update"), (main, "update"), (distill, "sample"), (pipeline_report, "measure")):
            stop_at(patch, owner, name, 1)
        pipeline.run(config)


def test_a_signal_says_the_command_that_goes_on(tmp_path, problems, monkeypatch):
    class Signalled:
        signal = 15
        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr("tracking.training_run.SignalHandler", Signalled)
    for stage in ("cold_start", "zero"):
        with pytest.raises(TrainingStopped, match=f"{stage}: step 1 is saved; go on with the same command"):
            pipeline.run(config_of(tmp_path / "run", dataset_path=problems, stage=stage))


@pytest.mark.parametrize(
    "changed, fragment",
    [
        (dict(rl_steps=3), "--rl_steps 3: what is in"),
        (dict(seed=1), "--seed 1: what is in"),
        (dict(sft_epochs=1.0), "--sft_epochs 1.0: what is in"),
        (dict(eval_samples=3), "--eval_samples 3: what is in"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_name(finished, problems, changed, fragment):
    with pytest.raises(ValueError, match=re.escape(fragment)) as error:
        pipeline.run(config_of(finished[0], dataset_path=problems, **changed))
    assert "--overwrite_output_dir" in str(error.value)


def test_overwriting_replaces_the_pipeline_and_leaves_other_files_alone(finished, problems, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run", symlinks=True)
    (folder / "notes.txt").write_text("mine")
    changed = dict(dataset_path=problems, stage="cold_start", overwrite_output_dir=True)
    with pytest.raises(ValueError, match="no such folder"):  # what is refused replaces nothing
        pipeline.run(config_of(folder, model_name="./nowhere", **changed))
    assert (folder / "rl_again").exists()
    pipeline.run(config_of(folder, cold_start_learning_rate=1e-5, **changed))
    assert sorted(path.name for path in folder.iterdir()) == ["args.json", "cold_start", "data", "notes.txt"]
    assert max(row["lr"] for row in lines(folder / "cold_start/metrics.jsonl")) < 1e-5


# ---------------------------------------------------------------- the table


def test_the_report_says_what_was_measured(finished):
    folder, _ = finished
    report = json.loads((folder / "report/pipeline.json").read_text())
    assert list(report["models"]) == ["base", *pipeline.STAGES]
    measured = {row["model"]: row for row in lines(folder / "report/measured.jsonl")}
    for name, row in report["models"].items():
        for prefix, samples in (("", 2), ("greedy/", 1)):
            solved = measured[name][f"{prefix}solved"]
            assert len(solved) == 4 and {share * samples % 1 for share in solved} == {0}
            assert row[f"{prefix}accuracy"] == pytest.approx(sum(solved) / 4)
            assert row[f"{prefix}accuracy_low"] <= row[f"{prefix}accuracy"] <= row[f"{prefix}accuracy_high"]
        assert row["pass"] == pytest.approx(sum(share > 0 for share in measured[name]["solved"]) / 4)
        assert row["entropy"] > 0 and row["control"] == (name in CONTROLS)
    assert [(row["model"], row["against"]) for row in report["gains"]] == [
        tuple(pipeline.STAGES[name].title if name != "base" else "the base" for name in pair)
        for pair in pipeline.COMPARISONS
    ]
    for row, (a, b) in zip(report["gains"], pipeline.COMPARISONS, strict=True):
        difference = report["models"][a]["accuracy"] - report["models"][b]["accuracy"]
        assert row["accuracy"][0] == pytest.approx(difference)
    for writer, counts in report["answers"].items():
        assert counts.pop("sampled") == 32 == sum(counts.values()), writer
    text = (folder / "report/pipeline.md").read_text()
    for name in pipeline.STAGES:
        assert f" {pipeline.STAGES[name].title} " in text
    assert (folder / "report/pipeline.png").stat().st_size > 10_000


def test_a_model_costs_what_all_its_stages_took_each_counted_once(finished):
    folder, _ = finished

    def by_hand(*places):
        rows = [row for place in places for row in lines(folder / place / "metrics.jsonl") if row["step"] > 0]
        seconds = sum(row["time/rollout"] + row.get("time/train", 0) for row in rows)
        return seconds, sum(row["tokens_per_second"] * (row["time/rollout"] + row.get("time/train", 0)) for row in rows)

    models = json.loads((folder / "report/pipeline.json").read_text())["models"]
    first, second = ("cold_start", "rl"), ("answers-rl", "rejection")
    for name, own, whole in (
        ("base", (), ()),
        ("rl", ("rl",), first),
        ("rejection", second, (*first, *second)),
        ("rl_again", ("rl_again",), (*first, *second, "rl_again")),
        ("longer_rl", ("longer_rl",), (*first, "longer_rl")),
        ("base_answers", ("answers-base", "base_answers"), ("answers-base", "base_answers")),
        ("random_answers", ("answers-rl", "random_answers"), (*first, "answers-rl", "random_answers")),
    ):
        row = models[name]
        assert (row["seconds"], row["tokens"]) == pytest.approx(by_hand(*own)), name
        assert (row["total_seconds"], row["total_tokens"]) == pytest.approx(by_hand(*whole)), name
    answers = lines(folder / "answers-rl/teacher.jsonl")
    assert by_hand("answers-rl")[1] == pytest.approx(sum(row["length"] for row in answers))
    lengths = [row["completion_length"] for row in lines(folder / "rl/metrics.jsonl") if row["step"] > 0]
    assert models["rl"]["tokens"] == pytest.approx(16 * sum(lengths))  # of 4 x 4 rows


def test_a_difference_is_shown_only_if_its_interval_leaves_0_out():
    assert pipeline_report.points((0.02, -0.01, 0.05)) == "+2.0 [-1.0, +5.0] not shown"
    assert pipeline_report.points((0.02, 0.01, 0.03)) == "+2.0 [+1.0, +3.0] gains"
    assert pipeline_report.points((-0.02, -0.03, -0.01)) == "-2.0 [-3.0, -1.0] loses"
    assert pipeline_report.points((0.0, 0.0, 0.0)) == "+0.0 [+0.0, +0.0] not shown"


def test_a_paired_difference_by_hand_and_its_interval_holds_the_truth_as_often_as_it_says():
    mean, low, high = paired_difference([1, 0, 1, 1], [0, 0, 1, 0])
    assert mean == 0.5 and high - mean == pytest.approx(mean - low) == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    for bad in (([1], [0]), ([1, 0], [1])):
        with pytest.raises(ValueError, match="two or more pairs"):
            paired_difference(*bad)
    rng, hits = random.Random(0), 0
    for _ in range(1000):
        hard = [rng.random() for _ in range(200)]  # what both models find hard
        a, b = ([float(rng.random() < p) for p in hard] for _ in range(2))
        better = [max(x, float(rng.random() < 0.2)) for x in a]  # in truth + .2 * (1 - 1/2)
        mean, low, high = paired_difference(better, b)
        hits += low < 0.1 < high
    assert 920 < hits < 980


# ---------------------------------------------------------------- settings


def test_every_setting_is_read():
    borrowed = [inspect.getsource(f) for f in (PipelineConfig.prompt_format, PipelineConfig.answering)]
    borrowed += [inspect.getsource(PipelineConfig.stop_tag), inspect.getsource(pipeline_config.PipelineConfig)]
    files = [ROOT / "pipeline.py", ROOT / "distillation" / "pipeline_report.py"]
    source = "".join(file.read_text() for file in files) + "".join(borrowed)
    for f in dataclasses.fields(PipelineConfig):
        known = f.name in pipeline.SHARED  # handed on to main.py and distill.py, whose tests have the same check
        assert known or re.search(rf"\b(config|self)\.{f.name}\b", source), f"{f.name} is parsed and never used"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_every_flag_overrides_them(preset):
    config = parse_config(["--preset", preset])
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == value
    other = parse_config(["rl", "--preset", preset, "--rl_steps", "7", "--seed", "3"])
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(other, f.name)}
    assert changed == {"stage", "rl_steps", "seed"}
    for name in ("problems_per_step", "group_size", "model_name", "tags"):
        defaults = {f.name: f.default for f in dataclasses.fields(main.GRPOConfig)}
        assert getattr(config, name) == run_config.PRESETS[preset].get(name, defaults[name])


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        ("rejecton", ["rejecton", "rejection", "rl_again"]),
        ("--rl_step 3", ["--rl_step", "--rl_steps"]),
        ("--controls zero,best", ["'best'", "none", "zero", "longer_rl"]),
        ("--controls=", ["''", "none", "zero"]),
        ("--rl_steps 0", ["rl_steps 0"]),
        ("--sft_epochs nan", ["sft_epochs nan"]),
        ("--group_size 1", ["group_size 1"]),
        ("--problems_per_step 30", ["problems_per_step 30", "4 minibatches", "tiny"]),
        ("--model_name ./nowhere", ["nowhere"]),
        ("--max_completion_length 4000", ["4440 tokens", "positions"]),
        ("--dataset_name mmlu", ["mmlu", "gsm8k"]),
        ("--dataset_path ./nowhere", ["nowhere"]),
    ],
)
def test_bad_arguments_get_one_line_and_exit_code_2(arguments, fragments, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["pipeline.py", *arguments.split(), "--output_dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as exit_code:
        command_line.run_script(pipeline.main, command_line.parse_or_exit(parse_config))
    message = capsys.readouterr().err
    assert exit_code.value.code == 2 and message.count("\n") == 1
    for fragment in ("pipeline.py:", *fragments):
        assert fragment in message
    assert not (tmp_path / "run").exists()
