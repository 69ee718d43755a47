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
    accept_any_output_encoding()
    try:
        return parse(sys.argv[1:])
    except ValueError as error:
        exit_with(error, 2)


def run_script(main: Callable, *arguments) -> None:
    """Calls main(*arguments) and exits with its result, if it is a number.

    A ValueError is a refusal: its line, exit code 2. So is what the operating system refuses, as a write to a full
    disk, what LIBRARIES raise of their own, and an operator that Apple's mps lacks. An exception that has an
    `exit_code`, such as training_run.TrainingStopped, ends with its line and that code.
    """
    accept_any_output_encoding()
    try:
        sys.exit(main(*arguments))
    except KeyboardInterrupt:
        exit_with("interrupted", 130)
    except Exception as error:
        if isinstance(error, ValueError):
            exit_with(error, 2)
        if hasattr(error, "exit_code"):
            exit_with(error, error.exit_code)
        if isinstance(error, NotImplementedError) and (line := device.missing_operator(error)):
            exit_with(line, 2)
        if is_of_the_surroundings(error):
            exit_with(f"{type(error).__name__}: {error}", 2)
        raise


# Packages whose exceptions tell of files, services and templates, not of an error in this program.
LIBRARIES = ("datasets", "fsspec", "httpx", "huggingface_hub", "jinja2", "pyarrow", "requests", "safetensors")


def is_of_the_surroundings(error: Exception) -> bool:
    """Whether the operating system or one of LIBRARIES raised the error for what it found."""
    if isinstance(error, OSError) and error.errno is not None:
        return True
    return any(kind.__module__.partition(".")[0] in LIBRARIES for kind in type(error).__mro__)


def exit_with(message, exit_code: int):
    """Prints the message as one line on stderr, and exits."""
    line = " ".join(part.strip() for part in str(message).splitlines() if part.strip())
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(exit_code)


def accept_any_output_encoding() -> None:
    """Characters that the terminal's encoding lacks are replaced: a question in another script must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
