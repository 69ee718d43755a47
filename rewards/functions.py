"""Rewards from the user's own file: `--rewards accuracy:1,my_rewards.py:brevity:0.2`.

    def brevity(completion):                         # of one completion -> a number
        return -len(completion) / 100

    def shortest(completions):                       # of a group, all answers to one problem -> as many numbers
        return [float(len(text) == min(map(len, completions))) for text in completions]

A function asks for what it needs by the names of its parameters: ONE of one completion, GROUP of a group. The parameter
`completions` makes it a function of a group. Relative and pairwise rewards need the group.

A function that fails ends the run, after a checkpoint, with one line: file, line, function, and the sample. It fails
when it raises, takes longer than the time limit, or returns anything but finite numbers, one for each completion. What
it prints is left out and mentioned once.

Left out on purpose: a sandbox. The file is the user's own code and runs in this process.
"""

import contextlib
import functools
import importlib.util
import inspect
import io
import math
import numbers
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

ONE = ("completion", "gold", "tags", "question", "prompt")  # parameters of a function of one completion
GROUP = ("completions", "golds", "tags", "question", "prompt")  # of a function of a group; golds: one a completion
IN_A_FILE = re.compile(r"(?P<file>.+\.py)\s*:\s*(?P<name>[^:]+?)\s*(?::(?P<weight>.*))?")
LOADING_SECONDS = 120.0  # for the file's own imports


class RewardError(ValueError):
    """A reward that cannot be used, in one line. sample: what it was asked about, or None while the file is read."""

    def __init__(self, line: str, sample: dict | None = None):
        super().__init__(line, sample)  # both, so that it can be sent to other processes
        self.line, self.sample = line, sample

    def __str__(self):
        return self.line


class Rewards(dict):
    """{name: weight}, as evaluator.parse_rewards reads it.

    functions: {name: function} of the rewards that evaluator.py does not have. Each takes groups, lists of the records
    of evaluator.grade, and returns a list of numbers for each group.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.functions: dict[str, Callable[[list[list[dict]]], list[list[float]]]] = {}

    @property
    def files(self) -> list[Path]:
        """The user's files, each once."""
        return sorted({function.file for function in self.functions.values() if isinstance(function, UserReward)})


class UserReward:
    """One function of the user's file. Raises RewardError, one line, if the file or the function cannot be used."""

    def __init__(self, path: str, name: str, time_limit: float = 10.0):
        """path: of the file; ~ is the home folder. time_limit: seconds that one call may take."""
        self.file, self.name, self.time_limit = Path(path).expanduser().resolve(), name, time_limit
        self.line, self.has_printed = 1, False
        if not self.file.is_file():
            raise RewardError(f"rewards: there is no file {path!r}")
        module = self._watched(load_module, self.file, self.file.stat().st_mtime_ns, limit=LOADING_SECONDS)
        own = [
            n for n, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        self.function = getattr(module, name, None)
        if not callable(self.function):
            raise RewardError(f"rewards: {self.file.name} has no function {name!r} (it has {', '.join(own) or 'none'})")
        self.line = getattr(getattr(inspect.unwrap(self.function), "__code__", None), "co_firstlineno", 1)
        parameters = inspect.signature(self.function).parameters.values()
        self.of_group = any(p.name == "completions" for p in parameters)
        known = GROUP if self.of_group else ONE
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.asks_for = [n for n in known if takes_all or any(p.name == n for p in parameters)]
        for p in parameters:
            required = p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            if required and (p.name not in known or p.kind is p.POSITIONAL_ONLY):
                kind = "a group" if self.of_group else "one completion"
                raise self.error(f"parameter {p.name!r}: a function of {kind} can ask for {', '.join(known)}")

    def __call__(self, groups: list[list[dict]]) -> list[list[float]]:
        """groups: lists of records with completion, gold, question, tags and prompt -> a number for each record."""
        return [self._score_group(group) if self.of_group else [self._score(r) for r in group] for group in groups]

    def _score(self, record: dict) -> float:
        sample = {name: record[name] for name in ("question", "gold", "completion")}
        value = self._call({name: record[name] for name in ONE}, sample)
        return self._number(value, "it", sample)

    def _score_group(self, group: list[dict]) -> list[float]:
        first, columns = group[0], {f"{name}s": [r[name] for r in group] for name in ("completion", "gold")}
        sample = {"question": first["question"], "gold": first["gold"], "completions": columns["completions"]}
        values = self._call(columns | {name: first[name] for name in ("tags", "question", "prompt")}, sample)
        values = values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
        if not isinstance(values, list | tuple):
            raise self.error(f"it returned {short(values)}, not a list of {len(group)} numbers", sample)
        if len(values) != len(group):
            raise self.error(f"it returned {len(values)} numbers for {len(group)} completions", sample)
        return [self._number(value, f"number {i} of its list", sample) for i, value in enumerate(values)]

    def _number(self, value, what: str, sample: dict) -> float:
        with contextlib.suppress(Exception):  # of an array with several numbers, which is refused below
            value = value.item() if hasattr(value, "item") else value  # numpy's and torch's numbers
        if not isinstance(value, numbers.Real):
            raise self.error(f"{what} {'returned' if what == 'it' else 'is'} {short(value)}, not a number", sample)
        if not math.isfinite(value):
            raise self.error(f"{what} {'returned' if what == 'it' else 'is'} {value}, not a finite number", sample)
        return float(value)

    def _call(self, values: dict, sample: dict):
        return self._watched(self.function, **{name: values[name] for name in self.asks_for}, sample=sample)

    def error(self, what: str, sample: dict | None = None, line: int | None = None) -> RewardError:
        where = f"{self.file.name}, line {line or self.line}, in {self.name}"
        about = "" if sample is None else f"; the sample: {short(sample.get('completion', sample.get('completions')))}"
        return RewardError(f"rewards: {where}: {what}{about}", sample)

    def _watched(self, function, *arguments, limit: float | None = None, sample: dict | None = None, **options):
        """function(...) in a thread of its own, which a time limit can leave behind. Its output is left out."""
        limit, outcome, printed = limit or self.time_limit, {}, io.StringIO()

        def work():
            try:
                outcome["value"] = function(*arguments, **options)
            except BaseException as error:  # exit() in the user's file too
                outcome["error"] = error

        thread = threading.Thread(target=work, daemon=True)
        with contextlib.redirect_stdout(printed):
            thread.start()
            thread.join(limit)
        if text := printed.getvalue().strip():
            self._mention(text)
        if "error" in outcome:
            error = outcome["error"]
            line = line_in(self.file, error)
            raise self.error(f"{type(error).__name__}: {' '.join(str(error).split())}", sample, line) from error
        if "value" not in outcome:
            doing = "reading the file" if sample is None else "a call"
            raise self.error(f"{doing} took longer than {limit:g} seconds (--reward_timeout)", sample)
        return outcome["value"]

    def _mention(self, text: str) -> None:
        if not self.has_printed:
            line = (
                f"rewards: {self.file.name}, in {self.name}: it printed {short(text)}; what rewards print is left out"
            )
            print(line, file=sys.stderr)
        self.has_printed = True


@functools.cache
def load_module(file: Path, version: int):
    """Runs the file as a module, once for each version of it; it may import files beside it."""
    spec = importlib.util.spec_from_file_location(f"rewards_of_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def line_in(file: Path, error: BaseException) -> int | None:
    """The last line of the file that the error went through; of a syntax error, the line itself."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    line, traceback = None, error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename == str(file):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def short(value, limit: int = 80) -> str:
    """repr, at most `limit` characters of it, on one line."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
