"""Where the real Qwen2.5 tokenizer and the rows of GSM8K are, for the tests that need them. Without pytest, so that
scripts can use it too.

The environment variable TEST_DATA names a folder that holds qwen2.5-tokenizer/ and data/gsm8k/{train,test}.jsonl. If it
is not set, the tokenizer is looked for in the cache of the Hugging Face hub. Nothing is downloaded.
"""

import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

HUB_NAME = "Qwen/Qwen2.5-1.5B-Instruct"
NO_TOKENIZER = "no Qwen2.5 tokenizer: set TEST_DATA to a folder with qwen2.5-tokenizer/ and data/gsm8k/"
NO_GSM8K = "no GSM8K rows: set TEST_DATA to a folder with qwen2.5-tokenizer/ and data/gsm8k/"


def qwen_tokenizer() -> Path | None:
    """The folder of the tokenizer's files; None if it is not on this machine."""
    if "TEST_DATA" in os.environ:
        folder = Path(os.environ["TEST_DATA"], "qwen2.5-tokenizer")
        return folder.resolve() if folder.is_dir() else None
    files = [try_to_load_from_cache(HUB_NAME, name) for name in ("tokenizer.json", "tokenizer_config.json")]
    return Path(files[0]).parent if all(isinstance(file, str) for file in files) else None


def gsm8k() -> Path | None:
    """The folder with train.jsonl and test.jsonl; None if TEST_DATA names none."""
    folder = Path(os.environ.get("TEST_DATA", ""), "data", "gsm8k")
    return folder.resolve() if "TEST_DATA" in os.environ and folder.is_dir() else None
