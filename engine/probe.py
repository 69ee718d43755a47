"""The probe: do sampling and training compute what the model itself computes?

Both use a model's layers, but attention, cache, positions, embedding and head are this project's own (engine/), and no
family has to fit them. So every model that is loaded reads a few dozen tokens in three ways: by its own forward, by the
sampling path (prefill, then steps through the cache) and by the training path. A model whose log-probs differ by more
than rounding is refused.

Left out on purpose: the CUDA graphs of sampling, which record the same step.
"""

import types

import torch

from engine.attention import Packed, UnsupportedModel, check_attention, has_flash
from engine.head import head_logits
from engine.kv_cache import DenseKVCache, FlatKVCache
from engine.llama_forward import sampling_forward

NUM_TOKENS, NUM_STEPS = 32, 4  # of the longer of two texts, and how many of them each continues its prompt by
LONGEST = 1024  # the most tokens that are read to get past a window
# In fp32 no log-prob may differ by more than this, in nats. In 16 bits the rounding of a log-prob grows with the
# logits, so the mean difference is compared with the standard deviation of the log-probs.
TOLERANCE, RELATIVE_IN_16_BITS = 1e-3, 0.05
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
WINDOWS = ("sliding_window", "window_size", "attention_window", "attention_window_size", "attention_chunk_size")


def check_config(config) -> None:
    """Raises ValueError, one line, for what a model's configuration alone shows to be impossible here."""
    if getattr(config, "quantization_config", None):
        settings = config.quantization_config
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        method = settings.get("quant_method") or "bitsandbytes"
        raise ValueError(f"its weights are quantised ({method}), and such weights cannot learn: use the original model")
    if config.is_encoder_decoder:
        raise UnsupportedModel(config, "they have an encoder")
    inner = [name for name in ("text_config", "decoder", "generator") if getattr(config, name, None) is not None]
    if inner:
        reason = f"they wrap a text model ({inner[0]}) together with others; save its text model as a folder of its own"
        raise UnsupportedModel(config, reason)
    others = set(getattr(config, "layer_types", None) or []) - ATTENTION
    if others:
        raise UnsupportedModel(config, f"they have layers without attention ({', '.join(sorted(others))})")
    if not getattr(config, "max_position_embeddings", None):
        raise UnsupportedModel(config, "their configuration has no max_position_embeddings (ALiBi, or no attention)")


def max_positions(config) -> int:
    """How many tokens the model can read with attention over all earlier tokens and positions of one kind: to the
    narrowest window, or to where the rotary frequencies change. Raises ValueError as `check_config`."""
    check_config(config)
    kinds = getattr(config, "layer_types", None)
    limits = [config.max_position_embeddings]
    if "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None))
    if "chunked_attention" in (kinds or []):
        limits.append(config.attention_chunk_size)
    rotary = getattr(config, "rope_parameters", None) or {}
    for rope in (rotary, *rotary.values()):
        if isinstance(rope, dict) and rope.get("rope_type") in ("longrope", "dynamic"):
            limits.append(rope.get("original_max_position_embeddings"))
    return min(limit for limit in limits if limit)


@torch.no_grad()
def check_model(model, embed_mixture, completion_logprobs) -> None:
    """Raises ValueError, one line, if sampling or training would compute something else than the model's own forward.

    embed_mixture, completion_logprobs: those of llms.py.
    """
    config, attention = model.config, model.config._attn_implementation
    check_config(config)
    check_attention(model)
    try:
        with torch.random.fork_rng(devices=[]):
            own, paths = _measure(model, embed_mixture, completion_logprobs)
    except (UnsupportedModel, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a family's layers raise when they are called in another way
        line = next(iter(str(error).splitlines()), "")
        raise UnsupportedModel(config, f"{type(error).__name__} in a forward pass ({line})") from error
    finally:
        config._attn_implementation = attention
        model.eval()
    if not own.isfinite().all():
        raise ValueError(f"the log-probs of this {config.model_type} model are not finite: its weights are damaged")
    dtype = next(model.parameters()).dtype
    for path, logprobs in paths.items():
        gaps = (logprobs - own).abs()
        exact = dtype.itemsize >= 4
        gap = (gaps.max() if exact else gaps.mean()).item()
        if not gap <= (TOLERANCE if exact else max(0.01, RELATIVE_IN_16_BITS * own.std().item())):
            raise UnsupportedModel(config, f"log-probs of {path} differ from the model's own by {gap:.2g} nats")


def _measure(model, embed_mixture, completion_logprobs):
    """Log-probs (2, NUM_STEPS, 3) of the next token, of the likeliest and of a random one at each position of two texts
    of different length -> by the model's own forward, and by path."""
    limit, vocab_size, device = max_positions(model.config), model.config.vocab_size, model.device
    crossed = [w + 16 for name in WINDOWS if isinstance(w := getattr(model.config, name, None), int) and 0 < w < limit]
    length = max([min(NUM_TOKENS, limit), *(n for n in crossed if n <= min(LONGEST, limit))])
    steps = max(1, min(NUM_STEPS, length // 2))
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(vocab_size, (2, length), generator=generator)
    starts = [length - steps, max(1, (length - steps) // 2)]
    prompts = [text[:start] for text, start in zip(texts, starts, strict=True)]
    rows = zip(texts, starts, strict=True)
    completions = torch.stack([text[start : start + steps] for text, start in rows]).to(device)  # (2, S)
    unlikely = torch.randint(vocab_size, completions.shape, generator=generator).to(device)

    model.config._attn_implementation = "eager"  # the only one that every family computes in full
    own = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.cat([prompt.to(device), completion])[None]
        logits = model(ids, use_cache=False).logits[0, -steps - 1 : -1]
        own.append(logits.float().log_softmax(dim=-1))  # (S, V)
    own = torch.stack(own)
    draws = torch.stack([completions, own.argmax(dim=-1), unlikely], dim=-1)  # (2, S, 3)
    sampled = _sampling_path(model, embed_mixture, prompts, completions)
    model.train()  # as an update does: what is dropped there would show
    rollout = types.SimpleNamespace(
        prompt_ids=prompts,
        draws=draws,
        weights=torch.eye(3, device=device)[0].expand(draws.shape),
        draw_mask=torch.ones_like(draws, dtype=torch.bool),
        completion_mask=torch.ones_like(completions, dtype=torch.bool),
        gaps=None,
    )
    paths = {"sampling": sampled.gather(-1, draws), "the training pass": completion_logprobs(model, rollout)}
    return own.gather(-1, draws), paths


def _sampling_path(model, embed_mixture, prompts, completions) -> torch.Tensor:
    """What rollout.Decoder does, with given tokens in place of drawn ones. -> log-probs (2, S, V)"""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    rows, steps = torch.arange(len(prompts), device=model.device), completions.shape[1]
    packed, forward = Packed(prompts, [1] * len(prompts), model.device), sampling_forward(model)
    parameter = next(model.parameters())
    if has_flash(parameter):
        cache = FlatKVCache(model.config, len(rows), int(lengths.max()) + steps, model.device, parameter.dtype)
        cache.prepare_prefill(packed, 1)
    else:
        cache = DenseKVCache(packed, 1, steps)

    def embed(ids):
        return embed_mixture(model, ids[..., None], torch.ones_like(ids[..., None]))

    hidden = forward(embed(packed.prompt_tokens)[None], packed.positions, cache)[0]
    logits = [head_logits(model, hidden[packed.logit_indices])]  # (2, V) each
    for t in range(1, steps):
        position = lengths + t - 1
        cache.prepare_decode(rows, position, torch.zeros_like(rows, dtype=torch.bool))
        hidden = forward(embed(completions[:, t - 1])[:, None], position[:, None], cache)
        logits.append(head_logits(model, hidden[:, 0]))
    return torch.stack(logits, dim=1).log_softmax(dim=-1)
