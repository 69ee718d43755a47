"""What pytest sets up for every test file."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import browser
import pytest
from random_models import FAMILIES, ROOT, random_model
from transformers import AutoTokenizer


@pytest.fixture(params=FAMILIES)
def model(request):
    return random_model(request.param)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")


@pytest.fixture(scope="module")
def window():
    """A browser window that the tests of a module share; they are skipped if there is no browser."""
    if browser.MISSING:
        pytest.skip(browser.MISSING)
    with browser.Browser() as window:
        yield window
