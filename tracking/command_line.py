"""What every script does around its work: read the command line, and turn refusals into one line.

A script begins with `parse_or_exit`, before it imports torch, so that --help and a mistyped flag are answered at once,
and ends with `run_script`. Exit codes: 0, 2 for what is refused, 1 for a run that ended early with a checkpoint, 128 +
the signal's number for a run that a signal ended. Errors of the program itself keep their traceback.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from engine import device


def parse_or_exit(parse: Callable[[list[str]], object]):
    """parse(arguments) -> the script's configuration. A ValueError ends the program with its line and exit code 2."""
    try:
        return parse(sys.argv[1:])
    except ValueError as error:
        exit_with(error, 2)


def run_script(main: Callable, *arguments) -> None:
    """Calls main(*arguments) and exits with its result, if it is a number.

    A ValueError is a refusal: its line, exit code 2. So is an operator that Apple's mps lacks. An exception that has an
    `exit_code`, such as training_run.TrainingStopped, ends with its line and that code.
    """
    try:
        sys.exit(main(*arguments))
    except KeyboardInterrupt:
        exit_with("interrupted", 130)
    except Exception as error:
        if isinstance(error, NotImplementedError) and (line := device.missing_operator(error)):
            exit_with(line, 2)
        code = 2 if isinstance(error, ValueError) else getattr(error, "exit_code", None)
        if code is None:
            raise
        exit_with(error, code)


def exit_with(message, exit_code: int):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(exit_code)
