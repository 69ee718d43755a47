"""--config: settings in a JSON file, read without torch. tracking/run_config.py puts flags over them."""

import json
import os
import typing
from types import UnionType

from tracking.argument_parser import similar

# Where a run was and what was asked of it: a run that is made again from its args.json has these of its own.
NOT_REPEATED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "doctor", "eval_only")


def read_config(path: str, sections, presets: dict) -> dict:
    """The settings in a JSON file: one object {name: value}, or a run's args.json, without NOT_REPEATED.

    Raises ValueError, one line, if the file cannot be read, or for a name or type that is no setting's.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from error
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = {name: value for name, value in values["config"].items() if name not in NOT_REPEATED}
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: give one object of settings, {{name: value}}, or a run's args.json")
    types = {name: kind for section in sections for name, kind in typing.get_type_hints(section).items()}
    types["preset"] = str
    for name, value in values.items():
        if name not in types:
            close = similar(name, types)
            raise ValueError(f"--config {path}: unknown setting {name!r}" + (f": {close}" if close else ""))
        if not _has_type(value, types[name]):
            kind = getattr(types[name], "__name__", types[name])
            raise ValueError(f"--config {path}: {name} is {value!r}: must be of the type {kind}")
    if values.get("preset", next(iter(presets))) not in presets:
        raise ValueError(f"--config {path}: preset {values['preset']!r}: choose from {', '.join(presets)}")
    return values


def _has_type(value, kind) -> bool:
    """Whether a value from JSON can be a setting of that type: 1 is a float too, and True is no int."""
    if isinstance(kind, UnionType):
        return any(_has_type(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_has_type(item, *typing.get_args(kind)) for item in value)
    return type(value) is kind or kind is float and type(value) is int
