"""LoRA: the policy learns low-rank adapters, W + (alpha / rank) B A, and its own weights stay as they were.

Three models become one and a copy (Hu et al. 2021, arXiv 2106.09685; through the optional package peft):

    policy      the base, frozen, with adapters on every linear layer of its blocks; only A and B (fp32) have gradients
                and Adam's moments. On a GPU the frozen matrices are held in bf16, as autocast would cast them anyway
    actor       an ordinary model that samples, with the merged weights (`merge_into`), so sampling costs nothing more
    reference   of the KL: the policy with its adapters off (`adapters_off`), so there is no third model

B starts at 0, so the policy starts as the base. A checkpoint holds the adapter in peft's format, in adapter/, and with
--save_merged the merged model, which opens as any other.

Left out on purpose: adapters on embeddings and head (often tied, and most of a small model's weights), quantised bases,
FSDP.
"""

import contextlib
import copy
import functools
import importlib.util
from pathlib import Path

import torch
from transformers import PreTrainedModel

ADAPTER = "adapter"  # its folder in a checkpoint


def check_peft() -> None:
    """Raises ValueError, one line, if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("--lora_rank: the package peft is not here (pip install peft)")


def add_adapters(
    policy: PreTrainedModel, rank: int, alpha: float, *, bf16: bool = False, save_merged: bool = False, seed: int = 0
) -> None:
    """Puts adapters into the policy, in place; its own weights are frozen. A is drawn from `seed`, B is 0.

    bf16: hold the matrices that get adapters in bf16. save_merged: whether policy.save_pretrained also saves the
    merged model. Raises ValueError, one line, without peft or for a model without linear layers.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, module in policy.base_model.named_modules() if type(module) is torch.nn.Linear]
    if not names:
        raise ValueError(
            f"--lora_rank: {policy.config.model_type} models have no linear layers that can get an adapter"
        )
    if bf16:
        for name in names:
            policy.base_model.get_submodule(name).to(torch.bfloat16)
    prefix = f"{policy.base_model_prefix}." if policy.base_model is not policy else ""
    targets = [prefix + name for name in names]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    policy.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, policy)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    policy.adapter_config = config
    policy.save_pretrained = functools.partial(save_adapter, policy, merged=save_merged)


def is_adapted(model: PreTrainedModel) -> bool:
    return hasattr(model, "adapter_config")


def adapted_layers(policy: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """{name: layer} of the linear layers with an adapter; the names are those of the base."""
    return {name: module for name, module in policy.named_modules() if hasattr(module, "lora_A")}


@contextlib.contextmanager
def adapters_off(model: PreTrainedModel):
    """Within it, an adapted model computes what its base does. Other models are left as they are."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters() would also switch requires_grad
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merged_weight(layer) -> torch.Tensor:
    """W + scaling B A of a layer with an adapter, in fp32. (out, in)"""
    (name,) = layer.lora_A
    delta = layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
    return layer.base_layer.weight.float() + delta


@torch.no_grad()
def merge_into(actor: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Copies the policy's merged weights into the actor's, in place. actor: a copy of the base."""
    for name, layer in adapted_layers(policy).items():
        actor.get_submodule(name).weight.copy_(merged_weight(layer))


def adapter_state(policy: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A and B of all layers, under the names that peft gives them in a file."""
    states = {name: p.detach() for name, p in policy.named_parameters() if "lora_" in name}
    return {f"base_model.model.{name.replace('.default.', '.')}": p.contiguous() for name, p in states.items()}


def save_adapter(policy: PreTrainedModel, folder, state_dict=None, merged: bool = False) -> None:
    """Writes folder/adapter, which peft's PeftModel.from_pretrained(base, folder/adapter) opens; with `merged` also the
    merged model into the folder itself."""
    from safetensors.torch import save_file

    adapter = Path(folder) / ADAPTER
    adapter.mkdir(parents=True, exist_ok=True)
    config = copy.copy(policy.adapter_config)
    config.base_model_name_or_path, config.inference_mode = policy.config._name_or_path, True
    config.save_pretrained(adapter)
    save_file({name: p.cpu() for name, p in adapter_state(policy).items()}, adapter / "adapter_model.safetensors")
    if merged:  # under the names of the base; named_parameters has tied weights once
        base = {name: p for name, p in policy.named_parameters() if "lora_" not in name}
        weights = {name.replace(".base_layer.", "."): p.detach().float() for name, p in base.items()}
        weights |= {f"{name}.weight": merged_weight(layer) for name, layer in adapted_layers(policy).items()}
        type(policy).save_pretrained(policy, folder, state_dict=weights)


def load_adapter(policy: PreTrainedModel, checkpoint: Path) -> None:
    """Reads checkpoint/adapter into an adapted policy. Raises ValueError, one line, if it is another one's."""
    from safetensors.torch import load_file

    file = Path(checkpoint) / ADAPTER / "adapter_model.safetensors"
    own, saved = adapter_state(policy), load_file(file)
    wrong = [name for name, p in own.items() if name not in saved or saved[name].shape != p.shape]
    if wrong or len(saved) != len(own):
        raise ValueError(f"{file} does not fit --lora_rank and the model: {(wrong or sorted(saved))[0]}")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(saved[name])
