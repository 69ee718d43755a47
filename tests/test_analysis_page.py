"""The page of a trace works in a real browser, and shows hostile tokens as text."""

import json
import math
import re
import types

import browser
import numpy as np
import pytest
from random_traces import UNUSED, make_trace
from selenium.webdriver import Keys

from analysis import page as trace_page
from tracking import pages

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
