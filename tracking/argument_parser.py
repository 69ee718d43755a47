"""A command line made from dataclasses: a flag for each field, a group of flags for each class. Without torch.

Left out on purpose: fields of other types than settings have.
"""

import argparse
import dataclasses
import difflib
import os
import typing
from types import NoneType, UnionType


class ArgumentParser(argparse.ArgumentParser):
    """Flags from the fields of dataclasses: --name and --na-me, a group for each section.

    Follows transformers.HfArgumentParser for the types that settings have (str, int, float, bool, a list of them, and
    any of these or None): a bool flag may stand alone or have a value. Errors are ValueErrors, in place of a page of
    usage.
    """

    def __init__(self, sections, flags: dict[str, dict] | None = None, **options):
        """flags: more of them, {name: options of add_argument}."""
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **options)
        for name, of_flag in (flags or {}).items():
            self.add_argument(f"--{name}", **of_flag)
        for section in sections:
            group = self.add_argument_group(section._argument_group_name)
            types = typing.get_type_hints(section)
            for f in dataclasses.fields(section):
                kind = types[f.name]
                if isinstance(kind, UnionType):
                    (kind,) = (t for t in typing.get_args(kind) if t is not NoneType)
                options = dict(default=f.default, type=parse_bool if kind is bool else kind, **f.metadata)
                if kind is bool and f.default is not None:
                    options |= dict(nargs="?", const=True)
                if typing.get_origin(kind) is list:
                    options |= dict(nargs="+", type=typing.get_args(kind)[0])
                group.add_argument(*dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}")), **options)

    def error(self, message):
        raise ValueError(message)


def parse_bool(text: str) -> bool:
    values = {"true": True, "yes": True, "t": True, "y": True, "1": True}
    values |= {"false": False, "no": False, "f": False, "n": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(values)}")
    return values[text.lower()]


def read_early(arguments: list[str], flags: dict[str, dict]) -> argparse.Namespace:
    """The values of these flags alone. For those that decide the others' defaults, which --help shows."""
    return ArgumentParser((), flags, add_help=False).parse_known_args(arguments)[0]


def similar(name: str, known) -> str:
    """The known names that are spelled alike, as a question; "" if there is none."""
    close = difflib.get_close_matches(name, known, n=2)
    return f"{' or '.join(close)}?" if close else ""


def parse_flags(parser: ArgumentParser, arguments: list[str]) -> dict:
    """{name: value} of every flag. An unknown one raises ValueError, with the flags that are spelled alike."""
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        close = similar(unknown[0], parser._option_string_actions)
        raise ValueError(f"unknown argument {unknown[0]!r}: {close or 'see --help'}")
    return {name: _expand_home(name, value) for name, value in vars(values).items()}


PATHS = (
    "model_name", "judge_model", "judge", "teacher_name", "dataset_path", "data_dir", "output_dir", "from_trace",
    "resume_from_checkpoint",
)  # fmt: skip


def _expand_home(name: str, value):
    """A path with the home folder in place of ~, which a shell leaves as it is in --output_dir=~/runs."""
    if name == "compare" and value:
        return [os.path.expanduser(path) for path in value]
    return os.path.expanduser(value) if name in PATHS and isinstance(value, str) else value
