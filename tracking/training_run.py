"""The scaffold of every training loop here. It knows no algorithm: a script hands it the metrics of each step.

    with TrainingRun(folder, config, policy=policy, ...) as run:
        for step in run.steps():                  # evaluates the start first
            with run.timer("rollout"):
                ...
            with run.timer("train"):
                ...
            run.finish_step(metrics, samples)     # logs; evaluates, saves and stops when due

It decides which steps are left, shows progress, writes metrics.jsonl and samples.jsonl, feeds a tracker, evaluates,
names the health checks that have turned to a warning, draws the pictures, saves checkpoints, marks the best one, and
makes the report at the end. Ctrl-C and SIGTERM finish the step, save, and raise TrainingStopped; so do MAX_BAD_UPDATES
updates in a row that are not finite, and a reward of the user's file that fails, before the step.

It is a context manager because a generator alone would leave its signal handlers behind when the body raises.
Left out on purpose: callbacks. What differs between scripts is in their loops.
"""

import contextlib
import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from engine import distributed
from rewards.functions import RewardError
from tracking import checkpoints, health, plotter, report, run_folder
from tracking.summaries import describe_evaluation

MAX_BAD_UPDATES = 5  # updates in a row that are not finite; then the run ends


class TrainingStopped(Exception):
    """A run ended before its last step. signal: the number of the signal that asked for it, or None."""

    def __init__(self, signal: int | None, message: str):
        super().__init__(message)
        self.signal = signal
        self.exit_code = 1 if signal is None else 128 + signal


class SignalHandler:
    """While entered, Ctrl-C and SIGTERM set `signal`, which a loop reads when its step is done. A second one exits at
    once. Does nothing outside the main thread, where Python delivers no signals."""

    def __init__(self):
        self.signal: int | None = None
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.signal is not None:
            sys.exit(128 + number)
        self.signal = number
        print("\nfinishing this step, then saving; once more ends at once", file=sys.stderr)


def is_saved(config, step: int, max_steps: int) -> bool:
    """Whether a checkpoint is written after the step: every save_steps, and at last."""
    return step % config.save_steps == 0 or step == max_steps


def is_due(config, step: int, max_steps: int) -> bool:
    """Whether the step is evaluated: every eval_steps, and with every checkpoint."""
    return step % config.eval_steps == 0 or is_saved(config, step, max_steps)


class TrainingRun:
    """One training run in one folder; see the module. Every process of a run makes one, the main process writes."""

    def __init__(
        self,
        folder: Path,
        config,
        *,
        policy,
        tokenizer,
        optimizer,
        max_steps: int,
        last_step: int = 0,
        best: float = -1.0,
        evaluate: Callable[[], tuple[dict[str, float], list[dict]]] | None = None,
        more_state: Callable[[], dict] = dict,
        how_to_resume: str = "go on with the same command",
        signals: SignalHandler | None = None,
        title: str | None = None,
    ):
        """config: the script's settings, a dataclass with save_steps, save_total_limit and report_to, and eval_steps if
        there is `evaluate`. last_step: steps that are done, 0 or a checkpoint's. best: accuracy of the best checkpoint.
        evaluate: () -> (metrics with "eval/accuracy", samples to log). more_state: what a checkpoint holds beside step,
        best and optimizer. signals: default, a handler of Ctrl-C and SIGTERM. title: of the progress bar.
        """
        self.folder, self.config = folder, config
        self.policy, self.tokenizer, self.optimizer = policy, tokenizer, optimizer
        self.max_steps, self.last_step, self.best = max_steps, last_step, best
        self.evaluate, self.more_state, self.how_to_resume = evaluate, more_state, how_to_resume
        self.signals, self.title = signals or SignalHandler(), title
        self.bad_updates = 0  # in a row
        self.saved_step = last_step
        self.started = time.time()
        self.seconds: dict[str, float] = {}  # of the step's timers
        self.metrics_log = run_folder.JsonLines(folder / "metrics.jsonl")
        self.samples_log = run_folder.JsonLines(folder / "samples.jsonl")

    def __enter__(self):
        """Raises ValueError, one line, if a checkpoint could not be saved."""
        distributed.run_on_main(checkpoints.try_saving, self.policy, self.tokenizer, self.folder)
        for log in (self.metrics_log, self.samples_log):
            if log.file.exists():  # the rows after the checkpoint, or of a run that ended before its first one
                log.truncate_after(self.last_step)
        self.known_findings = {finding.name for finding in self._findings()}
        settings = dataclasses.asdict(self.config)
        run_folder.write_args(self.folder, settings, self.policy.device)
        report_to = self.config.report_to
        self.tracker = Accelerator(log_with=None if report_to == "none" else report_to, project_dir=self.folder)
        self.tracker.init_trackers("r1", config={name: v for name, v in settings.items() if v is not None})
        self.progress = tqdm(
            desc=self.title, initial=self.last_step, total=self.max_steps, unit="step",
            disable=not distributed.is_main_process(),
        )  # fmt: skip
        self.signals.__enter__()
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self.signals.__exit__()
        self.progress.close()
        for tracker in self.tracker.trackers:  # Accelerator.end_training would also leave the process group
            tracker.finish()
        if exception is None or isinstance(exception, TrainingStopped):
            if distributed.is_main_process():
                if self.evaluate is None:
                    plotter.plot_run(self.folder)
                report.make_report(self.folder)
            distributed.barrier()  # the other processes may read what the main one has written
        if isinstance(exception, OSError):  # a full disk, most likely
            message = f"{exception}; logs and checkpoints written so far are in {self.folder}"
            raise TrainingStopped(None, message) from exception
        if isinstance(exception, RewardError):
            raise TrainingStopped(None, self._stop_for_reward(exception)) from exception
        if isinstance(exception, ValueError):  # nothing in a loop is a refusal of what a user asked for
            raise RuntimeError(f"error in the training loop of {self.folder}") from exception

    def _stop_for_reward(self, error: RewardError) -> str:
        """Saves what was learned before the step whose rewards failed, and the sample. Returns the line to show."""
        kept = "nothing was learned yet"
        if self.last_step > 0:
            if self.saved_step != self.last_step:
                self._save(self.last_step, accuracy=-1.0)
            kept = f"step {self.last_step} is saved; once the file is mended, {self.how_to_resume}"
        if distributed.is_main_process():
            record = {"step": self.last_step + 1, "error": error.line, "sample": error.sample}
            text = json.dumps(record, indent=1) + "\n"
            (self.folder / "refused_sample.json").write_text(text, encoding="utf-8")
        return f"{error}; it is in {self.folder / 'refused_sample.json'}; {kept}"

    def steps(self) -> Iterator[int]:
        """The steps that are left, from last_step + 1 to max_steps. `finish_step` ends each."""
        if self.evaluate and self.last_step == 0:
            metrics, samples = self.evaluate()
            self.samples_log.append(*({"step": 0, **sample} for sample in samples))
            self._log({"step": 0, **metrics})
        elif self.evaluate and self.is_due(self.last_step):
            self._evaluate_saved_step()
        for step in range(self.last_step + 1, self.max_steps + 1):
            self.seconds = {}
            yield step
            assert self.last_step == step, f"finish_step was not called for step {step}"

    def is_due(self, step: int) -> bool:
        """Whether the step is evaluated."""
        return is_due(self.config, step, self.max_steps)

    def _saves(self, step: int) -> bool:
        return is_saved(self.config, step, self.max_steps)

    @contextlib.contextmanager
    def timer(self, phase: str):
        """The seconds of the block are added to the step's time/PHASE."""
        with run_folder.stopwatch(self.policy.device) as seconds:
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds()

    def times(self, num_tokens: int) -> dict[str, float]:
        """The step's time/PHASE of every timer, and tokens_per_second over all of them."""
        times = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        return times | {"tokens_per_second": num_tokens / sum(self.seconds.values())}

    def finish_step(self, metrics: dict[str, float], samples: list[dict] = (), note: str = "") -> None:
        """Ends the step that `steps` gave: logs it, evaluates and saves when due.

        metrics: what metrics.jsonl gets; with skipped_updates, and updates (default: all that were not skipped).
        samples: rows of samples.jsonl. note: shown beside the progress bar. Raises TrainingStopped, after a checkpoint,
        when a signal has come or updates stay non-finite; in the last step both change nothing.
        """
        step = self.last_step = self.last_step + 1
        metrics = {"step": step, **metrics}
        none_taken = metrics.get("updates", 1 - metrics["skipped_updates"]) == 0
        self.bad_updates = self.bad_updates + metrics["skipped_updates"] if none_taken else 0
        signal_number = distributed.all_reduce_max(self.signals.signal or 0)
        stops = step < self.max_steps and (signal_number or self.bad_updates >= MAX_BAD_UPDATES)
        if self.evaluate and self.is_due(step) and not stops:
            evaluation, evaluation_samples = self.evaluate()
            self.samples_log.append(*({"step": step, **sample} for sample in evaluation_samples))
            metrics |= evaluation
        self._log(metrics)
        if samples:
            self.samples_log.append(*({"step": step, **sample} for sample in samples))
        self.progress.set_postfix_str(note, refresh=False)
        self.progress.update()
        if self._saves(step) or stops:
            self._save(step, metrics.get("eval/accuracy", -1.0))
        if not stops:
            return
        why = self.how_to_resume
        if not signal_number:
            why = f"{self.bad_updates} updates in a row were not finite: look at grad_norm in metrics.jsonl, and try a "
            why += "lower --learning_rate"
        raise TrainingStopped(signal_number or None, f"{self.folder}: step {step} is saved; {why}")

    def _log(self, row: dict) -> None:
        self.metrics_log.append(row)
        self._track(row)
        if "eval/accuracy" in row:
            tqdm.write(describe_evaluation(f"step {row['step']}", row))
            self._report_health()
            if distributed.is_main_process():
                plotter.plot_run(self.folder)

    def _findings(self) -> list[health.Finding]:
        """Of the health checks, those that are not ok; on the main process, which has the log."""
        rows = self.metrics_log.read() if distributed.is_main_process() else []
        return [finding for finding in health.find_health(rows) if finding.level != "ok"]

    def _report_health(self) -> None:
        """Prints one line for each check that has turned to a warning or a problem since the last evaluation."""
        findings = self._findings()
        for finding in findings:
            if finding.name not in self.known_findings:
                tqdm.write(f"{finding.level}: {finding.name}: {finding.text}")
        self.known_findings = {finding.name for finding in findings}

    def _track(self, row: dict) -> None:
        """Hands the row to the tracker, which draws numbers."""
        self.tracker.log({k: v for k, v in row.items() if not isinstance(v, str)}, step=row["step"])

    def _save(self, step: int, accuracy: float) -> None:
        self.saved_step = step
        is_best, self.best = accuracy > self.best, max(accuracy, self.best)
        state = dict(step=step, best=self.best, optimizer=distributed.gather_optimizer_state(self.optimizer))
        state |= self.more_state()
        weights = distributed.gather_state_dict(self.policy)
        if distributed.is_main_process():
            kept = self.config.save_total_limit
            checkpoints.save_checkpoint(self.folder, step, self.policy, self.tokenizer, state, kept, is_best, weights)
        distributed.barrier()  # the other processes may read the checkpoint

    def _evaluate_saved_step(self) -> None:
        """Adds the evaluation that the checkpoint's step lacks, where a signal ended the run before it."""
        logged = distributed.run_on_main(self.metrics_log.read)
        if not logged or logged[-1]["step"] != self.last_step:
            return  # the log was lost
        if "eval/accuracy" not in logged[-1]:
            samples = self.samples_log.read()
            # Killed between the next two writes, the run comes here again, with the samples written already.
            self.samples_log.replace([r for r in samples if r["step"] < self.last_step or r["split"] == "train"])
            metrics, new_samples = self.evaluate()
            self.samples_log.append(*({"step": self.last_step, **sample} for sample in new_samples))
            logged[-1] |= metrics
            self.metrics_log.replace(logged)
            self._track(logged[-1])
            tqdm.write(describe_evaluation(f"step {self.last_step}", logged[-1]))
            self._report_health()
        if logged[-1]["eval/accuracy"] > self.best:
            self.best = logged[-1]["eval/accuracy"]
            distributed.run_on_main(checkpoints.mark_best, self.folder, self.last_step)
