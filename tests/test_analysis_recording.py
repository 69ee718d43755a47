"""analysis/recording.py and comparison.py: a trace against fresh forward passes, forks against what transformers
generates, two models on the same tokens against slow loops, memory at the real vocabulary size."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from random_models import ROOT, random_model

import rldatasets
from analysis import comparison, measures, recording
from analysis.config import AnalysisConfig
from rollout import generate
from soft_thinking import SoftThinking

QUESTION = "Mia has 12 eggs. Mia doubles them. How many eggs does Mia have?"

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
    monkeypatch.setattr(recording, "MAX_LOGITS", 512 * 7)
    options = dict(max_new_tokens=25, temperature=temperature, soft=soft, seed=1)
    rollout = generate(model, tokenizer, [QUESTION, "Tom"], **options)
    for row in range(2):
        sizes = [logp.numel() for _, (logp,) in recording.logprob_chunks([model], rollout, row)]
        assert max(sizes) <= recording.MAX_LOGITS and len(sizes) == -(-int(rollout.lengths[row]) // 7)
        got = recording.measure(model, rollout, row, temperature=temperature, top_k=9)
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
            "argmax_p": torch.stack([torch.softmax(logits / t, -1).amax(-1) for t in measures.TEMPERATURES], -1),
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
        ranks = recording.rank_grid(vocab_size)
        assert ranks[0] == 1 and ranks[-1] == vocab_size and len(ranks) <= 250 and (np.diff(ranks) > 0).all()


# ---------------------------------------------------------------- forks


def test_forced_forks_continue_exactly_the_tokens_of_the_trace(tokenizer, tmp_path, monkeypatch):
    """Greedy, so that transformers can generate the same. The random model's text would be encoded as other tokens."""
    monkeypatch.setattr(AnalysisConfig, "answer_of", lambda self, text: text)  # so that every change counts
    model = random_model(eos_token_id=[2])
    config = AnalysisConfig(temperature=0, num_resamples=2, forks=3, max_new_tokens=30, max_pdfs=0)
    trace, rollout = recording.record(model, tokenizer, rldatasets.Problem(QUESTION, "24", ""), config, tmp_path)
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
        start = prompt + tokens[:t] + [runner_up]
        ids = torch.tensor([start])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30 - t - 1, do_sample=False)
        text = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        assert fork["answers_with_runner_up"] == [text] * 2 != [trace.meta["answer"]] * 2
        assert (fork["changed_with_token"], fork["changed_with_runner_up"]) == (0, 1), "greedy: the same again"


# ---------------------------------------------------------------- two models


def test_forced_comparison_equals_slow_loops(tokenizer, monkeypatch):
    monkeypatch.setattr(recording, "MAX_LOGITS", 512 * 6)
    a, b = random_model(seed=0), random_model(seed=1)
    soft = SoftThinking(k=2, start="immediately")
    rollout = generate(a, tokenizer, [QUESTION], max_new_tokens=20, soft=soft, seed=0)
    columns, most_shifted = comparison.compare_forced([a, b], tokenizer, rollout)
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
    summary = comparison.forced_summary(columns, most_shifted)
    assert summary["mean"]["jsd"] == pytest.approx(expected["jsd"].mean(), abs=1e-4)
    assert [row["step"] for row in summary["most_shifted_steps"]] == np.argsort(-columns["jsd"], kind="stable").tolist()


def test_models_of_different_padding_are_compared_on_common_ids(tokenizer):
    a, b = random_model(seed=0), random_model(seed=1, vocab_size=600)
    rollout = generate(a, tokenizer, [QUESTION], max_new_tokens=8, seed=0)
    ((_, (logp_a, logp_b)),) = recording.logprob_chunks([a, b], rollout, 0)
    assert logp_a.shape == logp_b.shape == (rollout.lengths[0], 512)
    assert logp_b.exp().sum(-1).tolist() == pytest.approx([1.0] * len(logp_b), abs=1e-5)


def test_common_prefix():
    array = np.array
    assert comparison.common_prefix(array([1, 2, 3]), array([1, 2, 4, 5])) == 2
    assert comparison.common_prefix(array([1, 2]), array([1, 2, 4])) == 2
    assert comparison.common_prefix(array([9]), array([1])) == 0
    assert comparison.common_prefix(array([1, 2]), array([1, 2])) == 2


# ---------------------------------------------------------------- the real vocabulary size

MEASURE_LARGE = """
import resource
from random_models import ROOT, random_model
from transformers import AutoTokenizer
from analysis import recording
from rollout import generate

tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
model = random_model(vocab_size=151936, hidden_size=16, num_hidden_layers=1, eos_token_id=[151645])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
before = peak()
rollout = generate(model, tokenizer, ["Tom"], max_new_tokens=112, seed=0)  # more than a chunk, which has 110 steps
arrays = recording.measure(model, rollout)
assert len(arrays["logp"]) > recording.MAX_LOGITS // 151936, "the premise"
print(peak() - before, sum(array.nbytes for array in arrays.values()) / len(arrays["logp"]))
"""


def test_real_vocabulary_stays_small():
    """Memory is bounded by a chunk, not by the number of steps; of each step only top-k and rank curve are kept."""
    run = [sys.executable, "-c", MEASURE_LARGE]
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    output = subprocess.run(run, capture_output=True, text=True, env=paths, check=False)
    assert output.returncode == 0, output.stderr
    gibibytes, bytes_per_step = map(float, output.stdout.split())
    assert gibibytes < 1.2 and bytes_per_step < 2500
