"""The shipped base models are what pretrain_tiny.py says: its tokenizer, and a base that can sometimes do the task."""

import random

import pytest
from random_models import ROOT

import evaluator
import llms
from models import pretrain_tiny
from rldatasets import load_problems


def test_the_shipped_tokenizers_are_the_recipes(tmp_path):
    pretrain_tiny.train_tokenizer(random.Random(0)).save_pretrained(tmp_path)
    for name in ("tiny", "tiny_student"):
        assert (ROOT / "models" / name / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "name, parameters, accuracy, format_rate",
    [("tiny", 854_144, (0.15, 0.25), (0.40, 0.60)), ("tiny_student", 230_464, (0.10, 0.25), (0.30, 0.60))],
)
def test_the_bases_leave_something_to_learn(name, parameters, accuracy, format_rate):
    model, tokenizer = llms.load(name)
    assert model.num_parameters() == parameters
    problems = load_problems("arithmetic", "test", 1024)
    result = evaluator.evaluate(model, tokenizer, problems, temperature=1.0, max_new_tokens=72)
    assert accuracy[0] < result["accuracy"] < accuracy[1]
    assert format_rate[0] < result["format_rate"] < format_rate[1]
