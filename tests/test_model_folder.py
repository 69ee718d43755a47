"""Model folders: what a folder lacks is said in one line that names the file, before anything is loaded or made."""

import json
import shutil

import pytest
import torch
import transformers as T
from random_models import ROOT, random_model
from small_runs import small_dataset, tiny_config

import llms
import main


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model."""
    shutil.copytree(ROOT / "models" / "tiny", tmp_path / "model")
    return tmp_path / "model"


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(folder, match, load=llms.load):
    with pytest.raises(ValueError, match=f"^cannot load model '.*': .*{match}") as raised:
        load(str(folder))
    assert "\n" not in str(raised.value)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064d}\nsize 3400000\n"


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def only(folder, *kept):
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()


def shard(folder, *, drop):
    """Weights in two files with an index."""
    T.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="2MB")
    (folder / "model.safetensors").unlink()
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 1
    if drop:
        files[-1].unlink()


FAULTS = {
    "LFS weights": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        "model.safetensors is a pointer of git-LFS",
    ),
    "LFS tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json is a pointer of git-LFS"),
    "cut": (lambda f: cut(f / "model.safetensors", 200_000), "model.safetensors is cut: it has 200,000 bytes of 3,"),
    "cut header": (lambda f: cut(f / "model.safetensors", 300), "model.safetensors is cut"),
    "empty": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors is cut"),
    "a page": (lambda f: (f / "model.safetensors").write_text("<html>" * 99), "model.safetensors is damaged"),
    "a missing shard": (lambda f: shard(f, drop=True), "model-.*safetensors is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "gptq": (lambda f: change(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    "awq": (lambda f: change(f / "config.json", quantization_config={"quant_method": "awq"}), "awq"),
    "4 bits": (lambda f: change(f / "config.json", quantization_config={"load_in_4bit": True}), "bitsandbytes"),
    "no tokenizer": (lambda f: only(f, "config.json", "model.safetensors"), "no tokenizer"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: cut(f / "config.json", 100), "config.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is no JSON object"),
    "an unknown family": (lambda f: change(f / "config.json", model_type="of2031"), "of2031"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("load", [llms.load, llms.load_config])
def test_a_folder_with_a_fault_is_refused_by_the_name_of_the_file_or_the_method(folder, fault, load):
    break_it, match = FAULTS[fault]
    break_it(folder)
    refused(folder, match, load)


@pytest.mark.parametrize("fault", ["cut", "gptq", "no tokenizer"])
def test_a_run_that_cannot_begin_leaves_no_folder(folder, tmp_path, fault):
    FAULTS[fault][0](folder)
    config = tiny_config(tmp_path / "run", model_name=str(folder), dataset_path=small_dataset(tmp_path / "data"))
    with pytest.raises(ValueError, match=FAULTS[fault][1]):
        main.train(config)
    assert not (tmp_path / "run").exists()


def test_shards_load(folder):
    whole = llms.load("tiny")[0].state_dict()
    shard(folder, drop=False)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in llms.load(str(folder))[0].state_dict().items())


@pytest.mark.parametrize(
    "settings, match",
    [
        (
            dict(hidden_size=64),
            "model.embed_tokens.weight is 512 x 128 in its weights, and 512 x 64 by its config.json",
        ),
        (dict(vocab_size=600), "model.embed_tokens.weight is 512 x 128"),
        (dict(num_hidden_layers=6), "weights lack model.layers.4.* and .* more, which its config.json asks for"),
        (dict(num_hidden_layers=2), "weights have model.layers.2.*, of which its config.json knows nothing"),
    ],
)
def test_weights_that_do_not_fit_the_configuration(folder, capfd, settings, match):
    settings = settings | {"layer_types": ["full_attention"] * settings.get("num_hidden_layers", 4)}
    change(folder / "config.json", **settings)
    capfd.readouterr()
    refused(folder, match)
    assert "\n" not in capfd.readouterr().err.strip(), "a table of transformers' own"


def test_an_adapter_names_peft_and_what_to_do(folder):
    only(folder, "tokenizer.json", "tokenizer_config.json")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    refused(folder, "adapter of peft for 'some/base'.*merge")


def test_a_gguf_file_beside_the_weights_is_passed_over(folder):
    (folder / "model.gguf").touch()
    llms.load(str(folder))
    refused(folder / "config.json", "it is a file: give the folder")


def test_the_folder_of_a_run_says_where_its_models_are(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    refused(tmp_path, "folder of a run.*checkpoints")


@pytest.mark.parametrize("inside", ["nothing", "a run", "a model"])
def test_an_embedded_name_wins_over_a_folder_without_a_model(tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    if inside == "a model":
        shutil.copytree(ROOT / "models" / "tiny_student", tmp_path / "tiny")
    else:
        (tmp_path / "tiny" / ("checkpoints" if inside == "a run" else "")).mkdir(parents=True)
    width = llms.load("tiny")[0].config.hidden_size
    embedded = json.loads((ROOT / "models" / "tiny" / "config.json").read_text())["hidden_size"]
    assert (width == embedded) == (inside != "a model") and llms.load_config("tiny").hidden_size == width


def test_the_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert llms.load("~/model")[0].config.vocab_size == 512
    with pytest.raises(ValueError, match="cannot load model '~/nothing': there is no such folder"):
        llms.load("~/nothing")


def test_a_wrapped_and_a_hybrid_model_are_refused_by_their_configuration(tmp_path, tokenizer):
    size = dict(
        vocab_size=512, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=12, intermediate_size=64
    )
    vision = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=28, patch_size=14
    )
    text = size | dict(num_hidden_layers=2, sliding_window=512)
    wrapped = T.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, eos_token_id=2)
    layers = dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    models = {
        "gemma3": T.Gemma3ForConditionalGeneration(wrapped),
        "lfm2": T.AutoModelForCausalLM.from_config(T.Lfm2Config(**size, **layers)),
    }
    for family, model in models.items():
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        for load in (llms.load, llms.load_config):
            refused(tmp_path / family, f"{family} models are not supported", load)


def test_loading_probes_the_model(folder, monkeypatch):
    change(folder / "config.json", logit_scale=0.5)  # no Qwen2 has one, so its own forward does not look for it
    refused(folder, "qwen2 models are not supported: log-probs of sampling differ from the model's own by .* nats")


def test_loading_turns_dropout_off_under_every_name(tmp_path, tokenizer):
    config = T.OPTConfig(
        vocab_size=512, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=48,
        max_position_embeddings=256, eos_token_id=2, pad_token_id=0, dropout=0.5, attention_dropout=0.5, layerdrop=0.5,
    )  # fmt: skip
    T.OPTForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = llms.load(str(tmp_path))[0].train()
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_sampling_defaults_that_could_not_be_saved_are_dropped_with_a_line(folder, tmp_path, capsys):
    change(folder / "generation_config.json", do_sample=False, temperature=0.9, top_p=0.6)
    model, tokenizer = llms.load(str(folder))
    [line] = capsys.readouterr().out.splitlines()
    assert "dropped the sampling defaults" in line and "temperature" in line
    embedded, its_tokenizer = llms.load("tiny")
    assert llms.stop_ids(model, tokenizer) == llms.stop_ids(embedded, its_tokenizer)
    model.save_pretrained(tmp_path / "saved")
    assert capsys.readouterr().out == ""
    again = T.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert again.temperature is None and again.eos_token_id == embedded.generation_config.eos_token_id


def test_sampling_defaults_that_can_be_saved_stay(tmp_path, tokenizer, capsys):
    model = random_model()
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = llms.load(str(tmp_path))[0].generation_config
    assert (loaded.temperature, loaded.top_p) == (0.7, 0.8) and capsys.readouterr().out == ""
