"""Random models of the three families, and prompts for them. Without pytest, so that scripts can use it too."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, a process a core

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
# Ids that a random model draws often enough for rows to end at different lengths.
STOP_IDS = [2, 7, 9, 100, 101, 102, 103, 104, 105, 106]


def random_model(family="qwen2", seed=0, **overrides):
    """A small random model; weights three times the usual size, so that its distributions are far from uniform."""
    config_class, model_class = FAMILIES[family]
    settings = dict(
        vocab_size=512,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=64,
        max_position_embeddings=256,
        eos_token_id=STOP_IDS,
        bos_token_id=None,
        pad_token_id=None,  # its embedding would have no gradient
        tie_word_embeddings=False,  # tied, a random model repeats itself
    )
    torch.manual_seed(seed)
    model = model_class(config_class(**{**settings, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


PROMPTS = [
    "Mia has 12 eggs. Mia doubles them. How many eggs does Mia have?",
    "Tom",
    "a+b=c\n" * 5,
    "I guess. The answer is é😀",
]
