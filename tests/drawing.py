"""Runs in tests draw no pictures and write no report (conftest.py), unless a test asks for them."""

import contextlib

import pytest

from tracking import plotter, report

_DRAWING = {(plotter, "plot_run"): plotter.plot_run, (report, "make_report"): report.make_report}


@contextlib.contextmanager
def no_drawing():
    """Runs draw no pictures and write no report."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in _DRAWING:
            patch.setattr(owner, name, lambda *arguments, **options: None)
        yield


@contextlib.contextmanager
def drawing():
    """Runs draw and report again, inside no_drawing."""
    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), function in _DRAWING.items():
            patch.setattr(owner, name, function)
        yield
