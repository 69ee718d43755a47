"""token_analysis.py: files against each other, comparisons of traces, bad input against one clear line."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from random_models import ROOT, random_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import llms
import token_analysis as ta
from analysis import files, pictures, tokens
from analysis.config import AnalysisConfig, parse_config
from analysis.trace import Trace
from tracking import command_line

FAST = ["--num_resamples", "3", "--forks", "1", "--skip_individual_pdfs"]
ALONE = ["--num_resamples", "0", "--skip_individual_pdfs"]


def analyse(arguments):
    ta.main(parse_config(arguments))


# ---------------------------------------------------------------- one whole run of the embedded model


@pytest.fixture
def without_pictures(monkeypatch):
    """They take most of a run's time; tests/test_analysis_pictures.py checks them."""
    monkeypatch.setattr(pictures, "draw_pictures", lambda trace, folder: [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    analyse(["--output_dir", str(folder), "--save_full", "--top_k", "20", "--temperature", "0.8", "--seed", "5", *FAST])
    return folder


@pytest.fixture(scope="module")
def trace(folder):
    return files.load_trace(folder)


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
    files.write_csv(tmp_path / "x.csv", {"token": tokens, "x": np.array([0.5] * 7)})
    lines = (tmp_path / "x.csv").read_text(encoding="utf-8").split("\n")
    assert lines[1:-1] == ["\\n,0.5", "a\\tb,0.5", "\\\\n,0.5", '" """,0.5', '" 5,",0.5', "é\\u2028,0.5", "=1,0.5"]


def test_from_trace_makes_the_same_files_without_a_model(folder, tmp_path, monkeypatch, without_pictures):
    monkeypatch.setattr(llms, "load", None)
    names = ["tokens.csv", "summary.json", "trace.html", "trace_openai.json", "trace.jsonl", "meta.json"]
    before = {name: (folder / name).read_bytes() for name in names}
    analyse(["--from_trace", str(folder), "--output_dir", str(tmp_path), "--skip_individual_pdfs"])
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    for name in names[:4]:
        (tmp_path / name).unlink()
    analyse(["--from_trace", str(tmp_path), "--max_pdfs", "2"])  # into the same folder
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
    files.save_trace(trace, tmp_path)
    assert {file.name for file in tmp_path.rglob("*.p*")} == {"mine.pdf"}


def test_the_impossible_is_valid_json(trace, tmp_path):
    arrays = trace.arrays | {name: np.full_like(trace[name], -np.inf) for name in ("logp", "topk_logp")}
    files.save_trace(Trace(trace.meta, arrays, trace.spelling), tmp_path)
    loaded = files.load_trace(tmp_path)
    assert files.openai_logprobs(loaded)["content"][0]["logprob"] == -9999.0
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
    analyse(["--output_dir", str(tmp_path), "--temperature", "0.8", "--seed", "5", *ALONE])
    alone = files.load_trace(tmp_path)
    assert alone["token_ids"].tolist() == trace["token_ids"].tolist() and np.isnan(alone["path_share"]).all()
    assert alone.meta["resamples"] == [] and alone.meta["forced_forks"] == []


def parts_of(text, prompt="", tags="reasoning", width=3):
    """parts of a text cut into pieces of `width` bytes."""
    pieces = [text.encode()[i : i + width] for i in range(0, len(text.encode()), width)]
    ids = np.arange(len(pieces))
    trace = Trace({"tags": tags, "prompt": prompt}, {"token_ids": ids}, dict(enumerate(pieces)))
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


def test_answers_are_numbers_where_they_can_be():
    form = "<reasoning>x</reasoning><answer>{}</answer>"
    texts = (form.format("12.0"), form.format("a cat"), "So 1,200.", "No")
    assert [AnalysisConfig().answer_of(text) for text in texts] == ["12", "a cat", "1200", None]
    begun = AnalysisConfig(prefill=True)  # the prompt wrote the opening tag
    assert begun.answer_of("7</reasoning><answer>a dog</answer>") == "a dog"


# ---------------------------------------------------------------- comparisons


@pytest.fixture(scope="module")
def soft_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft")
    soft = ["--soft_thinking", "--soft_thinking_k", "3", "--soft_thinking_start", "immediately"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pictures, "draw_pictures", lambda trace, folder: [])
        options = ["--temperature", "0.8", "--seed", "5", "--num_resamples", "0", "--skip_individual_pdfs"]
        analyse(["--output_dir", str(folder), *options, *soft])
    return folder


def test_normal_against_soft_traces(folder, soft_folder, tmp_path):
    analyse(["--compare", str(folder), str(soft_folder), "--output_dir", str(tmp_path)])
    free = json.loads((tmp_path / "compare.json").read_text())["free"]
    normal, soft = files.load_trace(folder), files.load_trace(soft_folder)
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
    trace = files.load_trace(folder)
    parts = trace.parts
    assert trace.exit_step() == max(t for t, part in enumerate(parts) if part == "reasoning") + 1
    trace.__dict__["parts"] = ["", "reasoning", "reasoning"] + [""] * (len(parts) - 3)
    assert trace.exit_step() == 3
    trace.__dict__["parts"] = ["", *["reasoning"] * (len(parts) - 1)]
    assert trace.exit_step() is None, "it did not end"


def test_compare_two_models(tmp_path, without_pictures):
    analyse(["--compare", "tiny", "tiny", "--output_dir", str(tmp_path), *FAST])
    result = json.loads((tmp_path / "compare.json").read_text())
    for side in "ab":
        mean = result["forced"][f"text_of_{side}"]["mean"]
        assert mean == pytest.approx(dict.fromkeys(mean, 0), abs=1e-6), "a model is at no distance from itself"
        assert files.load_trace(tmp_path / side).meta["model"] == "tiny"
        assert (tmp_path / f"compare_text_of_{side}.png").is_file()
    assert result["free"]["first_divergence"] is None and (tmp_path / "compare_free.png").is_file()


# ---------------------------------------------------------------- bad input


def fails_with(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["token_analysis.py", *arguments])
        command_line.run_script(ta.main, command_line.parse_or_exit(parse_config))
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
    message = "no trace in" if damage == "meta.json" else "incomplete trace in"
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


# ---------------------------------------------------------------- tokens of SentencePiece


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer that writes words as SentencePiece does: a mark for the space, taken away in front when decoded."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    tokenizer.train_from_iterator(["he has two apples left. So 18 </answer>"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_tokens_of_sentencepiece_are_shown_with_their_spaces(sentencepiece):
    text = "he has two apples left."
    ids = sentencepiece(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 3 and "".join(sentencepiece.decode([token]) for token in ids) != text, "the premise"
    assert "".join(tokens.token_texts(sentencepiece, ids)) == f" {text}"  # the mark of its first word too
    spelling = tokens.token_bytes(sentencepiece, ids)
    assert b"".join(spelling[token] for token in ids).decode() == f" {text}"
    assert tokens.token_texts(sentencepiece, [sentencepiece.eos_token_id]) == ["</s>"]
    assert tokens.token_texts(sentencepiece, [10**6]) == [sentencepiece.decode([10**6])]


def test_tokens_of_byte_level_vocabularies_are_shown_as_they_decode(tokenizer):
    ids = list(range(len(tokenizer)))
    assert tokens.token_texts(tokenizer, ids) == [tokenizer.decode([token]) for token in ids]


# ---------------------------------------------------------------- the tokenizer of a real model


def test_unused_ids_of_the_real_vocabulary(qwen):
    spelling = tokens.token_bytes(qwen, [151_643, 151_645, 151_664, 151_665, 151_935])
    assert [piece is None for piece in spelling.values()] == [False, False, False, True, True]
    text = "naïve 中文 😀\n\tx = {'a': 1}"
    ids = qwen(text, add_special_tokens=False)["input_ids"]
    assert b"".join(tokens.token_bytes(qwen, ids)[token] for token in ids) == text.encode()
