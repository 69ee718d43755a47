"""token_analysis.py: the measures against hand-computed values and slow loops, a trace against fresh forward passes,
files against each other, forks and comparisons against what transformers says, bad input against one clear line."""

import csv
import json
import math
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import ROOT, random_model
from transformers import AutoTokenizer

import llms
import rldatasets
import token_analysis as ta
from analysis import pictures
from rollout import generate
from soft_thinking import SoftThinking

QUESTION = "Mia has 12 eggs. Mia doubles them. How many eggs does Mia have?"
FAST = ["--num_resamples", "3", "--forks", "1", "--skip_individual_pdfs"]


# ---------------------------------------------------------------- measures


def test_uniform():
    logp = torch.full((1000,), 1 / 1000).log()
    assert ta.entropy(logp).item() == pytest.approx(math.log(1000), rel=1e-5)
    assert ta.varentropy(logp).item() == pytest.approx(0, abs=1e-6)
    assert ta.collision(logp).item() == pytest.approx(1 / 1000, rel=1e-5)
    assert ta.nucleus_size(logp).item() in (950, 951)  # rounding of the sum decides
    assert ta.margin(logp).item() == 0
    assert ta.rank(logp, torch.tensor(7)).item() == 1, "equals share a rank"


def test_one_hot():
    logp = torch.full((1000,), -torch.inf)
    logp[0] = 0.0
    measures = (ta.entropy, ta.varentropy, ta.collision, ta.nucleus_size, ta.margin)
    assert [measure(logp).item() for measure in measures] == [0, 0, 1, 1, 1]
    assert ta.rank(logp, torch.tensor(0)).item() == 1 and ta.rank(logp, torch.tensor(5)).item() == 2
    assert ta.top_mass(logp, 1).item() == 1
    assert ta.argmax_probs(logp).tolist() == [1.0] * len(ta.TEMPERATURES)


def test_by_hand():
    """p = 1/2, 1/4, 1/8, 1/8 has surprisals of 1, 2, 3, 3 bits, mean 1.75, variance 0.6875."""
    logp = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert ta.entropy(logp).item() == pytest.approx(1.75 * math.log(2), rel=1e-6)
    assert ta.varentropy(logp).item() == pytest.approx(0.6875 * math.log(2) ** 2, rel=1e-5)
    assert ta.collision(logp).item() == pytest.approx(0.34375)
    assert ta.margin(logp).item() == pytest.approx(0.25)
    assert ta.top_mass(logp, 2).item() == pytest.approx(0.75)
    assert [ta.nucleus_size(logp, mass).item() for mass in (0.4, 0.7, 0.8, 0.95)] == [1, 2, 3, 4]
    assert ta.rank(logp.expand(4, 4), torch.arange(4)).tolist() == [1, 2, 3, 3]
    uniform = torch.full((4,), 0.25).log()
    assert ta.kl(logp, uniform).item() == pytest.approx(0.25 * math.log(2), rel=1e-5)  # 2 bits - 1.75 bits
    assert ta.kl(uniform, logp).item() == pytest.approx(0.25 * math.log(2), rel=1e-5)  # (-1 + 0 + 1 + 1) / 4 bits
    # At T = 1/2 probabilities are squared: 1/4 of 1/4 + 1/16 + 1/64 + 1/64 = 22/64.
    assert ta.argmax_probs(logp, [0.5]).item() == pytest.approx(16 / 22, rel=1e-5)


def test_divergences_of_disjoint_and_equal_distributions():
    left, right = torch.tensor([0.5, 0.5, 0, 0]).log(), torch.tensor([0, 0, 0.5, 0.5]).log()
    assert ta.jsd(left, right).item() == pytest.approx(math.log(2)) and ta.kl(left, right).item() == math.inf
    assert ta.jsd(left, left).item() == pytest.approx(0, abs=1e-7) and ta.kl(left, left).item() == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=40), st.integers(0, 39), st.integers(1, 50))
def test_measures_equal_slow_loops(logits, token, k):
    token %= len(logits)
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    p = sorted((w / sum(weights) for w in weights), reverse=True)
    H = -sum(x * math.log(x) for x in p)
    logp = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=-1)
    ordered = logp.sort(descending=True).values
    assert ta.entropy(logp).item() == pytest.approx(H, abs=1e-9)
    assert ta.varentropy(logp).item() == pytest.approx(sum(x * (math.log(x) + H) ** 2 for x in p), abs=1e-9)
    assert ta.collision(logp).item() == pytest.approx(sum(x * x for x in p))
    assert ta.top_mass(ordered, k).item() == pytest.approx(sum(p[:k]))
    assert ta.margin(ordered).item() == pytest.approx(p[0] - p[1], abs=1e-12)
    assert ta.rank(logp, torch.tensor(token)).item() == 1 + sum(x > logp[token] for x in logp)
    n = ta.nucleus_size(ordered).item()
    assert sum(p[:n]) >= 0.95 - 1e-9 and sum(p[: n - 1]) < 0.95 + 1e-9
    other = logp.flip(0)
    kl = sum(a.exp().item() * (a - b).item() for a, b in zip(logp, other, strict=True))
    assert ta.kl(logp, other).item() == pytest.approx(kl, abs=1e-9)
    assert ta.jsd(logp, other).item() == pytest.approx(ta.jsd(other, logp).item(), abs=1e-12)
    assert -1e-12 <= ta.jsd(logp, other).item() <= math.log(2) + 1e-12


def test_forks_are_the_highest_fifth():
    values = np.random.default_rng(0).random(50)
    assert np.flatnonzero(ta.forks(values)).tolist() == sorted(np.argsort(values)[-10:].tolist())


def test_path_share_equals_counting():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2, (9, 6), generator=generator)
    length = torch.tensor([5, 6, 2, 3, 6, 4, 5, 1, 6])
    mask = torch.arange(6) < length[:, None]
    paths = [row[:n].tolist() for row, n in zip(ids, length.tolist(), strict=True)]
    expected = [sum(path[: t + 1] == paths[0][: t + 1] for path in paths[1:]) / 8 for t in range(5)]
    assert ta.path_share(ids, mask).tolist() == pytest.approx(expected) and expected[0] > expected[3]
    assert ta.path_share(ids[:1], mask[:1]).isnan().all(), "nothing is known without resamples"


def test_majority_share_counts_rows_without_an_answer():
    assert ta.majority_share(["4", None, "4", "5", None, None]) == pytest.approx(2 / 6)
    assert ta.majority_share([None, None]) == 0 and ta.majority_share([]) is None


def test_effective_draws():
    draws = np.array([[3, 4, 5], [3, 3, 5], [3, 3, 3], [3, 0, 0]])
    weights = np.array([[1 / 3] * 3, [1 / 3] * 3, [1 / 3] * 3, [1, 0, 0]])
    two_thirds = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert ta.effective_draws(draws, weights).tolist() == pytest.approx([3, two_thirds, 1, 1])


def test_answers_are_numbers_where_they_can_be():
    form = "<reasoning>x</reasoning><answer>{}</answer>"
    texts = (form.format("12.0"), form.format("a cat"), "So 1,200.", "No")
    assert [ta.AnalysisConfig().answer_of(text) for text in texts] == ["12", "a cat", "1200", None]
    begun = ta.AnalysisConfig(prefill=True)  # the prompt wrote the opening tag
    assert begun.answer_of("7</reasoning><answer>a dog</answer>") == "a dog"


# ---------------------------------------------------------------- tokens as bytes


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30))
def test_bytes_of_tokens_join_to_the_text(text):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
    text = unicodedata.normalize("NFC", text)  # as the tokenizer does
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelled = ta.token_bytes(tokenizer, ids)
    assert b"".join(spelled[token] for token in ids) == text.encode()


def test_labels_of_unused_special_and_partial_tokens(tokenizer):
    partial = tokenizer("😀", add_special_tokens=False)["input_ids"][0]
    stop = tokenizer.eos_token_id
    spelled = ta.token_bytes(tokenizer, [partial, stop, 512, 100_000])
    labels = [ta.label(token, piece) for token, piece in spelled.items()]
    assert labels == ["\\xf0", tokenizer.eos_token, "<unused 512>", "<unused 100000>"]


def test_sentencepiece_tokens():
    class Pieces:
        added_tokens_decoder = {0: "<s>"}

        def convert_ids_to_tokens(self, token):
            return ["<s>", "<0x0A>", "\u2581egg"][token]

    assert ta.token_bytes(Pieces(), [0, 1, 2]) == {0: b"<s>", 1: b"\n", 2: b" egg"}


# ---------------------------------------------------------------- a trace against the model


def fresh_logits(model, rollout, row):
    """(T, V) float64 from one plain forward pass over prompt and completion, mixtures summed by hand."""
    E = model.get_input_embeddings().weight
    inputs = [E[token] for token in rollout.prompt_ids[row].tolist()]
    length = int(rollout.lengths[row])
    for draws, weights in zip(rollout.draws[row, :length], rollout.weights[row, :length], strict=True):
        inputs.append(sum(w * E[d] for d, w in zip(draws.tolist(), weights.tolist(), strict=True)))
    with torch.no_grad():
        logits = model(inputs_embeds=torch.stack(inputs)[None]).logits[0]
    return logits[len(rollout.prompt_ids[row]) - 1 : -1].double()


@pytest.mark.parametrize("soft", [None, SoftThinking(k=3, start="immediately", weighting="prob")])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trace_equals_a_fresh_forward_pass(model, tokenizer, temperature, soft, monkeypatch):
    """Also with several chunks; and the chosen tokens' log-probs are those of sampling."""
    monkeypatch.setattr(ta, "MAX_LOGITS", 512 * 7)
    options = dict(max_new_tokens=25, temperature=temperature, soft=soft, seed=1)
    rollout = generate(model, tokenizer, [QUESTION, "Tom"], **options)
    for row in range(2):
        sizes = [logp.numel() for _, (logp,) in ta.logprob_chunks([model], rollout, row)]
        assert max(sizes) <= ta.MAX_LOGITS and len(sizes) == -(-int(rollout.lengths[row]) // 7)
        got = ta.measure(model, rollout, row, temperature=temperature, top_k=9)
        logits, T = fresh_logits(model, rollout, row), int(rollout.lengths[row])
        assert len(got["logp"]) == T and (soft is None or got["is_soft"].any())
        logp, flat = torch.log_softmax(logits, -1), torch.log_softmax(logits / temperature, -1)
        y = rollout.trace_ids[row, :T, None]
        ordered = logp.sort(dim=-1, descending=True).values
        expected = {
            "logp": logp.gather(1, y)[:, 0],
            "logp_t": flat.gather(1, y)[:, 0],
            "topk_logp": ordered[:, :9],
            "tail_mass": ordered[:, 9:].exp().sum(-1),
            "topk_mass_t": flat.sort(dim=-1, descending=True).values[:, :9].exp().sum(-1),
            "entropy": -(logp.exp() * logp).sum(-1),
            "entropy_t": -(flat.exp() * flat).sum(-1),
            "collision_t": (flat.exp() ** 2).sum(-1),
            "argmax_p": torch.stack([torch.softmax(logits / t, -1).amax(-1) for t in ta.TEMPERATURES], -1),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(got[name], values.numpy(), atol=1e-4, err_msg=name)
        np.testing.assert_allclose(got["rank_curve"], ordered[:, got["ranks"] - 1].numpy(), rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(logp.gather(1, torch.tensor(got["topk_ids"]).long()), got["topk_logp"], atol=1e-4)
        column = (got["draws"] == got["token_ids"][:, None]).argmax(1)
        sampled = rollout.logprobs[row, np.arange(T), column]
        np.testing.assert_allclose(got["logp_t"], sampled, atol=1e-4)


def test_rank_grid():
    for vocab_size in (2, 512, 151_936):
        ranks = ta.rank_grid(vocab_size)
        assert ranks[0] == 1 and ranks[-1] == vocab_size and len(ranks) <= 250 and (np.diff(ranks) > 0).all()


# ---------------------------------------------------------------- one whole run of the embedded model


@pytest.fixture
def without_pictures(monkeypatch):
    """They take most of a run's time; tests/test_trace_page.py looks at them."""
    monkeypatch.setattr(pictures, "draw_pictures", lambda trace, folder: [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    ta.main(["--output_dir", str(folder), "--save_full", "--top_k", "20", "--temperature", "0.8", *FAST])
    return folder


@pytest.fixture(scope="module")
def trace(folder):
    return ta.load(folder)


def test_all_files_are_there(folder):
    names = "meta.json trace.npz trace.jsonl tokens.csv summary.json trace_openai.json trace.html full_logp.npy"
    pictures = "entropy consistency landscape entropy_varentropy histograms topk_01".split()
    assert {file.name for file in folder.iterdir()} == {*names.split(), *(f"{name}.png" for name in pictures)}


def test_npz_holds_the_log_probs_of_a_fresh_forward_pass(folder, trace):
    model, tokenizer = llms.load("tiny")
    prompt = tokenizer(trace.meta["prompt"], add_special_tokens=False)["input_ids"]
    with np.load(folder / "trace.npz") as stored:
        ids, topk_ids, topk_logp = (stored[name] for name in ("token_ids", "topk_ids", "topk_logp"))
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([prompt + ids.tolist()])).logits[0, len(prompt) - 1 : -1], -1)
    assert topk_ids.dtype == np.int32 and topk_logp.dtype == np.float32 and topk_ids.shape == (len(ids), 20)
    np.testing.assert_allclose(logp.gather(1, torch.tensor(topk_ids).long()), topk_logp, atol=1e-4)
    np.testing.assert_allclose(logp[np.arange(len(ids)), ids], trace["logp"], atol=1e-4)
    np.testing.assert_allclose(logp, np.load(folder / "full_logp.npy"), atol=1e-4)


def test_csv_has_a_row_a_step_and_its_definitions_hold(folder, trace):
    with open(folder / "tokens.csv", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["step"]) for row in rows] == list(range(len(trace)))
    assert len((folder / "tokens.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(rows), "a line a step"
    for row in rows:
        close = dict(rel=1e-4, abs=1e-6)
        assert float(row["p"]) == pytest.approx(math.exp(float(row["logp"])), **close)
        assert float(row["surprisal"]) == -float(row["logp"])
        assert float(row["perplexity_t"]) == pytest.approx(math.exp(float(row["entropy_t"])), **close)
        assert float(row["topk_mass"]) + float(row["tail_mass"]) == pytest.approx(1, abs=1e-5)
        assert (row["agrees"] == "1") == (row["token_id"] == row["argmax_id"])
        assert row["is_soft"] == "0" and row["effective_draws"] == "1"
    assert 0 < sum(row["fork"] == "1" for row in rows) < len(rows) / 2
    assert any(float(row["entropy"]) > float(row["entropy_t"]) for row in rows), "T = 0.8 is sharper"


def test_csv_writes_white_space_and_backslashes_as_escapes(tmp_path):
    tokens = ["\n", "a\tb", "\\n", ' "', " 5,", "é\u2028", "=1"]
    ta.write_csv(tmp_path / "x.csv", {"token": tokens, "x": np.array([0.5] * 7)})
    lines = (tmp_path / "x.csv").read_text(encoding="utf-8").split("\n")
    assert lines[1:-1] == ["\\n,0.5", "a\\tb,0.5", "\\\\n,0.5", '" """,0.5', '" 5,",0.5', "é\\u2028,0.5", "=1,0.5"]


def test_from_trace_makes_the_same_files_without_a_model(folder, tmp_path, monkeypatch, without_pictures):
    monkeypatch.setattr(llms, "load", None)
    names = ["tokens.csv", "summary.json", "trace.html", "trace_openai.json", "trace.jsonl", "meta.json"]
    before = {name: (folder / name).read_bytes() for name in names}
    ta.main(["--from_trace", str(folder), "--output_dir", str(tmp_path), "--skip_individual_pdfs"])
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    for name in names[:4]:
        (tmp_path / name).unlink()
    ta.main(["--from_trace", str(tmp_path), "--max_pdfs", "2"])  # into the same folder
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert len(list((tmp_path / "token_pdfs").iterdir())) == 2


def test_jsonl_and_openai_say_the_same_as_the_arrays(folder, trace):
    with open(folder / "trace.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    content = json.loads((folder / "trace_openai.json").read_text(encoding="utf-8"))["content"]
    assert len(rows) == len(content) == len(trace)
    for t, (row, entry) in enumerate(zip(rows, content, strict=True)):
        assert row["step"] == t and row["id"] == trace["token_ids"][t] and len(row["top"]) == 20
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"} and len(entry["top_logprobs"]) == 20
        assert entry["token"] == row["token"] == bytes(entry["bytes"]).decode()
        assert entry["logprob"] == row["logp"] == pytest.approx(float(trace["logp"][t]))
        tops = zip(row["top"], entry["top_logprobs"], trace["topk_logp"][t], strict=True)
        for own, theirs, logp in tops:
            assert own["token"] == theirs["token"] and theirs["logprob"] == own["logp"] == pytest.approx(float(logp))
    text = b"".join(bytes(row["bytes"]) for row in rows).decode()
    assert text == trace.meta["text"] + "<|im_end|>"


def test_an_older_longer_trace_leaves_nothing_behind(folder, trace, tmp_path):
    (tmp_path / "token_pdfs").mkdir()
    for name in ("topk_09.png", "token_pdfs/step_0999.pdf", "token_pdfs/mine.pdf"):
        (tmp_path / name).touch()
    ta.save(trace, tmp_path)
    assert {file.name for file in tmp_path.rglob("*.p*")} == {"mine.pdf"}


def test_the_impossible_is_valid_json(trace, tmp_path):
    arrays = trace.arrays | {name: np.full_like(trace[name], -np.inf) for name in ("logp", "topk_logp")}
    ta.save(ta.Trace(trace.meta, arrays, trace.spelling), tmp_path)
    loaded = ta.load(tmp_path)
    assert ta.openai_logprobs(loaded)["content"][0]["logprob"] == -9999.0
    assert np.isneginf(loaded["topk_logp"]).all()


def test_summary(trace):
    summary = trace.summary()
    assert summary["perplexity"] == pytest.approx(math.exp(-trace["logp"].mean()))
    assert summary["all"]["entropy"] == pytest.approx(trace["entropy"].mean(), rel=1e-5)
    assert summary["path_consistency"]["resamples"] == 3
    assert sum(summary["answer_consistency"]["answers"].values()) == 4
    assert summary["forks"]["steps"] == np.flatnonzero(trace.forks).tolist()
    assert summary["soft"]["share_soft"] == 0 and summary["soft"]["effective_draws"] is None


def test_the_trace_does_not_depend_on_the_resamples(trace, tmp_path, without_pictures):
    ta.main(["--output_dir", str(tmp_path), "--temperature", "0.8", "--num_resamples", "0", "--skip_individual_pdfs"])
    alone = ta.load(tmp_path)
    assert alone["token_ids"].tolist() == trace["token_ids"].tolist() and np.isnan(alone["path_share"]).all()
    assert alone.meta["resamples"] == [] and alone.meta["forced_forks"] == []


def parts_of(text, prompt="", tags="reasoning", width=3):
    """parts of a text cut into pieces of `width` bytes."""
    pieces = [text.encode()[i : i + width] for i in range(0, len(text.encode()), width)]
    ids = np.arange(len(pieces))
    trace = ta.Trace({"tags": tags, "prompt": prompt}, {"token_ids": ids}, dict(enumerate(pieces)))
    return [(name, piece.decode()) for name, piece in zip(trace.parts, pieces, strict=True)]


def test_parts_of_the_text():
    text = "a<reasoning>1+2</reasoning> <answer>3</answer>!"
    found = parts_of(text, width=1)
    assert "".join(piece for name, piece in found if name == "reasoning") == "1+2"
    assert "".join(piece for name, piece in found if name == "answer") == "3"
    assert [name for name, _ in parts_of("<think>1+2</think>", tags="think", width=7)] == ["", "reasoning", ""]
    assert [name for name, _ in parts_of("1+2</reasoning>", "x <reasoning>\n", width=3)][:2] == ["reasoning", ""]
    assert {name for name, _ in parts_of("<reasoning>1+2", width=11)} == {"", "reasoning"}, "never closed"
    assert {name for name, _ in parts_of("The answer is 3.")} == {""}


# ---------------------------------------------------------------- forks


def test_forced_forks_go_on_from_the_very_tokens(tokenizer, tmp_path, monkeypatch):
    """Greedy, so that transformers can say what follows; the random model's text would not survive encoding again."""
    monkeypatch.setattr(ta.AnalysisConfig, "answer_of", lambda self, text: text)  # so that every change counts
    model = random_model(eos_token_id=[2])
    config = ta.AnalysisConfig(temperature=0, num_resamples=2, forks=3, max_new_tokens=30, max_pdfs=0)
    trace, rollout = ta.record(model, tokenizer, rldatasets.Problem(QUESTION, "24", ""), config, tmp_path)
    tokens, prompt = trace["token_ids"].tolist(), rollout.prompt_ids[0].tolist()
    encoded = tokenizer(tokenizer.decode(tokens), add_special_tokens=False)["input_ids"]
    assert encoded != tokens, "the premise"
    forced = trace.meta["forced_forks"]
    strongest = [t for t in np.argsort(-trace["entropy"]).tolist() if t < 29 and tokens[t] != 2]
    assert [fork["step"] for fork in forced] == strongest[:3]
    for fork in forced:
        t = fork["step"]
        runner_up = next(token for token in trace["topk_ids"][t].tolist() if token != tokens[t])
        assert (fork["token"], fork["runner_up"]) == (trace.label(tokens[t]), trace.label(runner_up))
        written = prompt + tokens[:t] + [runner_up]
        ids = torch.tensor([written])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30 - t - 1, do_sample=False)
        text = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        assert fork["answers_with_runner_up"] == [text] * 2 != [trace.meta["answer"]] * 2
        assert (fork["changed_with_token"], fork["changed_with_runner_up"]) == (0, 1), "greedy: the same again"


# ---------------------------------------------------------------- comparisons


def test_forced_comparison_equals_slow_loops(tokenizer, monkeypatch):
    monkeypatch.setattr(ta, "MAX_LOGITS", 512 * 6)
    a, b = random_model(seed=0), random_model(seed=1)
    soft = SoftThinking(k=2, start="immediately")
    rollout = generate(a, tokenizer, [QUESTION], max_new_tokens=20, soft=soft, seed=0)
    columns, most_shifted = ta.compare_forced([a, b], tokenizer, rollout)
    p, q = (torch.softmax(fresh_logits(model, rollout, 0), -1).numpy() for model in (a, b))
    tokens, steps = rollout.trace_ids[0, : rollout.lengths[0]].numpy(), np.arange(int(rollout.lengths[0]))
    average = (p + q) / 2
    expected = {
        "change": np.log(q / p)[steps, tokens],
        "kl_ab": (p * np.log(p / q)).sum(-1),
        "kl_ba": (q * np.log(q / p)).sum(-1),
        "jsd": ((p * np.log(p / average)).sum(-1) + (q * np.log(q / average)).sum(-1)) / 2,
        "flips": p.argmax(-1) != q.argmax(-1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values, atol=2e-4, err_msg=name)
    shift = (q - p).sum(0)
    assert len(most_shifted) == 20
    assert {entry["id"] for entry in most_shifted} == set(np.argsort(-np.abs(shift))[:20].tolist())
    assert [e["shift"] for e in most_shifted] == pytest.approx([shift[e["id"]] for e in most_shifted], abs=1e-4)
    summary = ta.forced_summary(columns, most_shifted)
    assert summary["mean"]["jsd"] == pytest.approx(expected["jsd"].mean(), abs=1e-4)
    assert [row["step"] for row in summary["most_shifted_steps"]] == np.argsort(-columns["jsd"], kind="stable").tolist()


def test_models_of_different_padding_are_compared_on_common_ids(tokenizer):
    a, b = random_model(seed=0), random_model(seed=1, vocab_size=600)
    rollout = generate(a, tokenizer, [QUESTION], max_new_tokens=8, seed=0)
    ((_, (logp_a, logp_b)),) = ta.logprob_chunks([a, b], rollout, 0)
    assert logp_a.shape == logp_b.shape == (rollout.lengths[0], 512)
    assert logp_b.exp().sum(-1).tolist() == pytest.approx([1.0] * len(logp_b), abs=1e-5)


def test_common_prefix():
    array = np.array
    assert ta.common_prefix(array([1, 2, 3]), array([1, 2, 4, 5])) == 2
    assert ta.common_prefix(array([1, 2]), array([1, 2, 4])) == 2
    assert ta.common_prefix(array([9]), array([1])) == 0
    assert ta.common_prefix(array([1, 2]), array([1, 2])) == 2


@pytest.fixture(scope="module")
def soft_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft")
    soft = ["--soft_thinking", "--soft_thinking_k", "3", "--soft_thinking_start", "immediately"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pictures, "draw_pictures", lambda trace, folder: [])
        options = ["--temperature", "0.8", "--num_resamples", "0", "--skip_individual_pdfs"]
        ta.main(["--output_dir", str(folder), *options, *soft])
    return folder


def test_normal_against_soft_traces(folder, soft_folder, tmp_path):
    ta.main(["--compare", str(folder), str(soft_folder), "--output_dir", str(tmp_path)])
    free = json.loads((tmp_path / "compare.json").read_text())["free"]
    normal, soft = ta.load(folder), ta.load(soft_folder)
    shared = free["common_prefix"]
    assert normal["token_ids"][:shared].tolist() == soft["token_ids"][:shared].tolist()
    assert free["first_divergence"] == shared < min(len(normal), len(soft))
    assert (free["a"]["at_divergence"], free["b"]["at_divergence"]) == (normal.labels[shared], soft.labels[shared])
    assert free["a"]["share_soft"] == 0 and free["a"]["effective_draws"] is None
    where = soft["is_soft"]
    assert free["b"]["share_soft"] == where.mean() > 0
    assert free["b"]["soft_exit_step"] == np.flatnonzero(where).max() + 1
    assert free["b"]["one_minus_top_weight"] == pytest.approx((1 - soft["top_weight"][where]).mean(), abs=1e-6)
    assert free["b"]["tokens"] == len(soft) and 1 < free["b"]["effective_draws"] <= 3
    assert free["b"]["after_divergence"]["entropy"] == pytest.approx(soft["entropy"][shared:].mean(), rel=1e-5)


def test_exit_step(folder):
    trace = ta.load(folder)
    parts = trace.parts
    assert trace.exit_step() == max(t for t, part in enumerate(parts) if part == "reasoning") + 1
    trace.__dict__["parts"] = ["", "reasoning", "reasoning"] + [""] * (len(parts) - 3)
    assert trace.exit_step() == 3
    trace.__dict__["parts"] = ["", *["reasoning"] * (len(parts) - 1)]
    assert trace.exit_step() is None, "it did not end"


def test_compare_two_models(tmp_path, without_pictures):
    ta.main(["--compare", "tiny", "tiny", "--output_dir", str(tmp_path), *FAST])
    result = json.loads((tmp_path / "compare.json").read_text())
    for side in "ab":
        mean = result["forced"][f"text_of_{side}"]["mean"]
        assert mean == pytest.approx(dict.fromkeys(mean, 0), abs=1e-6), "a model is at no distance from itself"
        assert ta.load(tmp_path / side).meta["model"] == "tiny"
        assert (tmp_path / f"compare_text_of_{side}.png").is_file()
    assert result["free"]["first_divergence"] is None and (tmp_path / "compare_free.png").is_file()


# ---------------------------------------------------------------- bad input


def fails_with(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        ta.main(arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and error.startswith("token_analysis.py: ") and message in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--from_trace nowhere --output_dir x", "no trace in 'nowhere'"),
        ("--temperature -1", "--temperature -1.0: must be 0 or more"),
        ("--temperature nan", "--temperature nan"),
        ("--top_k 1", "--top_k 1: must be 2 or more"),
        ("--max_new_tokens 0", "--max_new_tokens 0"),
        ("--dataset_name nothing", "unknown dataset 'nothing'"),
        ("--tags thoughts", "invalid choice: 'thoughts'"),
        ("--prompt= ", "--prompt: the question is empty"),
        ("--compare tiny", "--compare takes two"),
        ("--compare tiny tiny --from_trace x", "choose one"),
        ("--forks 2 --num_resamples 0", "--forks 2: needs --num_resamples"),
        ("--forks 2 --soft_thinking", "--forks 2"),
        ("--model_name ./nowhere", "cannot load model './nowhere'"),
        ("--nonsense", "--nonsense"),
        ("--seed x", "seed"),
        ("--max_new_tokens 1000", "exceed the model's 512 positions"),
    ],
)
def test_bad_arguments(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    fails_with(capsys, arguments.split(" ") if "= " not in arguments else ["--prompt= "], message)


def test_folders_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(llms, "load", None)  # nothing may be loaded first
    (tmp_path / "file").touch()
    fails_with(capsys, ["--output_dir", str(tmp_path / "file" / "x")], "cannot write to --output_dir")


@pytest.mark.parametrize("damage", ["trace.npz", "trace.jsonl", "meta.json", "short npz", "an array", "a key"])
def test_damaged_traces(capsys, folder, tmp_path, damage):
    copy = tmp_path / "trace"
    shutil.copytree(folder, copy)
    if damage == "short npz":
        (copy / "trace.npz").write_bytes((copy / "trace.npz").read_bytes()[:3000])
    elif damage == "an array":
        arrays = dict(np.load(copy / "trace.npz"))
        np.savez(copy / "trace.npz", **{name: a for name, a in arrays.items() if name != "rank"})
    elif damage == "a key":
        meta = json.loads((copy / "meta.json").read_text())
        (copy / "meta.json").write_text(json.dumps({name: v for name, v in meta.items() if name != "prompt"}))
    else:
        (copy / damage).unlink()
    message = "no trace in" if damage == "meta.json" else "not a whole trace in"
    fails_with(capsys, ["--from_trace", str(copy)], message)


def test_traces_that_cannot_be_compared(capsys, folder, soft_folder, tmp_path):
    other = tmp_path / "other"
    for key in ("prompt", "tokenizer"):
        shutil.copytree(soft_folder, other, dirs_exist_ok=True)
        meta = json.loads((other / "meta.json").read_text())
        (other / "meta.json").write_text(json.dumps(meta | {key: "another"}))
        arguments = ["--compare", str(folder), str(other), "--output_dir", str(tmp_path / "out")]
        fails_with(capsys, arguments, f"different {key}s")
    fails_with(capsys, ["--compare", str(folder), "tiny", "--output_dir", str(tmp_path / "out")], "one is a trace")


def save_model(folder, **overrides):
    random_model(**overrides).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "models" / "tiny").save_pretrained(folder)
    return str(folder)


def test_models_of_different_tokenizers(capsys, tmp_path):
    name = save_model(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    swapped = file.read_text().replace('"Mia": 510', '"Mia": 511').replace('"Max": 511', '"Max": 510')
    assert swapped != file.read_text(), "the premise"
    file.write_text(swapped)
    fails_with(capsys, ["--compare", "tiny", name, "--output_dir", str(tmp_path / "out")], "different tokenizers")


def test_models_that_are_asked_differently(capsys, tmp_path):
    name = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = "{{ messages[1]['content'] }}"
    tokenizer.save_pretrained(name)
    fails_with(capsys, ["--compare", "tiny", name, "--output_dir", str(tmp_path / "out")], "different chat templates")


def test_empty_completion(capsys, tmp_path):
    name = save_model(tmp_path / "model", eos_token_id=list(range(512)))
    arguments = ["--model_name", name, "--max_new_tokens", "9", "--output_dir", str(tmp_path / "out")]
    fails_with(capsys, arguments, "empty completion")
    assert not (tmp_path / "out" / "meta.json").exists()


# ---------------------------------------------------------------- the real vocabulary size

MEASURE_LARGE = """
import resource
from random_models import ROOT, random_model
from transformers import AutoTokenizer
import token_analysis as ta
from rollout import generate

tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
model = random_model(vocab_size=151936, hidden_size=16, num_hidden_layers=1, eos_token_id=[151645])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
before = peak()
rollout = generate(model, tokenizer, ["Tom"], max_new_tokens=112, seed=0)  # more than a chunk, which has 110 steps
arrays = ta.measure(model, rollout)
assert len(arrays["logp"]) > ta.MAX_LOGITS // 151936, "the premise"
print(peak() - before, sum(array.nbytes for array in arrays.values()) / len(arrays["logp"]))
"""


def test_real_vocabulary_stays_small():
    """Memory is bounded by a chunk, whatever the number of steps; what is kept of a step is top-k and rank curve."""
    run = [sys.executable, "-c", MEASURE_LARGE]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    output = subprocess.run(run, capture_output=True, text=True, env=paths, check=False)
    assert output.returncode == 0, output.stderr
    gibibytes, bytes_a_step = map(float, output.stdout.split())
    assert gibibytes < 1.2 and bytes_a_step < 2500


def test_unused_ids_of_the_real_vocabulary(qwen):
    tokenizer = qwen
    spelled = ta.token_bytes(tokenizer, [151_643, 151_645, 151_664, 151_665, 151_935])
    assert [piece is None for piece in spelled.values()] == [False, False, False, True, True]
    text = "naïve 中文 😀\n\tx = {'a': 1}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(ta.token_bytes(tokenizer, ids)[token] for token in ids) == text.encode()
