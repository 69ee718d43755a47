"""pictures.py: the pictures are whole and show hostile tokens as text; the page works in a real browser."""

import json
import math
import re
import types

import browser
import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from selenium.webdriver import Keys

import token_analysis as ta
from analysis import page as trace_page
from analysis import pictures
from tracking import pages

# What a model may write, as bytes: markup, quotes, formulas, half characters, other scripts, controls.
TOKENS = [
    b"<reasoning>", b"</script>", b"<img src=x onerror=alert(1)>", b" 'single' \"double\"", b"&lt;b&gt;", b"$x_{2$",
    b"\\n", b"\n", b"\t", b"\xf0\x9f", b"\x98\x80", "😀".encode(), "中文".encode(), "é".encode(), b"<!--",
    b"</reasoning>", b" egg", b"<answer>", b"24", b"</answer>", b"\xe2\x80\xa8", b"{{ css }}", b"\x00", b"<|im_end|>",
]  # fmt: skip
UNUSED = len(TOKENS)  # an id with no text


def make_trace(steps=60, seed=0, soft=False, sharp=4.0, resamples=3, **meta):
    """A trace of random logits over TOKENS and four unused ids; the text starts with every token once."""
    rng = np.random.default_rng(seed)
    V, K = UNUSED + 4, 3 if soft else 1
    logp = torch.log_softmax(torch.tensor(sharp * rng.standard_normal((steps, V)), dtype=torch.float32), dim=-1)
    tokens = torch.tensor([t if t <= UNUSED else int(rng.integers(UNUSED)) for t in range(steps)])
    arrays = {name: x.numpy() for name, x in ta._measure_chunk(logp, tokens, 0.7, 22, ta.rank_grid(V)).items()}
    arrays |= {"ranks": ta.rank_grid(V), "temperatures": np.array(ta.TEMPERATURES), "token_ids": tokens.int().numpy()}
    arrays |= {"forced": np.zeros(steps, bool), "is_soft": np.full(steps, soft)}
    arrays["draws"] = np.tile(arrays["token_ids"][:, None], (1, K))
    arrays["draws"][:, 1:] = rng.integers(0, V, (steps, K - 1))
    arrays["weights"] = np.full((steps, K), 1 / K, np.float32)
    arrays["top_weight"] = (arrays["weights"] * (arrays["draws"] == arrays["token_ids"][:, None])).sum(1)
    arrays["path_share"] = np.minimum.accumulate(rng.random(steps)).astype(np.float32)
    spelling = dict(enumerate(TOKENS)) | dict.fromkeys(range(UNUSED, V))
    fork = {"step": 3, "token": "'\"", "runner_up": "</script>", "answers_with_runner_up": ["1"]}
    values = {
        "model": "<b>model</b>", "prompt": "</script><script>alert(2)</script>", "question": "?", "gold": "24",
        "answer": "24", "tags": "reasoning", "temperature": 0.7, "seed": 0, "vocab_size": V, "tokenizer": "x",
        "finish": "stop", "text": "",
        "resamples": [{"answer": a, "length": 3, "text": ""} for a in ("24", "$x_{2$", None)[:resamples]],
        "forced_forks": [fork | {"changed_with_token": 0.25, "changed_with_runner_up": 0.75}],
    }  # fmt: skip
    return ta.Trace(values | meta, arrays, spelling)


# ---------------------------------------------------------------- pictures


def test_drawable_labels():
    assert pictures.drawable(" a\n\tb") == "␣a↵⇥b"
    assert pictures.drawable("中\x00\\") == "\\u4e2d\\x00\\", "no glyph: an escape"
    assert pictures.drawable("x" * 20, 5) == "xxxx…"


def test_rolling_mean_equals_slow_one():
    for length in (1, 2, 5, 8, 9, 30):
        values = np.random.default_rng(length).random(length)
        half = min(9, length - (length + 1) % 2) // 2
        slow = [values[max(0, t - half) : t + half + 1].mean() for t in range(length)]
        np.testing.assert_allclose(pictures.rolling_mean(values), slow)


def test_labels_are_apart():
    assert pictures.apart([0, 1, 5, 6, 9], [3, 0, 1, 2, 4], gap=2) == [3, 0, 4]


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
    with pictures.rc_context(pictures.STYLE):
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
    with pictures.rc_context(pictures.STYLE):
        (axes, _) = pictures.heatmap_figure(trace, 40).axes
    cells = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    outlined = {round(box.get_y() + 0.45): round(box.get_x() + 0.47) for box in axes.patches}
    for row, t in enumerate(range(40, 80)):
        rank = int(trace["rank"][t])
        assert cells[0, row].endswith(f"#{rank}") == (rank > 10)
        assert outlined.get(row) == (rank if rank <= 10 else None)
        for column in range(1, 11):
            assert cells[column, row] == pictures.drawable(trace.label(int(trace["topk_ids"][t, column - 1])), 12)


def test_pictures_are_files_with_a_page_for_every_40_steps(tmp_path):
    paths = pictures.draw_pictures(make_trace(steps=41), tmp_path)
    names = "entropy consistency landscape entropy_varentropy histograms topk_01 topk_02".split()
    assert sorted(paths) == sorted(tmp_path.iterdir()) == sorted(tmp_path / f"{name}.png" for name in names)
    assert all(matplotlib.image.imread(path).std() > 0.05 for path in paths)


def test_token_figure_shows_its_step():
    trace = make_trace()
    figure = pictures.TokenFigure(trace.arrays, {token: trace.label(token) for token in trace.spelling})
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
        assert labels[:20] == [pictures.drawable(trace.label(token), 16) for token in ids]


@pytest.mark.parametrize("workers", [1, 2])
def test_token_figures_are_files(tmp_path, workers):
    folder = tmp_path / "token_pdfs"
    pictures.draw_token_figures(make_trace(), folder, limit=20, workers=workers)
    assert sorted(file.name for file in folder.iterdir()) == [f"step_{t:04}.pdf" for t in range(20)]
    assert all(file.read_bytes().startswith(b"%PDF") for file in folder.iterdir())


def test_comparisons_are_drawn(tmp_path):
    a, b = make_trace(steps=30), make_trace(steps=25, seed=1, soft=True)
    for shared in (0, 7):
        pictures.draw_free_comparison(a, b, shared, tmp_path / "free.png")
    rng = np.random.default_rng(0)
    columns = {name: rng.random(30) for name in ("kl_ab", "kl_ba", "jsd", "change")}
    columns |= {"token": a.labels, "flips": rng.random(30) < 0.2}
    shifted = [{"id": i, "token": a.label(i), "shift": 0.5 - i / 20} for i in range(20)]
    pictures.draw_forced_comparison(columns, shifted, ["a", "$b"], "a", tmp_path / "forced.png")
    for name in ("free.png", "forced.png"):
        assert matplotlib.image.imread(tmp_path / name).std() > 0.05


# ---------------------------------------------------------------- the page as a file


@pytest.fixture(scope="module")
def traces():
    return types.SimpleNamespace(plain=make_trace(), soft=make_trace(soft=True, seed=2))


def test_page_holds_the_data_and_no_address(traces, tmp_path):
    trace_page.write_page(traces.plain, tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(block) == trace_page.page_data(traces.plain) and "<" not in block
    around = page.replace(block, "").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|fetch|XMLHttp|innerHTML|insertAdjacent|eval\(", around)


def test_page_data(traces):
    data, trace = trace_page.page_data(traces.soft), traces.soft
    columns = data["columns"]
    assert {len(column) for column in columns.values()} == {len(trace)}
    assert columns["text"] == trace.labels and columns["fork"] == trace.forks.tolist()
    for t, mixture in enumerate(columns["mixture"]):
        weights = dict(mixture)
        draws = [trace.label(draw) for draw in trace["draws"][t].tolist()]
        assert sum(weights.values()) == pytest.approx(1, abs=1e-3) and set(weights) == set(draws)
        assert all(weights[draw] == pytest.approx(draws.count(draw) / 3, abs=1e-3) for draw in draws)
    assert pages.to_number(-np.inf) == -9999 and pages.to_number(0.123456789) == 0.123457


# ---------------------------------------------------------------- the page in a browser

STATE = """
const spans = [...document.querySelectorAll(".token")];
return {
  current: spans.findIndex((span) => span.classList.contains("current")),
  pinned: spans.some((span) => span.classList.contains("pinned")),
  name: document.getElementById("name").textContent,
  numbers: document.getElementById("numbers").textContent,
  rows: [...document.querySelectorAll("#top tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent)),
  colors: spans.map((span) => span.style.backgroundColor),
};"""


@pytest.fixture
def page(window, traces, tmp_path):
    """The page of the plain trace, opened; at the end, nothing was asked for and nothing went wrong."""
    yield from opened(window, traces.plain, tmp_path)


@pytest.fixture
def soft_page(window, traces, tmp_path):
    yield from opened(window, traces.soft, tmp_path)


def opened(window, trace, folder):
    file = folder / "trace.html"
    trace_page.write_page(trace, file)
    window.requests(), window.console()
    window.open(file)
    window.state = lambda: window.execute_script(STATE)
    yield window
    assert window.requests() == [file.resolve().as_uri()]
    assert window.console() == []


def printed(label):
    """With the control characters of TOKENS written out."""
    return label.replace("\0", "\\u0000").replace("\u2028", "\\u2028")


def focus_text(page):
    page.execute_script("document.getElementById('text').focus()")


def test_tokens_show_as_text(page, traces):
    shown = page.execute_script("return [...document.querySelectorAll('.token')].map((span) => span.textContent)")
    assert shown == [printed(label) for label in traces.plain.labels]
    assert "</script>" in shown and "\\xf0\\x9f" in shown and "😀" in shown and f"<unused {UNUSED}>" in shown
    elements = page.execute_script("return document.querySelectorAll('#text *').length")
    assert elements == len(shown), "no token made an element"
    assert page.execute_script("return document.images.length + document.querySelectorAll('b, script').length") == 2
    assert page.text("#prompt") == traces.plain.meta["prompt"] and "<b>model</b>" in page.text("#facts")
    assert page.execute_script("return document.getElementById('text').getBoundingClientRect().height") > 100


def test_hovering_shows_the_ten_likeliest(page, traces):
    trace = traces.plain
    for t in (5, UNUSED):
        page.hover(f"#token{t}")
        state = page.state()
        assert state["current"] == t and not state["pinned"]
        rows = state["rows"]
        assert len(rows) == 10 + (trace["rank"][t] > 10)
        for rank in range(10):
            place, name, _, p, logp, total = rows[rank]
            token = int(trace["topk_ids"][t, rank])
            expected = printed(trace.label(token)).replace(" ", "·").replace("\t", "⇥").replace("\n", "↵")
            assert (place, name) == (str(rank + 1), expected + (" ✓" if token == trace["token_ids"][t] else ""))
            assert float(p) == pytest.approx(math.exp(trace["topk_logp"][t, rank]), rel=0.06, abs=6e-4)
            assert float(logp) == pytest.approx(trace["topk_logp"][t, rank], abs=6e-3)
            assert float(total) == pytest.approx(np.exp(trace["topk_logp"][t, : rank + 1]).sum(), abs=2e-3)
        assert f"rank{trace['rank'][t]}" in state["numbers"] and f"{trace['entropy'][t]:.3f}" in state["numbers"]


def test_keys_move_and_pin(page, traces):
    focus_text(page)
    for keys, expected in (
        ([Keys.ARROW_RIGHT, Keys.ARROW_RIGHT], 2), ([Keys.ARROW_LEFT], 1), ([Keys.END], 59),
        ([Keys.ARROW_RIGHT], 59), ([Keys.HOME], 0), ([Keys.ARROW_LEFT], 0),
    ):  # fmt: skip
        page.press(*keys)
        assert page.state()["current"] == expected
    tops = page.execute_script("return [...document.querySelectorAll('.token')].map((s) => s.getClientRects()[0].top)")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    below = page.state()["current"]
    assert tops[below] == min(top for top in tops if top > tops[1] + 3)
    page.press(Keys.ARROW_UP)
    assert tops[page.state()["current"]] == tops[1]
    page.press(Keys.ENTER)
    assert page.state()["pinned"]
    page.press(Keys.ARROW_RIGHT)
    assert page.state()["pinned"], "keys move the pin"
    page.press(Keys.ESCAPE)
    assert not page.state()["pinned"]
    chosen = page.execute_script("return document.activeElement.getAttribute('aria-activedescendant')")
    assert chosen == f"token{page.state()['current']}"


def test_a_click_pins_against_hovering(page):
    page.click("#token4")
    page.hover("#token9")
    assert page.state()["current"] == 4 and page.state()["pinned"]
    page.click("#token4")
    page.hover("#token9")
    assert page.state()["current"] == 9 and not page.state()["pinned"]


def test_colour_modes(page, traces):
    trace, seen = traces.plain, {}
    for mode, value in (
        ("probability", -trace["logp"]), ("entropy", trace["entropy"]), ("rank", np.log(trace["rank"])),
    ):  # fmt: skip
        page.click(f"input[value='{mode}']")
        seen[mode] = page.state()["colors"]
        brightness = [sum(map(int, re.findall(r"\d+", color))) for color in seen[mode]]
        order = np.argsort(value, kind="stable")
        assert np.corrcoef(value[order], np.array(brightness)[order])[0, 1] < -0.6, "farther from the page's white"
        assert brightness[order[0]] > brightness[order[-1]]
        assert page.text("#low") and page.text("#high")
    assert len({str(colors) for colors in seen.values()}) == 3
    assert page.execute_script("return document.querySelector(\"input[value='soft weight']\").disabled")


def test_soft_weights_and_mixtures(soft_page, traces):
    soft_page.click("input[value='soft weight']")
    weights, colors = traces.soft["top_weight"].tolist(), soft_page.state()["colors"]
    assert len(set(colors)) == len({round(w, 3) for w in weights}) > 1
    soft_page.hover("#token16")
    mixture = trace_page.page_data(traces.soft)["columns"]["mixture"][16]
    assert soft_page.text("#mixture").startswith(f"Fed as a mixture: {mixture[0][1]:.2f} ")


def test_search_finds_text_across_tokens(page, traces):
    page.execute_script("document.getElementById('search').focus()")
    page.press("</script><IMG", Keys.ENTER)
    found = page.execute_script(
        "return [...document.querySelectorAll('.found')].map((span) => Number(span.dataset.step))"
    )
    assert page.text("#found") == "1 found" and found == [1, 2] and page.state()["current"] == 1
    page.execute_script("document.getElementById('search').value = ''")
    page.press("24", Keys.ENTER)
    matches = [t for t, label in enumerate(traces.plain.labels) if "24" in label]
    assert page.text("#found") == f"{len(matches)} found" and page.state()["current"] == matches[0]
    page.press(Keys.ENTER)
    assert page.state()["current"] == (matches + matches)[1]


def test_visible_white_space(page):
    page.click("#spaces")
    assert page.text("#token7") == "↵\n" and page.text("#token8") == "⇥" and page.text("#token16") == "·egg"
    page.click("#spaces")
    assert page.text("#token7") == "\n"


def test_the_strip_and_the_forks_are_linked(page, traces):
    page.click("#strip")  # in its middle
    assert page.state()["current"] in (29, 30) and page.state()["pinned"]
    steps = page.execute_script(
        "return [...document.querySelectorAll('#forks button')].map((button) => Number(button.textContent))"
    )
    entropy = traces.plain["entropy"]
    assert steps == sorted(np.flatnonzero(traces.plain.forks).tolist(), key=lambda t: -entropy[t])
    page.click("#forks tbody tr:nth-child(2) button")
    assert page.state()["current"] == steps[1]
    if 3 in steps:
        row = page.execute_script(
            "return document.querySelectorAll('#forks tbody tr')[arguments[0]].textContent", steps.index(3)
        )
        assert row.endswith("75 % (25 %)")


def test_both_themes_are_readable(page):
    """Every token's text stands out from its background by WCAG's 4.5 to 1, in both themes."""
    contrast = """
    const rgb = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    return [...document.querySelectorAll(".token")].map((span) => {
      const style = getComputedStyle(span), l = [style.color, style.backgroundColor].map((c) => luminance(rgb(c)));
      return (Math.max(...l) + 0.05) / (Math.min(...l) + 0.05);
    });"""
    backgrounds = []
    for _ in range(2):
        assert min(page.execute_script(contrast)) >= 4.5
        backgrounds.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
        page.click("#theme")
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(21, 23, 28)"]


def test_the_page_starts_in_the_theme_that_is_preferred(traces, tmp_path, window):
    trace_page.write_page(traces.plain, tmp_path / "trace.html")
    with browser.Browser(scheme="dark") as dark:
        dark.open(tmp_path / "trace.html")
        assert dark.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 28)"
