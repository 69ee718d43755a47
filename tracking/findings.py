"""Finding: the result of one check, both of the report's health checks and of `main.py --doctor`.

Left out on purpose: the checks themselves; see tracking/health.py (after training) and tracking/doctor.py (before it).
"""

from dataclasses import dataclass

LEVELS = ("ok", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """What one check says.

    level    "ok"; "warning": look at it, the run may still be good; "problem": do not use the run as it is
    name     what was checked, a few words
    message  what the check measured, with numbers
    rule     when the level is not ok; "" where no threshold applies
    advice   what to change if the level is not ok
    """

    level: str
    name: str
    message: str
    rule: str = ""
    advice: str = ""

    def __post_init__(self):
        assert self.level in LEVELS, self.level

    @property
    def text(self) -> str:
        """The message, followed by the advice if the level is not ok. One line."""
        return f"{self.message}: {self.advice}" if self.advice and self.level != "ok" else self.message


def judge(passed: bool, name: str, message: str, *, rule="", advice="", level="warning") -> Finding:
    """A finding that is ok if the check passed, else of the given level."""
    return Finding("ok" if passed else level, name, message, rule, advice)
