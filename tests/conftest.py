"""What pytest sets up for every test file."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
# Before torch is imported:
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, a process a core
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared bit for bit here is so on a CPU alone
os.environ["R1_DEVICE"] = "cpu"  # the same where Apple's GPU would be taken

import browser
import pytest
import real_data
from drawing import no_drawing
from random_models import FAMILIES, ROOT, random_model
from transformers import AutoTokenizer

# Started first, so that none of them is left over when the other processes are done. The rest in any order.
LONGEST = ["test_faults.py", "test_walkthrough.py", "test_distributed.py", "test_main.py", "test_rollout.py"]


@pytest.fixture(params=FAMILIES)
def model(request):
    return random_model(request.param)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")


@pytest.fixture(scope="session")
def qwen():
    """The real Qwen2.5 tokenizer."""
    folder = real_data.qwen_tokenizer()
    if folder is None:
        pytest.skip(real_data.NO_TOKENIZER)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def gsm8k():
    """The folder with the rows of GSM8K: train.jsonl and test.jsonl."""
    folder = real_data.gsm8k()
    if folder is None:
        pytest.skip(real_data.NO_GSM8K)
    return folder


def pytest_configure(config):
    config.addinivalue_line("markers", "pictures: runs in this file draw their pictures and write their report")


def pytest_collection_modifyitems(items):
    """Here and not by the order of pytest's arguments, which it leaves out of account for files within a folder that it
    is given too."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def no_pictures(request):
    """Runs draw nothing and write no report, which takes longer than a short run. Not in files that are marked
    `pictures`, nor within `drawing.drawing()`."""
    if request.node.get_closest_marker("pictures"):
        yield
    else:
        with no_drawing():
            yield


@pytest.fixture(scope="module")
def window():
    """A browser window that the tests of a module share; they are skipped if there is no browser."""
    if browser.MISSING:
        pytest.skip(browser.MISSING)
    with browser.Browser() as window:
        yield window
