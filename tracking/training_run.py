"""The training loop's scaffold."""

import signal
import sys


class TrainingStopped(Exception):
    """A run ended before its last step, with a checkpoint. signal: the one that asked for it, or None."""

    def __init__(self, signal: int | None, message: str):
        super().__init__(message)
        self.signal = signal


class SignalHandler:
    """While entered, Ctrl-C and SIGTERM set `signal`, for a loop to look at when its step is done. A second one ends at
    once."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self):
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


def finish(accelerator) -> None:
    """Ends the logging of an accelerate.Accelerator; its own end_training would leave the other processes as well."""
    for tracker in accelerator.trackers:
        tracker.finish()
