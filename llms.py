"""The policy: loading it, feeding it mixtures of tokens, and the log-probs of what was sampled.

A hard token is a mixture of one. Everything the model reads is (draws, weights): K token ids per position and their
weights. Normal text is K = 1, weight 1, so one embedding function and one log-prob function serve both modes.

Left out on purpose: quantised training, pickled checkpoints. Code that comes with a model runs only if asked.
"""

import contextlib
import copy
import re
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from tokenizers import decoders, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from engine import distributed, lora, model_folder, probe
from engine.attention import Packed, forward_hidden
from engine.device import default_device
from engine.head import draw_logprobs
from engine.llama_forward import norm, round_rotations
from engine.probe import max_positions as max_positions  # which every script asks for beside the configuration
from engine.sampling import gumbel_logprobs

logging.disable_progress_bar()  # of loading weights: a line per model says nothing here

EMBEDDED = ("tiny", "tiny_student")  # base models that come with the repo (models/pretrain_tiny.py made them)
CONVERTED = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # `make smollm2` makes its folder; else the hub's


def load(
    model_name: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
):
    """(model, tokenizer) of a hub name, a local folder, a GGUF file, or an embedded model ("tiny", "tiny_student").

    device: default, engine.device.default_device(). dtype: default float32, which is what learns; a copy for
    sampling can be lower (make_actor). Raises ValueError, one line, when nothing can be loaded under that name, or when
    sampling and training would not be right for a model of its family (engine/probe.py).
    """
    device = device or default_device()
    load_config(model_name, trust_remote_code)  # what it refuses costs no loading of weights
    tokenizer = load_tokenizer(model_name, trust_remote_code)
    options = dict(trust_remote_code=trust_remote_code, dtype=dtype or torch.float32, use_safetensors=True)
    # A tensor of another shape or a missing one is reported below, by its name.
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    with _quiet():  # transformers prints a table of them
        model, loaded = _from_pretrained(AutoModelForCausalLM, model_name, **options)
    try:
        check_weights(loaded)
        turn_randomness_off(model)
        repair_generation_config(model)
        model = speed_up(model.to(device).eval())
        probe.check_model(model, embed_mixture, completion_logprobs)
    except ValueError as error:
        raise ValueError(f"cannot load model {model_name!r}: {error}") from error
    return model, tokenizer


def check_weights(loaded: dict) -> None:
    """Raises ValueError, one line, if weights and configuration do not belong together: transformers would put random
    numbers in the place of what does not fit. loaded: the loading info of transformers."""
    for name, in_file, by_config in sorted(loaded["mismatched_keys"])[:1]:
        shapes = [" x ".join(map(str, shape)) for shape in (in_file, by_config)]
        raise ValueError(f"{name} is {shapes[0]} in its weights, and {shapes[1]} by its config.json")
    if missing := sorted(loaded["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"its weights lack {missing[0]}{more}, which its config.json asks for")
    if unread := sorted(name for name in loaded["unexpected_keys"] if re.search(r"\b(layers|h|blocks)\.\d+\.", name)):
        raise ValueError(f"its weights have {unread[0]}, of which its config.json knows nothing")


def turn_randomness_off(model: PreTrainedModel) -> None:
    """With dropout or noise in the routing, the policy that learns would not be the one that sampled. Modules hold the
    rates under several names."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and re.search("dropout|layerdrop|jitter", name):
                setattr(module, name, 0.0)


def repair_generation_config(model: PreTrainedModel) -> None:
    """Drops sampling defaults that transformers refuses to write (a temperature without do_sample), and prints a line.

    Some published models have them, and no checkpoint of such a model could be saved. They are not used here.
    """
    own = model.generation_config
    try:
        own.validate(strict=True)
    except ValueError as error:
        ids = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**{k: v for k, v in ids.items() if isinstance(v, list) or v})
        if distributed.is_main_process():
            reason = " ".join(str(error).split())[:160]
            print(f"dropped the sampling defaults of the generation config, which could not be saved: {reason}...")


def speed_up(model: PreTrainedModel) -> PreTrainedModel:
    """On a GPU, puts faster operations into the model's modules. Returns the model."""
    if model.device.type == "cuda":
        fuse_norms(model)
        round_rotations(model)
    return model


def fuse_norms(model: PreTrainedModel) -> None:
    """Replaces the forward of every RMSNorm by one fused kernel; transformers' own launches six. Equal up to rounding.
    On a CPU it gains nothing."""
    for module in model.modules():
        if type(module).__name__ in ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm"):
            module.forward = types.MethodType(norm, module)


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile for the layers' MLPs, two thirds of the arithmetic. Attention has other shapes in every call."""
    for layer in model.base_model.layers:
        layer.mlp.compile(dynamic=True)


def load_config(model_name: str, trust_remote_code: bool = False):
    """The model's configuration alone, without its weights; of a folder, all files are looked at. Raises ValueError as
    `load` does, if the folder or the configuration alone shows that."""
    config = _from_pretrained(AutoConfig, model_name, trust_remote_code=trust_remote_code)
    try:
        probe.check_config(config)
    except ValueError as error:
        raise ValueError(f"cannot load model {model_name!r}: {error}") from error
    return config


def load_tokenizer(model_name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone. Raises ValueError as `load` does."""
    return _from_pretrained(AutoTokenizer, model_name, trust_remote_code=trust_remote_code)


def find_model(model_name: str) -> tuple[str | Path, bool]:
    """(a folder, a GGUF file or a hub name, whether it is here). Raises ValueError if a folder holds no model.

    The name of a model of this repo stands for a folder of that name only if there is a model in it: a run's folder may
    have the name.
    """
    local = Path(model_name).expanduser()
    if model_name in (*EMBEDDED, *CONVERTED) and not (local / "config.json").is_file():
        local = Path(__file__).resolve().parent / "models" / model_name
        if model_name in CONVERTED and not local.exists():
            return CONVERTED[model_name], False
    if local.exists() and model_name:
        if gguf := model_folder.gguf_file(local):
            return gguf, True
        model_folder.check(local)
        return local, True
    if local.is_absolute() or model_name.startswith(".") or local.suffix == ".gguf":
        raise ValueError("there is no such file" if local.suffix == ".gguf" else "there is no such folder")
    return model_name, False


def _from_pretrained(auto_class, model_name, **options):
    try:
        found, is_local = find_model(model_name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load model {model_name!r}: {error}") from error
    try:
        if is_local and found.is_file():
            return _from_gguf(auto_class, found, **options)
        return auto_class.from_pretrained(found, **options)
    except Exception as error:  # its libraries raise of every kind
        raise ValueError(f"cannot load model {model_name!r}: {_why_not(error, is_local)}") from error


def _from_gguf(auto_class, file: Path, **options):
    """What from_pretrained gives for a GGUF file, as if its weights, now plain numbers, had never been quantised. A
    tokenizer.json beside the file is taken in place of the file's own tokenizer."""
    if auto_class is AutoTokenizer:
        if (file.parent / "tokenizer.json").is_file():
            return AutoTokenizer.from_pretrained(file.parent, **options)
        kind, split, special_tokens = model_folder.gguf_tokenizer(file)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **options)
        for name, id in ({"bos_token": None} | special_tokens).items():  # transformers guesses them
            setattr(tokenizer, name, None if id is None else tokenizer.convert_ids_to_tokens(id))
        if kind == "gpt2":  # the decoder of other Llama tokenizers takes a space off every text
            tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
        if split == "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
        tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of decoded text
        return tokenizer
    loaded = auto_class.from_pretrained(file.parent, gguf_file=file.name, **options)
    if auto_class is AutoModelForCausalLM:
        model, _ = loaded
        del model.config.quantization_config, model.hf_quantizer, model.quantization_method
        model.is_quantized = False  # or it could not be saved
    return loaded


@contextlib.contextmanager
def _quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _why_not(error: Exception, is_local: bool) -> str:
    """What went wrong and what to do, in one line. Searches the chain of causes, because transformers wraps the hub's
    errors."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if is_local:
        return reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"
    if any(isinstance(e, GatedRepoError) for e in chain):
        return "it is gated: accept its licence on the hub, and set HF_TOKEN to a token of that account"
    names = f"a hub name, a local folder or GGUF file, or one of {', '.join((*EMBEDDED, *CONVERTED))}"
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return f"the hub knows no model of that name, or it is private (then set HF_TOKEN): give {names}"
    if any(isinstance(e, ConnectionError | LocalEntryNotFoundError) for e in chain):
        return "the hub cannot be reached and the model is not in its cache: a local folder works too (`make smollm2`)"
    return f"give {names} ({reason})"


def sampling_dtype() -> torch.dtype:
    """The precision of a model that only samples: bf16 on a GPU, else fp32."""
    return torch.bfloat16 if default_device().type == "cuda" else torch.float32


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: config, generation config and tokenizer often name different ones."""
    ids: set[int] = set()
    for named in (model.config.eos_token_id, model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids.update([] if named is None else [named] if isinstance(named, int) else named)
    return sorted(ids)


def make_actor(policy: PreTrainedModel, dtype: torch.dtype, always_copy: bool = False) -> PreTrainedModel:
    """The model that samples: the policy itself where the precision is the same, else a copy of it in `dtype`.

    bf16 has 8 bits of mantissa, so a step of 1e-6 leaves most bf16 weights where they are. The fp32 policy takes the
    steps, the bf16 actor follows (sync_actor) and samples at half the memory traffic.
    """
    if dtype == next(policy.parameters()).dtype and not always_copy:
        return policy
    # Parameters alone: rotary frequencies in bf16 would turn late positions wrong. No copy in fp32 ever exists.
    low = {id(p): torch.nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False) for p in policy.parameters()}
    return copy.deepcopy(policy, low).eval()


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Recomputes each layer's activations in the backward pass, in training mode."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def make_optimizer(policy: PreTrainedModel, learning_rate: float) -> torch.optim.AdamW:
    """AdamW without decay for what is not frozen, as one kernel; the second moment forgets within 100 steps, about the
    length of a run."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def make_reference(policy: PreTrainedModel, bf16: bool) -> PreTrainedModel:
    """A frozen copy of the policy, for the KL. With bf16, the matrices that autocast would cast at every use are held
    in bf16: a bit over half the memory, and the very same outputs, so the KL of equal models is exactly 0."""
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    if bf16:
        embeddings = reference.get_input_embeddings().weight  # read in fp32 by the policy, also where the head is tied
        for module in reference.modules():
            if isinstance(module, torch.nn.Linear) and module.weight is not embeddings:
                module.to(torch.bfloat16)
    return reference


@torch.no_grad()
def refresh_reference(reference: PreTrainedModel, policy: PreTrainedModel, mix: float) -> None:
    """reference = (1 - mix) reference + mix policy, in place; a mix of 1 replaces it."""
    for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
        old.copy_(torch.lerp(old.float(), distributed.full_tensor(new).float(), mix))


@torch.no_grad()
def sync_actor(actor: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Copies the policy's weights, with its adapters merged, into the actor's, in place. Collective if the policy is
    sharded."""
    if lora.is_adapted(policy):
        lora.merge_into(actor, policy)
    elif distributed.is_sharded(policy):
        for copied, parameter in zip(
            actor.parameters(), policy.parameters(), strict=True
        ):  # gathers one parameter at a time
            copied.copy_(distributed.full_tensor(parameter))
    elif actor is not policy:
        torch._foreach_copy_(list(actor.parameters()), list(policy.parameters()))


def embed_mixture(model: PreTrainedModel, draws: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The next inputs: sum_k weights_k E[draws_k]. draws, weights: (..., K) -> (..., H), in E's dtype."""
    embeddings = model.get_input_embeddings()(draws)  # (..., K, H)
    return (weights.unsqueeze(-1) * embeddings).sum(dim=-2).to(embeddings.dtype)  # summed in the weights' fp32


def completion_logprobs(model: PreTrainedModel, rollout, temperature: float = 1.0, rows=None) -> torch.Tensor:
    """Log-probs of a rollout's draws under `model`, differentiable: (B, T, K) float32, 0 where no draw was fed. Draws
    with Gumbel noise have log-densities, which take in how the mixture was weighted (engine/sampling.py).

    rollout: rollout.Rollout. temperature: the one it was sampled at. rows: which rows, in which order (default all);
    B is then their number.
    """
    rows = torch.arange(len(rollout.prompt_ids)) if rows is None else torch.as_tensor(rows)
    rows = rows.to(rollout.draws.device)
    hidden, row, position = completion_hidden(model, rollout, rows)  # (N, H), (N,), (N,)
    draws, weights, draw_mask = (x[rows][row, position] for x in (rollout.draws, rollout.weights, rollout.draw_mask))
    B, (_, T, K) = len(rows), rollout.draws.shape
    if rollout.gaps is None:
        logprobs = draw_logprobs(model, hidden, draws, temperature)  # (N, K)
    else:
        logprobs = draw_logprobs(model, hidden, draws, temperature, with_rest=True)  # (N, K + 1)
        logprobs = gumbel_logprobs(logprobs[:, :K], logprobs[:, K], rollout.gaps[rows][row, position])
    logprobs = logprobs * ((weights > 0) | draw_mask)
    return torch.zeros(B, T, K, device=hidden.device).index_put((row, position), logprobs)


def completion_hidden(model: PreTrainedModel, rollout, rows: torch.Tensor):
    """The hidden states that predict the completions' positions, for all `rows` in order.

    -> hidden (N, H), row (N,), position (N,): hidden[i] goes to the head to predict position[i] of rows[row[i]].
    What rows share, prompts and their common prefix, is computed once (attention.Packed).
    """
    device = rollout.draws.device
    mask = rollout.completion_mask[rows]  # (B, T)
    row, position = mask.nonzero(as_tuple=True)  # (N,) each: the completion's tokens, one by one
    lengths = mask.sum(dim=1)
    packed = Packed([rollout.prompt_ids[i] for i in rows.tolist()], lengths.tolist(), device)
    fed = position < lengths[row] - 1
    draws, weights = (x[rows[row[fed]], position[fed]] for x in (rollout.draws, rollout.weights))  # (N - B, K)
    # A prompt's token is a mixture of one. One call embeds all tokens, because the gradient of each call is as large as
    # the embedding matrix.
    prompts = F.pad(packed.prompt_tokens[:, None], (0, draws.shape[1] - 1))  # (prompt tokens, K)
    ones = F.pad(torch.ones_like(prompts[:, :1], dtype=weights.dtype), (0, draws.shape[1] - 1))
    inputs = embed_mixture(model, torch.cat([prompts, draws]), torch.cat([ones, weights]))
    hidden = forward_hidden(model, inputs[None], packed.positions, packed)[0]  # (tokens, H)
    return hidden[packed.logit_indices], row, position


def micro_batches(rollout, rows, token_budget: int) -> list[list[int]]:
    """Splits rows into batches of at most `token_budget` tokens, padding not counted (one row at least). Rows of one
    prompt stay together, and its tokens count once; a group over the budget is split."""
    lengths = rollout.lengths.tolist()
    batches: list[list[int]] = []
    tokens, last = 0, None
    for row in rows:
        prompt = rollout.prompt_ids[row]
        added = lengths[row] + (0 if prompt is last else len(prompt))
        if not batches or tokens + added > token_budget:
            batches.append([])
            tokens, added = 0, lengths[row] + len(prompt)
        batches[-1].append(row)
        tokens, last = tokens + added, prompt
    return batches
