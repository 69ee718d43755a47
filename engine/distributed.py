"""Data parallelism: all communication between several processes with one GPU each. With one process nothing is sent.

Every process holds the model and takes whole groups of a step's problems. The processes exchange four things: rewards
(an advantage can depend on all of them), totals (the loss is an average over the whole step), gradients, and signals to
stop. So the weights stay equal everywhere without being sent.

    torchrun --nproc_per_node 4 main.py --preset qwen2.5-1.5b
    accelerate launch --num_processes 4 main.py --preset qwen2.5-1.5b --fsdp

Gradients are summed once per optimizer step, after all of its micro-batches, so processes may have different numbers of
micro-batches, or none. With --fsdp (FSDP2) the fp32 weights, gradients and Adam's moments are sharded: every layer is
gathered when it is used, so a process without a micro-batch runs an empty one.

Collective functions, which every rank must call, say so.

Left out on purpose: tensor and pipeline parallelism, sampling on other GPUs than training, overlap of the sum with the
backward pass (a step sends the gradient once, which takes a few hundredths of its time).
"""

import atexit
import datetime
import functools
import os
import sys
import types

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.device import default_device

BUCKET = 2**23  # numbers that are sent together


def init_distributed() -> None:
    """Initialises the process group that torchrun or accelerate launched, if there is one. Only the main process prints
    to stdout afterwards."""
    # The other processes wait in their next collective while the main one writes or measures.
    timeout = {"timeout": datetime.timedelta(hours=2)} if "RANK" in os.environ else {}
    PartialState(cpu=default_device().type != "cuda", **timeout)
    if dist.is_initialized():
        atexit.register(dist.destroy_process_group)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is the process that writes files and messages."""
    return rank() == 0


def shard_indices(num_problems: int, minibatches: int) -> list[int]:
    """Indices of the problems that this rank takes: an equal shard of every minibatch. So an optimizer step has the
    same problems with any number of processes."""
    per_minibatch = num_problems // minibatches
    shard = per_minibatch // world_size()
    return [start + rank() * shard + i for start in range(0, num_problems, per_minibatch) for i in range(shard)]


def shard_range(number: int) -> list[int]:
    """Indices below `number` that this rank takes: a contiguous shard, perhaps empty."""
    size = -(-number // world_size())
    return list(range(number))[rank() * size :][:size]


def all_gather(items: list) -> list:
    """Collective. The items of all ranks, in the order of the ranks."""
    if world_size() == 1:
        return items
    lists: list = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def all_reduce_sum(numbers: dict[str, float]) -> dict[str, float]:
    """Collective. Each number summed over the ranks; every rank has the same names."""
    rows = all_gather([numbers])
    return {name: sum(row[name] for row in rows) for name in numbers}


def all_reduce_max(number: int) -> int:
    """Collective."""
    return max(all_gather([number]))


def barrier() -> None:
    """Collective. Waits for all ranks. If one ends with an error, torchrun ends the others."""
    all_gather([])


def run_on_main(function, *arguments):
    """Collective. Calls the function on the main process. All ranks get its result, or raise its ValueError."""
    outcome = None
    if is_main_process():
        try:
            outcome = function(*arguments)
        except ValueError as error:
            outcome = error
    outcome = all_gather([outcome])[0]
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


def run_on_all(function, *arguments):
    """Collective. Every rank's own function(*arguments). If it raises a ValueError on some, all raise the first one, so
    that none waits for another that has ended."""
    outcome, own_error = None, None
    try:
        outcome = function(*arguments)
    except ValueError as error:
        own_error = error
    for error in all_gather([own_error]):
        if error is not None:
            raise error
    return outcome


def sum_and_clip_gradients(model, max_norm: float) -> float:
    """Collective. Sums every gradient over the ranks, then clips all of them to the norm. Returns the norm before
    clipping. FSDP has summed the gradients of a sharded model already."""
    if world_size() > 1 and not is_sharded(model):
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in learning:
            if parameter.grad is None:  # no micro-batch here
                parameter.grad = torch.zeros_like(parameter)
        for gradients in buckets([parameter.grad for parameter in learning]):
            all_reduce_together(gradients)
    return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)).item()


def buckets(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors in order, as many together as have at most BUCKET numbers, or a larger one alone."""
    parts: list[list[torch.Tensor]] = []
    space = 0
    for tensor in tensors:
        if not parts or tensor.numel() > space:
            parts.append([])
            space = BUCKET
        parts[-1].append(tensor)
        space -= tensor.numel()
    return parts


def all_reduce_together(tensors: list[torch.Tensor]) -> None:
    """Collective. Sums each tensor over the ranks, in place and in one message: with gloo every message costs
    milliseconds, however small it is."""
    if len(tensors) == 1:
        return dist.all_reduce(tensors[0])
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    parts = together.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


# ---------------------------------------------------------------- FSDP2


def shard_model(model, forward) -> None:
    """Collective. Shards the model's weights. forward(model, ...): the function that will be called with the model
    through `bind_forward`; FSDP gathers the weights around it."""
    for layer in model.base_model.layers:
        fully_shard(layer)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the totals of all processes already
            module.set_force_sum_reduction_for_comms(True)
    model.bound_forward = types.MethodType(forward, model)
    register_fsdp_forward_method(model, "bound_forward")


def bind_forward(model, forward):
    """forward(model, ...) as a function of the other arguments. For a sharded model, the method of `shard_model`."""
    return model.bound_forward if is_sharded(model) else functools.partial(forward, model)


def check_fsdp_world_size(fsdp: bool) -> None:
    if fsdp and world_size() == 1:
        raise ValueError("--fsdp: one process has nothing to shard; launch several, with torchrun")


def is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Collective. The unsharded tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensor_on_main(tensor: torch.Tensor) -> torch.Tensor | None:
    """Collective. The unsharded tensor on the CPU of the main process; None on other ranks."""
    if not isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if is_main_process() else None


def gather_state_dict(model) -> dict[str, torch.Tensor] | None:
    """Collective. The parameters of a sharded model by name, tied ones once, on the main process. Gathers one parameter
    at a time. None for a model that is not sharded."""
    if not is_sharded(model):
        return None
    return {name: full_tensor_on_main(p.detach()) for name, p in model.named_parameters()}


def gather_optimizer_state(optimizer) -> dict:
    """Collective. optimizer.state_dict() with unsharded tensors, on the main process."""
    state = optimizer.state_dict()
    moments = {i: {name: full_tensor_on_main(t) for name, t in s.items()} for i, s in state["state"].items()}
    return state | {"state": moments}


def load_optimizer_state(optimizer, state: dict) -> None:
    """Loads a state of `gather_optimizer_state` into an optimizer whose parameters may be sharded over any number of
    ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        p = parameters[i]
        if isinstance(p, DTensor):
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = distribute_tensor(moments[name].to(p.device), p.device_mesh, p.placements)
    optimizer.load_state_dict(state)
