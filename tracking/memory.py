"""How much memory a run of main.py will hold, computed before it starts: `main.py --doctor` prints the table.

Left out on purpose: FSDP, which divides weights, gradients and moments among the processes; memory that the allocator
cannot use because it is fragmented; torch's CUDA context, which is taken before the free memory is measured.
"""

import copy

import torch
from transformers import AutoModelForCausalLM

from engine import head, lora
from engine.llama_forward import round_rotations

# torch keeps one per pair of thread and stream that multiplies matrices, 32 MiB each on Hopper and 8 before: the main
# thread on its own stream, on the one that warms graphs up and on the one that records them, and the backward thread.
CUBLAS_WORKSPACES = 4 * 32 * 2**20


def memory_table(config, model_config, on_gpu: bool, judge_config=None) -> dict[str, float]:
    """Name -> size in bytes of everything that one process of a run holds, and the "peak".

    config: GRPOConfig; model_config: of the policy; judge_config: of the local model that judges, if one does. Names
    that begin with "rollout:" or "update:" are held in that phase only. The phases never overlap, so the peak is the
    permanent part plus the larger phase.

    On a GPU the policy is fp32 under bf16 autocast, the actor is a bf16 copy, and the cache of keys and values stays
    allocated between rollouts, in rows of a multiple of 256 tokens. So does the pool of the CUDA graphs, which share
    the temporaries of the largest. On a CPU policy and actor are one fp32 model, and each rollout allocates its own
    cache.
    """
    c, low = model_config, 2 if on_gpu else 4  # low: bytes of a number in the lower precision
    model = empty_model(c)
    N, matrices = num_parameters(model), sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    V, H = c.vocab_size, c.hidden_size
    wide = getattr(c, "intermediate_size", None) or 4 * H  # of the feed-forward block
    head_dim = getattr(c, "head_dim", None) or H // c.num_attention_heads
    kv_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * low  # per token
    rows = config.problems_per_step * config.group_size
    width = config.max_prompt_length + config.max_completion_length
    tokens = max(width, min(config.tokens_per_micro_batch, rows * width))
    per_token, per_layer = activation_bytes(c, on_gpu, config.lora_rank)
    rank = config.lora_rank
    # With LoRA: the numbers that learn, and the matrices that they are added to, which are held in 16 bits on a GPU.
    adapted = [m.weight for m in model.base_model.modules() if type(m) is torch.nn.Linear] if rank else []
    learning = sum(rank * sum(weight.shape) for weight in adapted) if rank else N
    in_low = sum(weight.numel() for weight in adapted)
    judge = num_parameters(empty_model(judge_config)) if judge_config else 0
    reference = 0  # none: with LoRA it is the policy without its adapters
    if config.beta > 0 and not rank:
        reference = 4 * N - 2 * (matrices - V * H * c.tie_word_embeddings) * on_gpu
    if config.gradient_checkpointing:  # the fp32 input of each layer, and all of the layer that is being recomputed
        per_token = c.num_hidden_layers * H * 4 + per_layer
    chunk = head.max_logits("cuda" if on_gpu else "cpu") // V
    positions = min(tokens, max(1, chunk))  # whose logits exist at the same time

    step_logits = rows * V * 3 * 4  # fp32 log-probs, probabilities and entropy terms of the tokens that are drawn
    prompts = min(rows, max(config.problems_per_step, config.eval_problems))  # that are read in one call

    cache = f"keys and values of {rows} rows"
    permanent = {
        "policy, fp32": 4 * (N - in_low),
        "the frozen matrices under the adapters": in_low * low,
        "adapters, fp32": 4 * learning if rank else 0,
        "gradients, fp32": 4 * learning,
        "Adam's two moments, fp32": 8 * learning,
        "actor, bf16": 2 * N if on_gpu else 0,
        "actor, fp32": 4 * N if rank and not on_gpu else 0,  # a copy with the merged weights
        "reference": reference,
        f"judge, {'bf16' if on_gpu else 'fp32'}": judge * low,
        cache: rows * -(-width // 256) * 256 * kv_bytes if on_gpu else 0,
        f"CUDA graphs of {rows} rows": step_logits + rows * (3 * wide + 4 * H) * low if on_gpu else 0,
        "cuBLAS workspaces": CUBLAS_WORKSPACES if on_gpu else 0,
    }
    rollout = {
        f"rollout: {cache}": 0 if on_gpu else rows * width * kv_bytes,
        "rollout: one step's logits": step_logits,  # on a GPU too: the first token is drawn outside the graphs
        # The widest moment of a layer: three tensors of the feed-forward block, and its input and residual.
        f"rollout: reading {prompts} prompts": prompts * config.max_prompt_length * (3 * wide + 4 * H) * low,
    }
    update = {
        "update: bf16 casts of the matrices": 2 * (matrices - in_low) if on_gpu else 0,
        f"update: activations of {tokens} tokens": tokens * per_token,
        # fp32 logits; on a GPU also their gradient in bf16
        "update: one chunk of the head": positions * V * (4 + low % 4),
        # its sum over chunks, and the newest chunk's
        "update: the embedding's newest gradient": 0 if rank else V * H * 2 * 4,
    }
    table = {name: size for name, size in (permanent | rollout | update).items() if size}
    return table | {"peak": sum(permanent.values()) + max(sum(rollout.values()), sum(update.values()))}


def empty_model(model_config):
    """The model without its numbers, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


def num_parameters(model) -> int:
    """Tied weights count once."""
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def activation_bytes(model_config, autocast: bool, lora_rank: int = 0) -> tuple[float, float]:
    """Bytes per token that autograd keeps for the backward pass: (all layers, one layer). lora_rank: of adapters, or 0.

    Measured: models of one and of two layers, otherwise as configured, process 32 and 64 tokens on the CPU, and the
    tensors that they save are counted. Differences between these four cancel what does not grow with the tokens
    (weights) or with the layers.
    """

    def saved_bytes(num_layers, num_tokens):
        small = copy.deepcopy(model_config)
        small.num_hidden_layers, small.vocab_size, small.pad_token_id = num_layers, 8, None
        if getattr(small, "layer_types", None):
            small.layer_types = (small.layer_types * 2)[:num_layers]  # the model may have a single layer
        model = AutoModelForCausalLM.from_config(small)
        if autocast:  # on a GPU the norm is one kernel that saves only its input
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.forward = lambda hidden, weight=module.weight: FusedNorm.apply(hidden, weight)
            round_rotations(model)
        if lora_rank:
            lora.add_adapters(model, lora_rank, lora_rank, bf16=autocast)
        storages = {}

        def pack(tensor):
            # The storage itself is kept too: if it were freed, another tensor could get the same address.
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        inputs = torch.randn(1, num_tokens, small.hidden_size)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model.base_model(inputs_embeds=inputs, use_cache=False)
        return sum(storage.nbytes() for storage in storages.values())

    class FusedNorm(torch.autograd.Function):
        @staticmethod
        def forward(context, hidden, weight):
            context.save_for_backward(hidden)
            return (hidden * weight).to(head.product_dtype(hidden))

    one, two = ((saved_bytes(layers, 64) - saved_bytes(layers, 32)) / 32 for layers in (1, 2))
    return one + (model_config.num_hidden_layers - 1) * (two - one), two - one
