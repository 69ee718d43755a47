"""training_run.py: the scaffold of every training loop, on its own: a loop that trains nothing, and what it leaves."""

import json
import os
import signal
import threading
from dataclasses import dataclass

import pytest
import torch
from random_models import random_model

from engine import distributed
from tracking import checkpoints
from tracking.training_run import MAX_BAD_UPDATES, SignalHandler, TrainingRun, TrainingStopped


@dataclass
class Config:
    """The settings that the scaffold reads."""

    eval_steps: int = 2
    save_steps: int = 3
    save_total_limit: int = 10
    report_to: str = "none"


@pytest.fixture
def new_run(tmp_path, tokenizer):
    """new_run(max_steps=..., ...) -> a TrainingRun in tmp_path; its evaluations are numbered."""
    model = random_model(hidden_size=8, head_dim=2, intermediate_size=8, num_hidden_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    (tmp_path / "checkpoints").mkdir()
    evaluations = []

    def evaluate():
        evaluations.append(1)
        accuracy = 1 / len(evaluations)  # each is worse than the one before
        names = ("accuracy_low", "accuracy_high", "accuracy_greedy", "format_rate", "length")
        metrics = {"eval/accuracy": accuracy, "eval/n": 8, **{f"eval/{name}": 0.5 for name in names}}
        return metrics, [{"split": "test", "number": len(evaluations)}]

    def make(config=None, **options):
        options = dict(max_steps=7, evaluate=evaluate) | options
        return TrainingRun(
            tmp_path, config or Config(), policy=model, tokenizer=tokenizer, optimizer=optimizer, **options
        )

    return make


def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(new_run, tmp_path, monkeypatch):
    """As a refusal, a ValueError: the body is not entered and the logs of an earlier run are as they were."""
    run = new_run(last_step=1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    def refuse(folder):
        raise ValueError("not like this")

    monkeypatch.setattr(run.tokenizer, "save_pretrained", refuse)
    with pytest.raises(ValueError, match="checkpoints cannot be saved: its tokenizer is refused .not like this."):
        with run:
            raise AssertionError("a step was begun")
    assert len(rows(tmp_path, "metrics")) == 2 and not (tmp_path / "args.json").exists()


def rows(folder, name):
    file = folder / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def loop(run, skipped=lambda step: 0, at_step=lambda step: None):
    with run:
        for step in run.steps():
            with run.timer("work"):
                at_step(step)
            metrics = {"value": step, "skipped_updates": skipped(step), **run.times(num_tokens=100)}
            run.finish_step(metrics, [{"split": "train", "text": f"row of {step}"}])


def test_what_is_due_is_done_in_order(new_run, tmp_path):
    """Evaluations at the start, every 2 steps, with checkpoints and at last; checkpoints every 3 steps and at last."""
    loop(new_run())
    metrics = rows(tmp_path, "metrics")
    assert [row["step"] for row in metrics] == list(range(8))
    assert [row["step"] for row in metrics if "eval/accuracy" in row] == [0, 2, 3, 4, 6, 7]
    assert [row.get("value") for row in metrics] == [None, *range(1, 8)]
    assert all(row["tokens_per_second"] == pytest.approx(100 / row["time/work"], rel=1e-3) for row in metrics[1:])
    samples = rows(tmp_path, "samples")
    assert [row["step"] for row in samples if row["split"] == "train"] == list(range(1, 8))
    assert [row["step"] for row in samples if row["split"] == "test"] == [0, 2, 3, 4, 6, 7]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-3", "step-6", "step-7"]
    assert (tmp_path / "checkpoints/latest").resolve().name == "step-7"
    assert (tmp_path / "checkpoints/best").resolve().name == "step-3", "accuracies only fall"
    assert (tmp_path / "args.json").exists()


def test_a_check_that_turns_to_a_warning_is_named_once_at_the_next_evaluation(new_run, capsys):
    def steps(run, clipped):
        with run:
            for step in run.steps():
                run.finish_step({"clip_frac": 0.9 * (step in clipped), "skipped_updates": 0})
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: Clipping: ")]

    config = Config(eval_steps=1)
    lines = steps(new_run(config), clipped=(2, 3, 6))
    assert len(lines) == 2 and "90.0% of the tokens: fewer --updates_per_rollout" in lines[0]
    assert len(steps(new_run(config, last_step=5), clipped=(6, 7))) == 1
    assert not steps(new_run(config, last_step=6), clipped=(7,)), "a resumed run does not repeat what it has said"


def test_a_run_without_evaluation_logs_its_steps_alone(new_run, tmp_path):
    run = new_run(evaluate=None, max_steps=2)
    with run:
        for _ in run.steps():
            run.finish_step({"skipped_updates": 0})
    assert [row["step"] for row in rows(tmp_path, "metrics")] == [1, 2]
    assert not (tmp_path / "samples.jsonl").exists() and not (tmp_path / "checkpoints/best").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(new_run, tmp_path, number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match="step 4 is saved; go on like this") as stopped:
        loop(
            new_run(how_to_resume="go on like this"),
            at_step=lambda step: os.kill(os.getpid(), number) if step == 4 else None,
        )
    assert stopped.value.signal == number and stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before, "the handler is gone"
    assert "eval/accuracy" not in rows(tmp_path, "metrics")[-1], "the evaluation is left to the resumed run"

    state = checkpoints.load_trainer_state(tmp_path / "checkpoints/latest")
    assert state["step"] == 4
    loop(new_run(last_step=4, best=state["best"]))
    metrics = rows(tmp_path, "metrics")
    assert [row["step"] for row in metrics] == list(range(8)) and "eval/accuracy" in metrics[4]
    tests = [row["step"] for row in rows(tmp_path, "samples") if row["split"] == "test"]
    assert sorted(tests) == [0, 2, 3, 4, 6, 7]


def test_a_signal_in_the_last_step_changes_nothing(new_run, tmp_path, capsys):
    loop(new_run(), at_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 7 else None)
    assert "eval/accuracy" in rows(tmp_path, "metrics")[-1]


def test_lasting_non_finite_updates_end_the_run_and_single_ones_do_not(new_run, tmp_path):
    loop(new_run(max_steps=2 * MAX_BAD_UPDATES), skipped=lambda step: step % MAX_BAD_UPDATES != 0)
    for name in ("metrics", "samples"):
        (tmp_path / f"{name}.jsonl").unlink()
    with pytest.raises(TrainingStopped, match=f"step {MAX_BAD_UPDATES} is saved; {MAX_BAD_UPDATES} updates") as stopped:
        loop(new_run(max_steps=2 * MAX_BAD_UPDATES), skipped=lambda step: 1)
    assert stopped.value.signal is None and stopped.value.exit_code == 1


def test_later_rows_are_forgotten_when_an_older_step_is_resumed(new_run, tmp_path):
    loop(new_run(max_steps=5))
    loop(new_run(max_steps=5, last_step=3))
    for name in ("metrics", "samples"):
        steps = [row["step"] for row in rows(tmp_path, name) if row.get("split") != "test"]
        assert steps == [row for row in range(name == "samples", 6)]


@pytest.mark.parametrize(
    "error, raised, message",
    [
        (ValueError("shapes"), RuntimeError, "error in the training loop"),  # not a refusal: it keeps its traceback
        (OSError("no space left"), TrainingStopped, "no space left; logs and checkpoints"),
        (KeyError("x"), KeyError, "x"),
    ],
)
def test_an_error_in_the_loop_leaves_no_signal_handler_behind(new_run, error, raised, message):
    def fail(step):
        raise error

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(raised, match=message) as caught:
        loop(new_run(), at_step=fail)
    assert caught.value is error or caught.value.__cause__ is error
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_step_that_is_not_finished_is_an_error(new_run):
    with pytest.raises(AssertionError, match="finish_step was not called for step 1"), new_run() as run:
        for _ in run.steps():
            pass


def test_a_second_signal_exits_at_once_and_threads_install_nothing(capsys):
    with SignalHandler() as handler, pytest.raises(SystemExit) as exited:
        handler._receive(signal.SIGTERM, None)
        assert handler.signal == signal.SIGTERM
        handler._receive(signal.SIGTERM, None)
    assert exited.value.code == 128 + signal.SIGTERM
    before = signal.getsignal(signal.SIGTERM)

    def enter():
        with SignalHandler():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_main_process_alone_writes(new_run, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    loop(new_run(max_steps=3))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
