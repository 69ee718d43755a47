"""What is wrong with a folder of a model, said in one line before anything is loaded.

The libraries would find the same faults later, in tracebacks that name no file: pointers of git-LFS in place of files,
cut downloads, adapters, pickled weights, a missing tokenizer. GGUF files are found here, and looked at only in part:
reading one is transformers' work.

Left out on purpose: names on the hub, whose files are whole when they are in its cache.
"""

import importlib.util
import json
from pathlib import Path

TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tokenizer_config.json",
)  # fmt: skip
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that is the only model in the folder `path`; None if it is another model.

    Raises ValueError, one line, if it cannot be used.
    """
    if path.is_file():
        found = [path] if path.suffix == ".gguf" else []
    else:
        found = [] if _weights(path) else sorted(path.glob("*.gguf"))
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"it holds {len(found)} GGUF files: give the path of one, for example {found[0]}")
    (file,) = found
    if _is_pointer(file):
        raise ValueError(_pointer(file.name))
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file.name} is damaged: it does not begin as a GGUF file does")
    if not importlib.util.find_spec("gguf"):
        raise ValueError("to read a GGUF file the package gguf is needed (pip install gguf)")
    return file


# How text is split before the merges of a byte-pair tokenizer apply: the rules that are followed for GGUF files. That
# of smollm, every digit by itself, is set by llms.load; transformers reads the others.
GGUF_SPLITS = ("default", "gpt-2", "qwen2", "smollm")


def gguf_tokenizer(file: Path) -> tuple[str | None, str | None, dict[str, int]]:
    """What the file says of its tokenizer: (its kind, its rule of splitting, {bos_token, eos_token, ...: id}). Without
    a bos_token if no text begins with it. Raises ValueError, one line, for a rule that is not followed: the model would
    read other tokens than it learned."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    prefix = "tokenizer.ggml."
    kind, split = (fields[prefix + name].contents() if prefix + name in fields else None for name in ("model", "pre"))
    if kind == "gpt2" and split not in (None, *GGUF_SPLITS):
        raise ValueError(
            f"{file.name} splits text by the rule {split!r}, which transformers does not read from it: put the "
            "tokenizer.json and tokenizer_config.json of the model beside it"
        )
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    ids = {token: fields.get(f"{prefix}{name}_token_id") for name, token in names.items()}
    if prefix + "add_bos_token" in fields and not fields[prefix + "add_bos_token"].contents():
        del ids["bos_token"]
    return kind, split, {token: int(field.contents()) for token, field in ids.items() if field}


def check(folder: Path) -> None:
    """Raises ValueError, one line, unless the folder has a configuration, a tokenizer and whole weights."""
    if folder.is_file():
        raise ValueError("it is a file: give the folder that it is in")
    files = {file.name for file in folder.iterdir() if file.is_file()}
    for name in sorted(files):
        if _is_pointer(folder / name):
            raise ValueError(_pointer(name))
    weights = _weights(folder)
    if "adapter_config.json" in files and not weights:
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"it holds an adapter of peft for {base!r}, not a model: merge the two first (merge_and_unload, then "
            "save_pretrained)"
        )
    if (folder / "adapter" / "adapter_config.json").is_file() and not weights:
        raise ValueError("it holds an adapter and no model: train with --save_merged, which saves both")
    if "config.json" not in files:
        if (folder / "checkpoints").is_dir():
            raise ValueError(
                f"it is the folder of a run: its models are in {folder / 'checkpoints'}, as latest or best"
            )
        raise ValueError("there is no config.json in it, so it is not the folder of a model")
    _read_json(folder / "config.json")
    if not weights:
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        if pickled:
            raise ValueError(
                f"its weights are pickled ({pickled[0]}), and loading such a file can run any code: save them as "
                "safetensors (save_pretrained)"
            )
        raise ValueError("there are no weights in it (model.safetensors)")
    for name in weights:
        _check_safetensors(folder / name)
    if not files & set(TOKENIZERS):
        raise ValueError(f"there is no tokenizer in it (one of {', '.join(TOKENIZERS[:3])})")


def _pointer(name: str) -> str:
    return f"{name} is a pointer of git-LFS, not the file itself: run `git lfs pull` in the folder"


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return content


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(40).startswith(b"version https://git-lfs")


def _weights(folder: Path) -> list[str]:
    """The names of the files with weights, those of the index if there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        named = _read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise ValueError(f"{index.name} has no weight_map")
        return sorted(set(named.values()))
    return [name for name in ("model.safetensors",) if (folder / name).is_file()]


def _check_safetensors(file: Path) -> None:
    """The format: 8 bytes with the length of a JSON header, the header with the place of each tensor, the tensors."""
    if not file.is_file():
        raise ValueError(f"{file.name} is missing, and the index names it")
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or 0 < size < 8 + length < 2**40:
            raise ValueError(f"{file.name} is cut: it has {size:,} bytes and ends in its header; load it again")
        try:
            header = json.loads(opened.read(min(length, size)))
            expected = 8 + length + max((x["data_offsets"][1] for k, x in header.items() if k != "__metadata__"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file.name} is damaged: it has no header of safetensors") from error
    if size < expected:
        raise ValueError(f"{file.name} is cut: it has {size:,} bytes of {expected:,}; load it again")
