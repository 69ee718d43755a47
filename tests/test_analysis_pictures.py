"""The pictures of a trace: nothing is cut off, every number is in its place, hostile tokens are shown as text."""

import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from random_traces import UNUSED, make_trace

from analysis import comparison_pictures, drawing, pictures, token_figures
from tracking.plotter import STYLE


def test_drawable_labels():
    assert drawing.drawable(" a\n\tb") == "␣a↵⇥b"
    assert drawing.drawable("中\x00\\") == "\\u4e2d\\x00\\", "no glyph: an escape"
    assert drawing.drawable("x" * 20, 5) == "xxxx…"


def test_labels_keep_a_gap():
    assert drawing.select_spaced([0, 1, 5, 6, 9], [3, 0, 1, 2, 4], gap=2) == [3, 0, 4]


def figures_of(trace):
    yield "entropy", pictures.entropy_figure(trace)
    yield "heatmap", pictures.heatmap_figure(trace, 0)
    yield "consistency", pictures.consistency_figure(trace)
    yield "landscape", pictures.landscape_figure(trace)
    yield "scatter", pictures.scatter_figure(trace)
    yield "histograms", pictures.histogram_figure(trace)


@pytest.mark.parametrize(
    "trace",
    [
        make_trace(),
        make_trace(steps=150, soft=True, seed=1),
        make_trace(steps=1, resamples=0, forced_forks=[], gold=None, answer=None),
        make_trace(steps=12, sharp=200.0),  # one-hot to the last digit
        make_trace(steps=12, sharp=0.0),  # uniform
    ],
    ids=["hostile tokens", "long and soft", "one step", "certain", "uniform"],
)
def test_pictures_are_titled_and_nothing_is_cut_off(trace):
    with rc_context(STYLE):
        for name, figure in figures_of(trace):
            FigureCanvasAgg(figure).draw()
            drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
            outside = max(-drawn.x0, -drawn.y0, drawn.x1 - width, drawn.y1 - height)
            assert outside < 0.01, f"{name}: {outside:.2f} inches are cut off"
            panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
            assert all(axes.get_title(loc="left") for axes in panels), f"{name}: a panel without a title"
            assert all(axes.get_xlabel() for axes in panels), f"{name}: an axis without a label"


def test_heatmap_shows_the_chosen_token_wherever_it_ranks():
    trace = make_trace(steps=90)
    with rc_context(STYLE):
        (axes, _) = pictures.heatmap_figure(trace, 40).axes
    cells = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    outlined = {round(box.get_y() + 0.45): round(box.get_x() + 0.47) for box in axes.patches}
    for row, t in enumerate(range(40, 80)):
        rank = int(trace["rank"][t])
        assert cells[0, row].endswith(f"#{rank}") == (rank > 10)
        assert outlined.get(row) == (rank if rank <= 10 else None)
        for column in range(1, 11):
            assert cells[column, row] == drawing.drawable(trace.label(int(trace["topk_ids"][t, column - 1])), 12)


def test_pictures_are_files_with_a_page_for_every_40_steps(tmp_path):
    paths = pictures.draw_pictures(make_trace(steps=41), tmp_path)
    names = "entropy consistency landscape entropy_varentropy histograms topk_01 topk_02".split()
    assert sorted(paths) == sorted(tmp_path.iterdir()) == sorted(tmp_path / f"{name}.png" for name in names)
    assert all(matplotlib.image.imread(path).std() > 0.05 for path in paths)


def test_token_figure_shows_its_step():
    trace = make_trace()
    figure = token_figures.TokenFigure(trace.arrays, {token: trace.label(token) for token in trace.spelling})
    for t in (0, UNUSED, 7):  # filled again and again
        figure.fill(t)
        np.testing.assert_allclose(figure.curve.get_ydata(), np.exp(trace["rank_curve"][t].astype(float)))
        rank, ids = int(trace["rank"][t]), trace["topk_ids"][t, :20].tolist()
        assert (figure.chosen.get_xdata()[0], figure.nucleus.get_xdata()[0]) == (rank, trace["n95"][t])
        np.testing.assert_allclose(figure.chosen.get_ydata(), math.exp(trace["logp"][t]))
        widths = [bar.get_width() for bar in figure.bars]
        np.testing.assert_allclose(widths[:20], np.exp(trace["topk_logp"][t, :20]))
        marked = [row for row, bar in enumerate(figure.bars) if bar.get_facecolor()[0] > 0.5]
        assert marked == [ids.index(trace["token_ids"][t]) if trace["token_ids"][t] in ids else 20]
        labels = [label.get_text() for label in figure.labels]
        assert labels[:20] == [drawing.drawable(trace.label(token), 16) for token in ids]


@pytest.mark.parametrize("workers", [1, 2])
def test_token_figures_are_files(tmp_path, workers):
    folder = tmp_path / "token_pdfs"
    token_figures.draw_token_figures(make_trace(), folder, limit=20, workers=workers)
    assert sorted(file.name for file in folder.iterdir()) == [f"step_{t:04}.pdf" for t in range(20)]
    assert all(file.read_bytes().startswith(b"%PDF") for file in folder.iterdir())


def test_comparisons_are_drawn(tmp_path):
    a, b = make_trace(steps=30), make_trace(steps=25, seed=1, soft=True)
    for shared in (0, 7):
        comparison_pictures.draw_free_comparison(a, b, shared, tmp_path / "free.png")
    rng = np.random.default_rng(0)
    columns = {name: rng.random(30) for name in ("kl_ab", "kl_ba", "jsd", "change")}
    columns |= {"token": a.labels, "flips": rng.random(30) < 0.2}
    shifted = [{"id": i, "token": a.label(i), "shift": 0.5 - i / 20} for i in range(20)]
    comparison_pictures.draw_forced_comparison(columns, shifted, ["a", "$b"], "a", tmp_path / "forced.png")
    for name in ("free.png", "forced.png"):
        assert matplotlib.image.imread(tmp_path / name).std() > 0.05
