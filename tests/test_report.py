"""report.py and its parts: every logged metric is explained, any run makes a page that works in a real browser, and
model text is shown as text."""

import json
import math
import re
import subprocess
import sys

import browser
import pytest
from random_models import ROOT
from run_folders import eval_row, evaluation, metric_rows, train_row, write_run
from selenium.webdriver import Keys
from small_runs import distill_config, self_play_config, tiny_config

import distill
import evaluator
import main
import rldatasets
import self_play
from distillation import config as config_of_distill
from tracking import pages, report, report_curves, report_samples, run_folder
from tracking.run_config import PRESETS, GRPOConfig

pytestmark = pytest.mark.pictures

# What a model may write: markup, the end of a script block, controls, other directions, half characters.
HOSTILE = [
    "</script><script>document.title = 'owned'</script>", "<img src=x onerror=\"document.title = 'owned'\">",
    "<!--<script>", "{{ css }} {% raw %}", "\x00\x07\x1b[31m", "\u202eright to left\u202c שלום", "\ud800 half",
    "\u2028line", "&lt;b&gt; ${1} `", "😀 中文", "",
]  # fmt: skip


def blocks_of(page):
    """{id: what the page's JSON blocks hold}."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="(.+?)">(.*?)</script>', text, re.DOTALL)
    return {name: json.loads(block) for name, block in found}


# ---------------------------------------------------------------- metrics.md


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """The folder of two real steps in which everything is on that logs a metric of its own."""
    weights = ",".join([*evaluator.REWARDS, evaluator.JUDGE])
    config = tiny_config(
        tmp_path_factory.mktemp("real") / "run", rewards=weights, beta=0.01, soft_thinking=True, judge_model="random",
        dynamic_sampling=1,
    )  # fmt: skip
    return main.train(config)


@pytest.fixture(scope="module")
def logged(real_run, tmp_path_factory):
    """Every key that a row of metrics.jsonl can have: those of real runs, and those that only some answers define."""
    keys = {key for row in run_folder.JsonLines(real_run / "metrics.jsonl").read() for key in row}
    texts = ["let me recheck this", "no no no no no"]
    keys |= {"judge/agreement"}  # a step without a pair of a right and a wrong answer has none
    behaviour = evaluator.behaviour_metrics(texts, [4, 5], ["stop", "length"], [True, False])
    keys |= {*report_curves.train_and_eval(*behaviour)}
    student = tmp_path_factory.mktemp("student")
    problems = rldatasets.load_problems("arithmetic", "train", 8)
    lessons = [{"question": problem.question, "completion": "<answer>1</answer>", "ids": None} for problem in problems]
    distill.train_student(distill_config(student, epochs=1.0), "tiny_student", lessons, student)
    keys |= {key for row in run_folder.JsonLines(student / "metrics.jsonl").read() for key in row}
    for game in ("nim", "debate"):
        played = self_play.train(self_play_config(tmp_path_factory.mktemp("played") / "run", game=game))
        keys |= {key for row in run_folder.JsonLines(played / "metrics.jsonl").read() for key in row}
    return keys


def test_every_logged_metric_is_documented_and_nothing_else_is(logged):
    documented = [key for section in report_curves.read_explanations().values() for key in section]
    assert len(documented) == len(set(documented))
    assert set(documented) == logged


def test_every_documented_metric_is_drawn_under_its_heading():
    explanations = report_curves.read_explanations()
    explanations.pop("Bookkeeping")
    sections = report_curves.SECTIONS.items()
    drawn = {heading: {key for panel in panels for key in panel.keys} for heading, panels in sections}
    assert drawn == {heading: set(section) for heading, section in explanations.items()}
    assert report_curves.RATES <= set().union(*drawn.values())


# ---------------------------------------------------------------- curves


def test_intervals_where_n_is_known():
    row, config = {"eval/n": 64}, {"problems_per_step": 16}
    of_training = report_curves.interval("accuracy", 0.5, row, config)
    assert of_training == evaluator.wilson_interval(8, 16), "n is the number of problems, not of answers"
    assert report_curves.interval("eval/accuracy_greedy", 0.25, row, config) == evaluator.wilson_interval(16, 64)
    assert report_curves.interval("reward", 0.5, row, config) is None
    assert report_curves.interval("accuracy", 0.5, row, {}) is None


def test_curves_skip_what_is_missing_and_stay_short():
    rows = [{"step": step, "kl": None if step % 2 else step / 4} for step in range(4000)]
    curve = report_curves.curve("kl", rows, {})
    assert len(curve["steps"]) == report_curves.MAX_POINTS and curve["steps"][0] == 0 and curve["steps"][-1] == 3998
    assert curve["values"] == [step / 4 for step in curve["steps"]] and len(curve["mean"]) == report_curves.MAX_POINTS
    assert report_curves.curve("lr", rows, {}) is None


def test_evenly_spaced():
    assert report_curves.evenly_spaced([3, 4], 5) == [3, 4]
    chosen = report_curves.evenly_spaced(list(range(101)), 5)
    assert chosen == [0, 25, 50, 75, 100]


# ---------------------------------------------------------------- samples


def test_groups_keep_their_answers_together(tmp_path):
    rows = [train_row(step, p, a) for step in (1, 2) for p in range(3) for a in range(2)]
    same = [train_row(3, 0, a) for a in range(4)]  # the same problem twice in a row
    blocks = blocks_of(report.make_report(write_run(tmp_path, samples=[*rows, *same])))
    assert blocks["data"]["sample_steps"] == [1, 2, 3]
    assert [group["prompt"] for group in blocks["step2"]] == [f"problem {p} of step 2?" for p in range(3)]
    assert [len(group["answers"]) for group in blocks["step3"]] == [2, 2]
    first = blocks["step1"][0]["answers"][1]
    assert first["parts"] == {"accuracy": 1.0, "format": 1.0} and (first["reward"], first["advantage"]) == (1.5, 0.5)
    assert "tokens" not in first


def test_token_detail_is_kept_and_bad_detail_is_not(tmp_path):
    good = train_row(1, tokens=["a", " b"])
    good["ratio"][1] = 1.23456789
    bad = [{**good, "ratio": [1.0]}, {**good, "tokens": "ab"}, {**good, "entropy": None}]
    long = train_row(1, tokens=["a"] * (report_samples.MAX_TOKENS + 1))
    folder = write_run(tmp_path, samples=[good, *bad, long], group_size=8)
    (group,) = blocks_of(report.make_report(folder))["step1"]
    assert group["answers"][0]["tokens"] == ["a", " b"] and group["answers"][0]["ratio"] == [1.25, 1.235]
    assert all("tokens" not in answer for answer in group["answers"][1:])


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    row = train_row(1, tokens=["a", "b"], advantage=math.nan)
    row["ratio"] = [math.inf, math.nan]
    folder = write_run(tmp_path)
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    answer = blocks_of(report.make_report(folder))["step1"][0]["answers"][0]
    assert answer["ratio"] == [None, None] and answer["advantage"] is None and answer["logprobs"] == [-0.5, -0.5]


def test_long_texts_lose_their_middle(tmp_path):
    text = "a" + "x" * 1_000_000 + "z"
    page = report.make_report(write_run(tmp_path, samples=[train_row(1, text=text), eval_row(0, text=text)]))
    shown = blocks_of(page)["step1"][0]["answers"][0]["text"]
    left_out = len(text) - report_samples.MAX_CHARS
    assert shown[0] == "a" and shown[-1] == "z" and f"{left_out:,} characters left out" in shown
    assert page.stat().st_size < 200_000


def test_a_big_run_is_thinned_evenly_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report_samples, "SAMPLE_BYTES", 300_000)
    monkeypatch.setattr(report_samples, "MAX_STEPS", 10)
    rows = [
        train_row(step, p, a, "x" * 1000, tokens=["t"] * 20 if step % 40 == 7 and p == 0 else None)
        for step in range(1, 201) for p in range(8) for a in range(2)
    ]  # fmt: skip
    page = report.make_report(write_run(tmp_path, samples=rows))
    blocks = blocks_of(page)
    steps = blocks["data"]["sample_steps"]
    assert steps[0] == 1 and steps[-1] == 200 and {7, 47, 87, 127, 167} <= set(steps) and len(steps) == 10
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) < 60
    shown = sum(len(blocks[f"step{step}"]) for step in steps)
    assert f"{shown:,} of 1,600 groups, from 10 of 200 steps" in blocks["data"]["samples_note"]
    assert 200_000 < page.stat().st_size < 400_000


def test_a_long_run_of_long_answers_stays_under_30_mb(tmp_path):
    """400 steps of answers of 800 tokens, with token detail in some: more than the page has room for."""
    text, tokens = "12 + 30 = 42, " * 230, [" token"] * 800
    folder = write_run(tmp_path, group_size=16, max_steps=400)
    log = run_folder.JsonLines(folder / "samples.jsonl")
    for step in range(1, 401):
        log.append(*(train_row(step, 0, a, text, tokens if step % 16 == 1 else None) for a in range(16)))
    page = report.make_report(folder)
    blocks = blocks_of(page)
    assert 5e6 < page.stat().st_size < 30e6
    assert 40 < len(blocks["data"]["sample_steps"]) <= report_samples.MAX_STEPS
    assert sum("tokens" in blocks[f"step{step}"][0]["answers"][0] for step in blocks["data"]["sample_steps"]) >= 25


def test_pairs_are_the_first_and_the_last_evaluation(tmp_path):
    rows = [eval_row(step, f"after {step}", question=f"{q}?") for step in (0, 4, 8) for q in range(2)]
    rows.append(eval_row(8, question="new?", correct=False))
    tests = blocks_of(report.make_report(write_run(tmp_path, samples=rows)))["data"]["evaluations"]
    assert tests["steps"] == [0, 8] and [pair["question"] for pair in tests["pairs"]] == ["0?", "1?"]
    assert [answer["text"] for answer in tests["pairs"][1]["answers"]] == ["after 0", "after 8"]


# ---------------------------------------------------------------- configuration and head


def test_settings_that_differ_come_first_with_their_origin():
    config = vars(GRPOConfig(**(PRESETS["tiny"] | {"seed": 7}))) | {"retired_setting": 1}
    rows = report.compare_config(config)
    origin = {row["name"]: row["origin"] for row in rows}
    assert origin["seed"] == "command line" and origin["loss_type"] == "preset tiny"
    assert origin["temperature"] == "default" and origin["retired_setting"].startswith("unknown")
    defaults = [row["origin"] == "default" for row in rows]
    assert defaults == sorted(defaults) and len(rows) == len(config)


def test_the_head_shows_before_and_after():
    rows = [evaluation(0, 0.2), *metric_rows()[:3], evaluation(4, 0.5), {"step": 5}]
    head = report.headline(rows, {"config": {"max_steps": 8, "control": "shuffled_advantages"}, "device": "cpu"})
    assert head["facts"]["steps"] == "5 of 8 (unfinished)" and head["facts"]["control"] == "shuffled_advantages"
    sampled = head["measures"][0]
    assert sampled["name"] == "sampled" and head["steps"] == [0, 4]
    assert head["note"].startswith("100 test problems, ")
    assert sampled["cells"][0] == [0.2, *evaluator.wilson_interval(20, 100)]


# ---------------------------------------------------------------- a student of distill.py


def test_a_student_gets_a_report_of_its_own_kind(tmp_path):
    """Settings of distill.py, and metrics without rewards and evaluations."""
    config = vars(
        config_of_distill.DistillConfig(
            **(config_of_distill.PRESETS["tiny"] | {"loss": "rkl", "on_policy_fraction": 0.5})
        )
    )
    (tmp_path / "args.json").write_text(json.dumps({"config": config | {"teacher_name": "runs/tiny"}, "device": "cpu"}))
    rows = [
        {"step": step, "loss": 2 / step, "lr": 1e-3, "grad_norm": 1.0, "on_policy": step % 2, "skipped_updates": 0}
        for step in range(1, 31)
    ]
    run_folder.JsonLines(tmp_path / "metrics.jsonl").append(*rows)
    data = blocks_of(report.make_report(tmp_path))["data"]
    drawn = {
        section["heading"]: [c["key"] for p in section["panels"] for c in p["curves"]] for section in data["sections"]
    }
    assert drawn == {"Optimization": ["grad_norm", "lr", "skipped_updates"], "Distillation": ["loss", "on_policy"]}
    facts = data["headline"]["facts"]
    assert (facts["steps"], facts["teacher"], facts["loss"]) == ("30", "runs/tiny", "rkl") and "control" not in facts
    assert [finding["name"] for finding in data["findings"]] == ["Gradient norm", "Skipped updates"]
    origin = {row["name"]: row["origin"] for row in data["config"]}
    assert origin["loss"] == origin["teacher_name"] == "command line" and origin["jsd_beta"] == "default"
    assert origin["epochs"] == "default" and origin["learning_rate"] == "preset tiny"


# ---------------------------------------------------------------- the page as a file


def test_the_page_asks_for_nothing_and_holds_its_data_safely(tmp_path):
    samples = [train_row(1, 0, a, text, tokens=[text, "b"]) for a, text in enumerate(HOSTILE)]
    page = report.make_report(write_run(tmp_path, metric_rows(), samples, group_size=len(HOSTILE)))
    text = page.read_text(encoding="utf-8")
    blocks = blocks_of(page)
    assert [answer["text"] for answer in blocks["step1"][0]["answers"]] == HOSTILE
    around = re.sub(r'(id="\w+">).*?(</script>)', r"\1\2", text, flags=re.DOTALL)
    around = around.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|fetch|XMLHttp|innerHTML|insertAdjacent|eval\(", around)
    assert not list(tmp_path.glob(".report*")), "nothing half-written is left"


def test_a_block_that_could_end_its_script_element_is_refused():
    with pytest.raises(ValueError, match="'report', block 'data'"):
        pages.render("report", {"data": '"</script>"'})
    assert json.loads(pages.to_json("<!--</script>")) == "<!--</script>"


@pytest.mark.parametrize("torn", ['{"step": 9, "rewa', '{"step": 9, "split": "train", "prompt": "\ud83d'])
def test_a_run_that_was_killed_or_has_just_begun(tmp_path, torn):
    folder = write_run(tmp_path)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).write_bytes(torn.encode(errors="surrogatepass"))
    assert blocks_of(report.make_report(folder))["data"]["sample_steps"] == []
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink()
    data = blocks_of(report.make_report(folder))["data"]
    assert data["findings"] == data["sections"] == [] and data["headline"]["measures"] == []
    run_folder.JsonLines(folder / "metrics.jsonl").append(*metric_rows(2))
    run_folder.JsonLines(folder / "samples.jsonl").append(train_row(1))
    with open(folder / "samples.jsonl", "ab") as log:
        log.write(torn.encode(errors="surrogatepass"))
    assert blocks_of(report.make_report(folder))["data"]["sample_steps"] == [1]


def test_the_command_line_prints_where_the_page_is(tmp_path):
    write_run(tmp_path, metric_rows(2))
    command = [sys.executable, "-m", "tracking.report", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"{tmp_path / 'report.html'}\n" and (tmp_path / "report.html").exists()


def test_bad_folders_get_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    measured = write_run(tmp_path / "measured", eval_only=True)
    for arguments, fragment in (
        ([tmp_path / "nowhere"], "nowhere"), ([tmp_path], "no training run"), ([measured], "eval_only"), ([], "give"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            report.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and fragment in error
    (tmp_path / "args.json").write_text("[1]")
    with pytest.raises(ValueError, match="no config"):
        report.make_report(tmp_path)
    broken = write_run(tmp_path / "broken", metric_rows(2))
    (broken / "metrics.jsonl").write_text('nonsense\n{"step": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        report.make_report(broken)


# ---------------------------------------------------------------- the page in a browser


@pytest.fixture
def show(window):
    """Opens the report of a folder; at the end, nothing else was asked for and nothing went wrong."""
    opened = []

    def open_report(folder):
        opened.append(report.make_report(folder).resolve().as_uri())
        window.requests(), window.console()
        window.open(folder / "report.html")
        return window

    yield open_report
    assert window.requests() == opened[-1:]
    assert window.console() == []


def texts(page, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return page.execute_script(script, selector)


def test_a_real_run_in_the_browser(show, real_run):
    page = show(real_run)
    assert page.text("#name") == "Run run" and "2 of 2" in page.text("#facts")
    rows = run_folder.JsonLines(real_run / "metrics.jsonl").read()
    drawn = texts(page, ".chart code")
    assert set(drawn) == {key for row in rows for key in row} - {*report_curves.read_explanations()["Bookkeeping"]}
    assert f"{100 * rows[0]['eval/accuracy']:.1f}%" in page.text("#measures")
    assert page.execute_script("return document.querySelectorAll('#tests .card').length") == 2 * 8
    assert len(texts(page, "#answers article")) == 4
    assert page.execute_script("return document.querySelectorAll('#changed tr').length") > 10


def test_hostile_answers_show_as_text(show, tmp_path):
    samples = [train_row(1, 0, a, text, prompt=HOSTILE[0]) for a, text in enumerate(HOSTILE)]
    samples += [train_row(2, 0, 0, "t", tokens=HOSTILE), *(eval_row(0, text, question=text) for text in HOSTILE[:2])]
    page = show(write_run(tmp_path, metric_rows(2), samples, group_size=len(HOSTILE), preset=HOSTILE[0]))
    assert page.execute_script("return document.title") == f"Run {tmp_path.name}"
    assert page.execute_script("return document.querySelectorAll('img, #viewer script, #tests script').length") == 0
    shown = texts(page, "#answers .text")
    assert shown[0] == HOSTILE[0] and shown[1] == HOSTILE[1] and shown[-1] == "(empty)"
    assert shown[4] == "\\u0000\\u0007\\u001b[31m" and shown[6] == "\\ud800 half"
    assert shown[5].startswith("\\u202eright") and shown[7] == "\\u2028line"
    assert page.text("#prompt") == HOSTILE[0] and HOSTILE[1] in page.text("#tests")
    page.execute_script("document.getElementById('step').focus()")
    page.press(Keys.ARROW_RIGHT)
    assert texts(page, ".token")[0] == HOSTILE[0] and len(texts(page, ".token")) == len(HOSTILE)


def test_the_slider_and_the_selectors(show, tmp_path):
    samples = [
        train_row(step, p, a, f"{step} {p} {a}", tokens=["x", "y"] if (step, p) == (9, 0) else None)
        for step in (2, 5, 9) for p in range(3) for a in range(2)
    ]  # fmt: skip
    page = show(write_run(tmp_path, metric_rows(), samples))
    assert texts(page, "#answers .text") == ["2 0 0", "2 0 1"]
    page.execute_script("document.getElementById('problem').focus()")
    page.press(Keys.ARROW_DOWN)
    assert texts(page, "#answers .text") == ["2 1 0", "2 1 1"] and page.text("#prompt") == "problem 1 of step 2?"
    page.execute_script("document.getElementById('step').focus()")
    page.press(Keys.ARROW_RIGHT)
    assert page.text("#step-name") == "5" and texts(page, "#answers .text") == ["5 1 0", "5 1 1"], "the problem stays"
    assert page.execute_script("return document.getElementById('step').getAttribute('aria-valuetext')") == "step 5"
    head = page.text("#answers article")
    assert "advantage -0.5" in head and "reward 0.5" in head and "accuracy 0" in head and "stopped after 5" in head
    assert page.execute_script("return getComputedStyle(document.getElementById('shade-label')).display") == "none"
    page.press(Keys.END)
    page.execute_script("document.getElementById('problem').focus()")
    page.press(Keys.HOME)
    assert texts(page, ".token") == ["x", "y"] * 2
    strengths = set()
    for shade in ("log-prob", "entropy", "ratio", "nothing"):
        page.execute_script(
            "const s = document.getElementById('shade'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
            shade,
        )
        strengths.add(page.execute_script("return getComputedStyle(document.querySelector('.token')).backgroundColor"))
    assert len(strengths) == 4
    page.hover(".token")
    assert f"p = {math.exp(-0.5):.4f}" in page.text("#token") and "ratio 1.25" in page.text("#token")
    page.execute_script("document.querySelector('.tokens').focus()")
    page.press(Keys.ARROW_RIGHT)
    assert page.text("#token").startswith('token 2 of 2, "y"')


def test_charts_read_out_step_and_value(show, tmp_path):
    rows = [evaluation(0, 0.25), *metric_rows(7), metric_rows()[-1] | evaluation(8, 0.75)]
    page = show(write_run(tmp_path, rows, problems_per_step=20))
    accuracy = [i for i, title in enumerate(texts(page, ".chart h4")) if title == "Accuracy"][0]
    page.hover(".chart svg")
    assert re.fullmatch(r"step [345]: reward 1", texts(page, ".chart .readout")[0])
    page.execute_script("document.querySelectorAll('.chart svg')[arguments[0]].focus()", accuracy)
    page.press(Keys.HOME)
    low, high = evaluator.wilson_interval(25, 100)
    assert texts(page, ".chart .readout")[accuracy] == f"step 0: eval/accuracy 25.0% [{low:.1%}, {high:.1%}]"
    page.press(Keys.ARROW_RIGHT)
    low, high = evaluator.wilson_interval(12, 20)
    assert texts(page, ".chart .readout")[accuracy] == f"step 1: accuracy 60.0% [{low:.1%}, {high:.1%}]"


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_layout_fits_and_text_is_readable(tmp_path, width, scheme):
    """No sideways scrolling, and WCAG's 4.5 to 1 for all text, also on shaded tokens."""
    if browser.MISSING:
        pytest.skip(browser.MISSING)
    samples = [train_row(1, 0, a, "w" * 300, tokens=["w" * 300, " x"]) for a in range(2)]
    samples += [eval_row(0, "v" * 300, question="q" * 300)]
    rows = [evaluation(0, 0.5), *metric_rows(kl=3.0, logprob_gap=1.0), evaluation(8, 0.4)]
    folder = write_run(tmp_path, rows, samples, model_name="m" * 200)
    contrast = """
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    function flatten(colors) {  // painted over each other: what is seen
      for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
      return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    }
    const linear = (c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const result = {};
    for (const element of document.querySelectorAll("body *:not(script, noscript, details table *)")) {
      const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
      if (!own || element.closest("svg") || !element.checkVisibility()) continue;
      const behind = [];
      for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
      const back = flatten(behind), front = flatten([...behind, getComputedStyle(element).color]);
      const l = [back, front].map(luminance);
      const ratio = (Math.max(...l) + 0.05) / (Math.min(...l) + 0.05);
      if (ratio < 4.5) result[element.tagName + "." + element.className] = ratio;
    }
    return result;"""
    with browser.Browser(width=width, scheme=scheme) as page:
        metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        page.open(report.make_report(folder))
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert page.execute_script(contrast) == {}
        columns = page.execute_script("return getComputedStyle(document.querySelector('#answers')).gridTemplateColumns")
        assert len(columns.split()) == (1 if width == 400 else 3)
        assert page.execute_script("return getComputedStyle(document.body).colorScheme") == "light dark"
