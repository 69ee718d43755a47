"""plotter.py: what it reads, that it draws the file's own numbers, and that every picture is whole."""

import gzip
import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from tracking import plotter

pytestmark = pytest.mark.pictures

PICTURES = ["eval_score.png", "overview.png", "train_score.png"]


def metrics(steps=30, seed=0, control=False, eval_steps=10):
    """Rows as a run of `main.py` logs them; the control learns nothing."""
    noise = np.random.default_rng(seed)
    rows = []
    for step in range(steps + 1):
        learned = 0.0 if control else 1 - math.exp(-step / 6)
        accuracy, format_rate = 0.2 + 0.7 * learned, 0.5 + 0.45 * learned
        row = {"step": step}
        if step > 0:
            row |= {"reward/accuracy": accuracy + noise.normal(0, 0.04), "reward/format": format_rate}
            row |= {"reward": row["reward/accuracy"] + 0.5 * row["reward/format"], "entropy": 0.6 - 0.5 * learned}
            row |= {"accuracy": accuracy, "format_rate": format_rate, "completion_length": 23 + 14 * learned}
            row |= {"truncated_rate": 0.0, "clip_frac": 0.002, "grad_norm": 0.3 + noise.random(), "lr": 6e-4 / step}
            row |= {"zero_std_groups": 0.5 * learned, "reflect_rate": 0.01, "repetition": 0.02, "logprob_gap": 1.5e-6}
            row |= {"time/rollout": 0.6, "time/train": 0.4 + noise.random() / 9, "tokens_per_second": 9876.0}
        if step % eval_steps == 0:
            row |= {"eval/accuracy": accuracy, "eval/accuracy_low": accuracy - 0.06, "eval/n": 256}
            row |= {"eval/accuracy_high": accuracy + 0.04, "eval/accuracy_greedy": accuracy + 0.02 * noise.random()}
            row |= {"eval/accuracy_flexible": 0.6 + 0.3 * learned, "eval/format_rate": format_rate}
            row |= {"eval/format_rate_low": format_rate - 0.05, "eval/format_rate_high": format_rate + 0.03}
            row |= {"eval/length": 23 + 14 * learned}
        rows.append(row)
    return rows


def write(folder, rows, torn=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return folder


def one_run(rows):
    return [plotter.Group("run", [rows])]


def seeds_and_controls():
    seeds = [metrics(seed=seed) for seed in range(3)]
    controls = [metrics(seed=seed, control=True) for seed in (7, 8)]
    return [plotter.Group("trained", seeds), plotter.Group("control: shuffled", controls, plotter.GREY)]


def lines(figure, key):
    """{colour: [(steps, values), ...]} of all lines that carry this label."""
    found = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            if line.get_label() == key:
                found.setdefault(line.get_color(), []).append(tuple(map(list, line.get_data())))
    return found


def line(figure, key):
    ((found,),) = lines(figure, key).values()
    return found


def end_labels(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def column(rows, key):
    return [row["step"] for row in rows if key in row], [row[key] for row in rows if key in row]


def check_pictures(folder, names):
    """Exactly these files, no temporary ones, each a PNG with something on it and nothing in its outermost pixels."""
    assert sorted(os.listdir(folder)) == sorted(names)
    for name in names:
        pixels = matplotlib.image.imread(folder / name)[..., :3]
        assert pixels.shape[1] == 1500
        assert 0.02 < pixels.std() < 0.4
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (edge == 1).all()


# --- reading


def test_reads_file_folder_and_gzip(tmp_path):
    rows = metrics(3)
    plain = write(tmp_path / "plain", rows)
    assert plotter.read_metrics(plain) == plotter.read_metrics(str(plain / "metrics.jsonl")) == rows
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "metrics.jsonl.gz").write_bytes(gzip.compress((plain / "metrics.jsonl").read_bytes()))
    assert plotter.read_metrics(packed) == plotter.read_metrics(packed / "metrics.jsonl.gz") == rows


@pytest.mark.parametrize("torn", ["{", '{"step": 4, "rew', '{"step": 4', "\0\0\0\0", '{"step": 4, "name": "\udcc3'])
def test_torn_last_line_is_dropped(tmp_path, torn):
    rows = metrics(3)
    run = write(tmp_path, rows)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(torn.encode(errors="surrogateescape"))
    assert plotter.read_metrics(run) == rows


def test_last_line_without_newline_counts(tmp_path):
    assert plotter.read_metrics(write(tmp_path, [], torn='{"step": 0}')) == [{"step": 0}]


@pytest.mark.parametrize("bad", ['{"step": 1, "rew', "", "[1]", "7", '{"reward": 1.0}', '{"step": "one"}'])
def test_bad_line_elsewhere_is_named(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        plotter.read_metrics(tmp_path)


def test_broken_gzip_is_a_clear_error(tmp_path):
    path, whole = tmp_path / "metrics.jsonl.gz", gzip.compress(b'{"step": 0}\n' * 99)
    for content in (whole[:-9], b"no gzip at all", whole[:20] + b"\xff" * 20 + whole[40:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="metrics.jsonl.gz: not a whole gzip file"):
            plotter.read_metrics(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no metrics.jsonl or metrics.jsonl.gz in this folder"):
        plotter.read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError):
        plotter.read_metrics(tmp_path / "nowhere")


# --- arithmetic


def test_by_step_keeps_finite_numbers_and_the_later_row():
    rows = [{"step": 1, "x": 1}, {"step": 2, "x": None}, {"step": 3, "x": math.nan}, {"step": 4}, {"step": 1, "x": 5.0}]
    assert plotter.by_step(rows, "x") == {1: 5.0}
    assert plotter.by_step([{"step": 1, "x": "text"}, {"step": 2, "x": math.inf}], "x") == {}


def test_align_takes_common_steps_only():
    steps, values = plotter.align([{3: 0.3, 1: 0.1, 2: 0.2}, {1: 1.0, 3: 3.0, 4: 4.0}])
    assert steps.tolist() == [1, 3]
    assert values.tolist() == [[0.1, 0.3], [1.0, 3.0]]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_smooth_equals_the_naive_mean(length, window):
    values = np.random.default_rng(length).normal(size=(2, length))
    half = min(window, length if length % 2 else length - 1) // 2
    expected = [[row[max(0, i - half) : i + half + 1].mean() for i in range(length)] for row in values]
    np.testing.assert_allclose(plotter.smooth(values, window), expected, rtol=1e-12)


def test_smoothing_window_is_odd_and_as_documented():
    def window(steps):
        return plotter.smoothing_window(one_run([{"step": step, "reward": 0.0} for step in range(steps)]))

    assert [window(steps) for steps in (0, 1, 60, 2000)] == [3, 3, 5, 25]


@pytest.mark.parametrize(
    "heights", [[0.5], [0.2, 0.8], [0.9, 0.95, 0.97, 1.0], [0.0, 0.0, 0.0], [0.4, 0.41, 0.99, 1.3]]
)
def test_spread_keeps_order_gap_and_the_top(heights):
    spread = plotter.spread(heights, 0.1)
    assert all(upper - lower > 0.1 - 1e-9 for lower, upper in zip(spread, spread[1:], strict=False))
    assert spread[-1] <= 0.95
    if heights == [0.2, 0.8]:
        assert spread == heights


# --- what is drawn


def test_eval_figure_draws_the_numbers_of_the_file():
    rows = metrics()
    figure = plotter.eval_figure(one_run(rows))
    for name in ("accuracy", "accuracy_greedy", "accuracy_flexible", "format_rate", "length"):
        assert line(figure, f"eval/{name}") == column(rows, f"eval/{name}")
    score = figure.axes[0]
    assert score.get_title(loc="left") == "Held-out accuracy and format rate, n = 256"
    heights = score.collections[0].get_paths()[0].vertices[:, 1]  # the band of the first curve
    assert min(heights) == min(column(rows, "eval/accuracy_low")[1])
    assert max(heights) == max(column(rows, "eval/accuracy_high")[1])
    assert f"sampled {100 * rows[-1]['eval/accuracy']:.1f} %" in end_labels(figure)
    assert figure.legends[0].get_texts()[0].get_text() == "run (band: Wilson 95 % interval)"


def test_train_figure_draws_raw_and_smoothed():
    rows = metrics()
    figure = plotter.train_figure(one_run(rows))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Total reward, weighted", "Accuracy reward", "Format reward"]
    for key in ("reward", "reward/accuracy", "reward/format"):
        steps, values = column(rows, key)
        assert line(figure, f"{key} each") == (steps, values)
        np.testing.assert_allclose(line(figure, key)[1], plotter.smooth(np.array([values]), 5)[0])


def test_overview_shows_only_what_is_logged_and_never_smooths_the_learning_rate():
    rows = metrics()
    figure = plotter.overview_figure(one_run(rows))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == 11 and "KL to the reference" not in titles
    assert line(figure, "lr") == column(rows, "lr")
    with_kl = [row | {"kl": 0.01} for row in rows]
    assert "KL to the reference" in [a.get_title(loc="left") for a in plotter.overview_figure(one_run(with_kl)).axes]


def test_times_are_stacked():
    rows = [{"step": step, "time/rollout": 3.0, "time/train": 2.0} for step in (1, 2, 3)]
    (axes,) = plotter.overview_figure(one_run(rows)).axes
    extents = [
        (path.vertices[:, 1].min(), path.vertices[:, 1].max()) for c in axes.collections for path in c.get_paths()
    ]
    assert extents == [(0, 2), (2, 5)]
    assert [text.get_text() for text in axes.texts] == ["train 2", "rollout 3"]


def test_missing_keys_leave_gaps_not_zeros():
    rows = [{"step": 1, "reward": 1.0}, {"step": 2}, {"step": 3, "reward": None}, {"step": 4, "reward": -2.0}]
    figure = plotter.train_figure(one_run(rows))
    assert line(figure, "reward each") == ([1, 4], [1.0, -2.0])
    assert figure.axes[0].get_ylim()[0] < -2
    assert plotter.eval_figure(one_run(rows)) is None
    assert plotter.overview_figure(one_run(rows)) is None


def test_interval_may_miss_at_some_steps():
    rows = metrics()
    del rows[10]["eval/accuracy_low"], rows[20]["eval/accuracy_high"]
    assert line(plotter.eval_figure(one_run(rows)), "eval/accuracy") == column(rows, "eval/accuracy")


def test_seeds_are_averaged_within_their_range_and_controls_are_named():
    groups = seeds_and_controls()
    figure = plotter.eval_figure(groups)
    greedy = [column(run, "eval/accuracy_greedy")[1] for run in groups[0].runs]
    drawn = lines(figure, "eval/accuracy_greedy")
    assert set(drawn) == {plotter.VERMILLION, plotter.GREY}
    np.testing.assert_allclose(drawn[plotter.VERMILLION][0][1], np.mean(greedy, axis=0))
    assert [values for _, values in lines(figure, "eval/accuracy_greedy each")[plotter.VERMILLION]] == greedy
    band = figure.axes[0].collections[2].get_paths()[0].vertices[:, 1]  # sampled, its control, greedy
    assert (min(band), max(band)) == (np.min(greedy), np.max(greedy))
    assert "control sampled 20.0 %" in end_labels(figure)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[0] == "trained; mean of 3 seeds (band: minimum to maximum; faint: each seed)"
    assert legend[1].startswith("control: shuffled; mean of 2 seeds")


def test_several_runs_are_drawn_at_their_common_steps():
    groups = [plotter.Group("trained", [metrics(30), metrics(25)]), plotter.Group("control", [metrics(12)], "#808080")]
    for steps, _ in sum(lines(plotter.train_figure(groups), "reward").values(), []):
        assert steps == list(range(1, 13))
    for steps, _ in sum(lines(plotter.eval_figure(groups), "eval/accuracy").values(), []):
        assert steps == [0, 10]


@pytest.mark.parametrize("draw", [plotter.train_figure, plotter.eval_figure, plotter.overview_figure])
@pytest.mark.parametrize("groups", [one_run(metrics(2)), one_run(metrics(1, eval_steps=1)), seeds_and_controls()])
def test_nothing_is_cut_off_and_panels_keep_apart(draw, groups):
    if draw is plotter.overview_figure:
        groups = [groups[0]._replace(runs=groups[0].runs[:1])]
    figure = draw(groups)
    with matplotlib.rc_context(plotter.STYLE):
        figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_window_extent()]
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1 and 0 <= box.y0 < box.y1 <= figure.bbox.y1
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)


# --- files


def test_plot_run_writes_three_pictures_and_overwrites_them(tmp_path):
    run = write(tmp_path / "run", metrics(0))
    (path,) = plotter.plot_run(str(run))
    before = path.read_bytes()
    write(run, metrics(12), torn='{"step": 13, "re')
    with open(path, "rb") as viewer:  # opened before the redraw: it goes on seeing the whole old picture
        paths = plotter.plot_run(run)
        assert viewer.read() == before
    assert sorted(path.name for path in paths) == PICTURES
    assert path in paths and path.read_bytes() != before
    check_pictures(run / "plots", PICTURES)


def test_one_row_draws_what_is_there(tmp_path):
    before_training = write(tmp_path / "zero", metrics(0))
    plotter.plot_run(before_training, tmp_path / "out0")
    check_pictures(tmp_path / "out0", ["eval_score.png"])
    first_step = write(tmp_path / "one", metrics(1)[1:])
    plotter.plot_run(first_step, tmp_path / "out1")
    check_pictures(tmp_path / "out1", ["overview.png", "train_score.png"])
    assert plotter.plot_run(write(tmp_path / "empty", [])) == []
    assert not (tmp_path / "empty" / "plots").exists()


def test_a_failed_write_leaves_the_old_picture_and_no_temporary_file(tmp_path, monkeypatch):
    run = write(tmp_path / "run", metrics(0))
    (path,) = plotter.plot_run(run)
    old = path.read_bytes()

    def full_disk(figure, name, **options):
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(plotter.Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space left"):
        plotter.plot_run(run)
    assert os.listdir(run / "plots") == ["eval_score.png"] and path.read_bytes() == old


def test_redrawing_touches_no_global_state():
    settings = dict(matplotlib.rcParams)
    plotter.train_figure(one_run(metrics(3)))
    assert dict(matplotlib.rcParams) == settings
    root = Path(plotter.__file__).parent.parent
    check = "import sys; from tracking import plotter; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=root, check=True)


# --- command line


def run_main(*arguments):
    plotter.main([str(argument) for argument in arguments])


def test_cli_one_run_and_seeds_with_controls(tmp_path, capsys):
    seeds = [write(tmp_path / f"s{seed}", metrics(2, seed)) for seed in (1, 2)]
    control = write(tmp_path / "c", metrics(2, 3, control=True))
    run_main(seeds[0])
    assert capsys.readouterr().out.split() == [
        str(seeds[0] / "plots" / name) for name in ("train_score.png", "eval_score.png", "overview.png")
    ]
    run_main(*seeds, "--control", control, "--output_dir", tmp_path / "plots")
    check_pictures(tmp_path / "plots", ["eval_score.png", "train_score.png"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "RUN_DIR"),
        (["nowhere"], "nowhere"),
        (["blank"], "no metrics.jsonl"),
        (["empty"], "nothing to draw"),
        (["torn"], "line 2"),
        (["good", "good"], "--output_dir"),
        (["good", "--control", "good"], "--output_dir"),
        (["good", "--control", "empty", "--output_dir", "plots"], "nothing to draw"),
        (["good", "--output_dir", "file"], "file"),
        (["good", "--colour", "red"], "--colour"),
    ],
)
def test_cli_bad_input_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good", metrics(0))
    write(tmp_path / "empty", [])
    (tmp_path / "blank").mkdir()
    (tmp_path / "file").touch()
    write(tmp_path / "torn", []).joinpath("metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(SystemExit) as stop:
        run_main(*arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
