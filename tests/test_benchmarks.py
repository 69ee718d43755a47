"""The benchmarks run, at their smallest, and what they count is right. No test looks at how fast anything is."""

import json
import math
import random
import sys

import pytest
import torch
from random_models import ROOT
from torch.utils.flop_counter import FlopCounterMode

import rollout

sys.path.insert(0, str(ROOT / "benchmarks"))
import common
import decode
import soft_inference
import soft_step
import step
import training
import vs_trl

CPU = torch.device("cpu")
ONCE = ["--model_name", "1m", "--rounds", "1", "--warmup", "0"]


def figures(tmp_path, script, *flags):
    """What the script writes with --json, after a run with these flags."""
    script.main([*ONCE, *flags, "--json", str(tmp_path / "figures.json")])
    return json.loads((tmp_path / "figures.json").read_text())


def positive(*numbers):
    return all(number > 0 and math.isfinite(number) for number in numbers)


# ---------------------------------------------------------------- the scripts


def test_decode(tmp_path):
    sizes = "--rows 2 5 --context 10 20 --steps 3 --rollout_rows 4 --group_size 2 --max_new_tokens 6 --mean_length 3"
    result = figures(tmp_path, decode, *sizes.split())
    assert [(p["rows"], p["context"]) for p in result["sweep"]] == [(2, 10), (5, 10), (2, 20), (5, 20)]
    names = {"rows", "context", "seconds", "tokens_per_second", "roofline", "memory_increase"}
    assert all(len(p["seconds"]) == 1 and p.keys() == names for p in result["sweep"])
    assert result["fit"]["seconds"].keys() == result["fit"]["memory"].keys() == {"constant", "rows", "row_tokens", "r2"}
    for side in ("ours", "generate"):
        assert positive(result["rollout"][side]["tokens_per_second"], *result["rollout"][side]["seconds"])
        assert 1 <= result["rollout"][side]["mean_length"] <= 6
    assert positive(result["rollout"]["ratio"], result["machine"]["bandwidth"], result["machine"]["flops"])


def test_training(tmp_path):
    result = figures(tmp_path, training, *"--rows 4 8 --lengths 3 6 --group_size 2".split())
    assert [(p["rows"], p["limit"], p["mean_length"]) for p in result["points"]] == [
        (4, 3, 3), (8, 3, 3), (4, 6, 6), (8, 6, 6)
    ]  # fmt: skip
    for point in result["points"]:
        assert positive(point["tokens_per_second"], point["useful_flops"], point["mfu"], point["work_factor"])
        assert point["memory_of_all_logits"] == 4 * 512 * point["rows"] * point["limit"]
    assert result["fit"].keys() == {"constant", "tokens", "r2"}


def test_step(tmp_path):
    backward = torch.Tensor.backward
    flags = "--problems_per_step 2 --group_size 2 --max_completion_length 4 --vocab_size 600".split()
    result = figures(tmp_path, step, *flags)
    assert torch.Tensor.backward is backward
    assert sum(result["phases"][phase][0] for phase in step.PHASES) == pytest.approx(result["seconds"][0])
    assert positive(*(result["phases"][phase][0] for phase in ("rollout", "forward", "backward", "optimizer")))
    assert (result["mean_length"], result["learning_rows"], result["config"]["group_size"]) == (4, 1, 2)


def test_vs_trl(tmp_path):
    pytest.importorskip("trl")
    flags = "--problems_per_step 2 --group_size 4 --max_completion_length 4 --mean_length 3 --small_batch 4 --no_memory"
    result = figures(tmp_path, vs_trl, *flags.split())
    assert result["variants"].keys() == set(vs_trl.VARIANTS)
    for variant in result["variants"].values():
        assert positive(*variant["ours"], *variant["trl"], *variant["trl_rollout"], variant["ratio"])
        assert variant["trl_rollout"][0] < variant["trl"][0]
        assert all(1 <= mean <= 4 for mean in variant["mean_length"].values())


def test_vs_trl_measures_memory_of_both_sides(tmp_path):
    pytest.importorskip("trl")
    flags = "--problems_per_step 2 --group_size 4 --max_completion_length 4 --variants no_checkpointing --small_batch 4"
    result = figures(tmp_path, vs_trl, *flags.split())
    assert positive(result["memory"]["ours"], result["memory"]["no_checkpointing"])


def test_vs_trl_says_what_is_missing_or_not_comparable(monkeypatch):
    monkeypatch.setattr(vs_trl, "trl", None)
    with pytest.raises(ValueError, match="TRL is not installed"):
        vs_trl.main(ONCE)
    monkeypatch.setattr(vs_trl, "trl", object())
    with pytest.raises(ValueError, match="--minibatches 2"):
        vs_trl.main([*ONCE, "--minibatches", "2"])


def test_soft_step(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soft_step.py", "--rows", "2", "--tokens", "3", "--rounds", "1"])
    soft_step.main()
    assert "soft, K = 5" in capsys.readouterr().out


def test_soft_inference_measures_every_mode_and_goes_on_after_a_stop(tmp_path, monkeypatch, capsys):
    flags = "--preset tiny --eval_problems 3 --eval_samples 4 --max_completion_length 24".split()
    config = soft_inference.parse_config([*flags, "--output_dir", str(tmp_path / "run")])
    soft_inference.main(config)
    shown = (tmp_path / "run/soft_inference.txt").read_text()
    assert shown in capsys.readouterr().out
    rows = json.loads((tmp_path / "run/soft_inference.json").read_text())
    assert list(rows) == list(soft_inference.modes(config)) and len(rows) == 7
    for name, row in rows.items():
        [line] = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
        assert f"{row['accuracy']:.1%}" in line and row["n"] == 3
        assert ("pass@2" in row and "pass@4" in row) == (name != "hard, greedy")
        assert ("top_weight_soft" in row) == ("soft" in name and row["soft_share"] > 0)
    monkeypatch.setattr(rollout, "generate", lambda *a, **k: pytest.fail("sampled again"))
    soft_inference.main(config)
    assert json.loads((tmp_path / "run/soft_inference.json").read_text()) == rows


def test_soft_inference_averages_over_soft_positions_and_pairs_problems():
    """Two problems, two answers each: 3 of 10 and 1 of 4 steps soft, at weights .6 and .5; the rest at 1."""

    def record(length, soft, weight, correct):
        top = (length - soft + soft * weight) / length
        return dict(length=length, soft_steps=soft, top_weight=top, correct=correct)

    records = [record(10, 3, 0.6, True), record(4, 1, 0.5, False), record(5, 0, 1, True), record(5, 0, 1, True)]
    hard = [dict(row, correct=False, soft_steps=0, top_weight=1.0) for row in records]
    row = soft_inference.describe(dict(records=records, samples=2), dict(records=hard, samples=2))
    assert row["top_weight_soft"] == pytest.approx((3 * 0.6 + 0.5) / 4)
    assert row["difference"] == pytest.approx((0.5 + 1) / 2)
    assert "top_weight_soft" not in soft_inference.describe(
        dict(records=hard, samples=2), dict(records=hard, samples=2)
    )


@pytest.mark.parametrize(
    "flags",
    ["--rounds 0", "--threads 0", "--rows 4 0", "--steps 0", "--rollout_rows 3", "--context 16",
     "--model_name tiny --vocab_size 9", "--model_name 1m --vocab_size 9"],
)  # fmt: skip
def test_a_bad_flag_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run("decode.py", decode.main, flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("decode.py: --") and error.count("\n") == 1


# ---------------------------------------------------------------- what they share


def test_linear_fit_finds_the_line():
    rng = random.Random(0)
    rows = [rng.uniform(1, 256) for _ in range(30)]
    tokens = [rng.uniform(64, 1e6) for _ in range(30)]
    exact = [0.5 + 2 * r + 3e-6 * t for r, t in zip(rows, tokens, strict=True)]
    line = common.linear_fit({"rows": rows, "tokens": tokens}, exact)
    assert line == {k: pytest.approx(v) for k, v in dict(constant=0.5, rows=2, tokens=3e-6, r2=1).items()}

    noisy = [y + rng.gauss(0, 100) for y in exact]
    line = common.linear_fit({"rows": rows, "tokens": tokens}, noisy)
    residual = [y - line["constant"] - line["rows"] * r - line["tokens"] * t
                for r, t, y in zip(rows, tokens, noisy, strict=True)]  # fmt: skip
    for column in ([1.0] * 30, rows, tokens):  # least squares: what is left has nothing to do with any column
        size = math.hypot(*column) * math.hypot(*residual)
        assert abs(sum(a * b for a, b in zip(column, residual, strict=True))) < 1e-9 * size
    mean = sum(noisy) / 30
    assert line["r2"] == pytest.approx(1 - sum(r * r for r in residual) / sum((y - mean) ** 2 for y in noisy))
    assert 0 < line["r2"] < 1


@pytest.mark.parametrize("rows", [[1, 2], [3, 3, 3, 3]])
def test_linear_fit_refuses_what_it_cannot_know(rows):
    with pytest.raises(ValueError, match="do not determine"):
        common.linear_fit({"rows": rows}, [float(n) for n in range(len(rows))])


def test_turns_alternate_and_warmup_is_not_timed():
    calls = []
    candidates = {name: lambda number, name=name: calls.append(f"{name}{number}") for name in "ab"}
    times = common.take_turns(candidates, rounds=2, warmup=1, device=CPU)
    assert calls == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2}


def test_peak_memory_sees_what_was_freed_again():
    memory = common.PeakMemory(CPU)
    size = 64 * 2**20
    held = []
    assert memory.of(lambda: None) < size / 8
    assert 0.95 * size < memory.of(lambda: torch.ones(size // 4).sum()) < 1.5 * size
    assert 0.95 * size < memory.of(lambda: held.append(torch.ones(size // 4))) < 1.5 * size
    assert memory.of(lambda: held[0].add_(1)) < size / 8  # it was in use before


@pytest.mark.parametrize("name, published", [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304)])
def test_the_large_shapes_are_qwens(name, published):
    model, _ = common.load_model(name, None, torch.device("meta"))
    assert model.num_parameters() == published


def test_random_models_are_the_same_every_time_and_hardly_prefer_a_token():
    (first, _), (second, _) = (common.load_model("1m", None, CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    probs = first(torch.arange(100)[None]).logits.softmax(dim=-1)
    assert probs.max() < 3 / 512


def test_random_rows_end_at_the_asked_mean_length():
    stops = common.stop_ids_for(8, 512)
    model, tokenizer = common.load_model("1m", None, CPU)
    lengths = decode.generate(
        model, tokenizer, ["a"], group_size=256, max_new_tokens=64, stop_ids=stops, seed=0
    ).lengths
    assert len(stops) == 64
    assert lengths.float().mean() == pytest.approx(8, abs=1.5)  # three standard errors of a geometric mean


def test_lengths_of_generate_count_to_the_stop_token(monkeypatch):
    model, tokenizer = common.load_model("1m", None, CPU)
    stops, prompts = list(range(64)), ["Tom", "Mia has 12 eggs."]
    seen = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: seen.append(generate(**options)) or seen[0])
    torch.manual_seed(0)
    lengths = decode.transformers_generate(model, tokenizer, prompts, 8, 12, stops)
    width = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    expected = [next((n for n, i in enumerate(row, 1) if i in stops), 12) for row in seen[0][:, width:].tolist()]
    assert lengths.tolist() == expected and min(expected) < max(expected)


def matrix_flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return training.matrix_flops(counter)


def test_work_counts_what_a_plain_pass_multiplies():
    model, _ = common.load_model("1m", None, CPU)
    work = common.Work(model)
    prompts, lengths = [5, 3], [4, 7]

    def plain_pass():
        for prompt, length in zip(prompts, lengths, strict=True):
            hidden = model.base_model(torch.arange(prompt + length)[None]).last_hidden_state
            model.lm_head(hidden[0, prompt:]).sum().backward()

    assert work.update(prompts, lengths, group_size=1, attention=False) == matrix_flops(plain_pass)
    shared = work.update([5, 5], lengths, group_size=1) - work.update([5, 5], lengths, group_size=2)
    attention = 4 * 2 * 2 * 4 * 32  # flops of a query and a key: 4 layers of 4 heads of 32 numbers, scores and average
    assert shared == 3 * (5 * work.layers + attention * 5 * 5 / 2)
    with torch.no_grad():
        one_token = matrix_flops(lambda: model(torch.zeros(6, 1, dtype=torch.long)))
    num_bytes, flops = work.decode_step(rows=6, live=0, element_size=4)
    assert (num_bytes, flops) == (4 * model.num_parameters(), one_token)
    more_bytes, more_flops = work.decode_step(rows=6, live=10, element_size=4)
    assert more_bytes - num_bytes == 6 * 10 * 4 * (4 * 2 * 2 * 32)  # keys and values of 4 layers, 2 heads, fp32
    assert more_flops - flops == 6 * 10 * attention
