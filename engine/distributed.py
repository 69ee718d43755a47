"""Several processes, one GPU each: everything that they say to each other. With one process, nothing is said.

Every process holds the model and takes whole groups of a step's problems. They agree on four things: rewards (an
advantage can depend on all of them), totals (so that the loss is an average over the whole step), the sum of the
gradients, and whether somebody was asked to stop. So the weights stay the same everywhere without being sent.

    torchrun --nproc_per_node 4 main.py --preset qwen2.5-1.5b
    accelerate launch --num_processes 4 main.py --preset qwen2.5-1.5b --fsdp

Gradients are summed once an optimizer step, after all of its micro-batches, so processes may have different numbers of
micro-batches, or none. With --fsdp (FSDP2) the fp32 weights, gradients and Adam's moments are divided among the
processes: every layer is gathered when it is used, and a process without a micro-batch has to join with an empty one.

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


def init_distributed() -> None:
    """Joins the processes that torchrun or accelerate launched together with this one, if there are any. From then on
    only the main one prints to stdout."""
    # The others wait at their next word while the main process writes or measures.
    patience = {"timeout": datetime.timedelta(hours=2)} if "RANK" in os.environ else {}
    PartialState(cpu=not torch.cuda.is_available(), **patience)
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
    """Which of a step's problems this process takes: an equal part of every minibatch, so that an optimizer step sees
    the same problems with any number of processes."""
    share = num_problems // minibatches
    part = share // world_size()
    return [start + rank() * part + i for start in range(0, num_problems, share) for i in range(part)]


def shard_range(number: int) -> list[int]:
    """Which of so many things this process takes: those side by side, perhaps none."""
    size = -(-number // world_size())
    return list(range(number))[rank() * size :][:size]


def all_gather(items: list) -> list:
    """The items of all processes, those of the first one first."""
    if world_size() == 1:
        return items
    lists: list = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def all_reduce_sum(numbers: dict[str, float]) -> dict[str, float]:
    """The same names in every process -> each number summed over the processes."""
    rows = all_gather([numbers])
    return {name: sum(row[name] for row in rows) for name in numbers}


def all_reduce_max(number: int) -> int:
    return max(all_gather([number]))


def barrier() -> None:
    """Until all processes are here: when one ends with an error, torchrun ends the others."""
    all_gather([])


def run_on_main(function, *arguments):
    """Calls the function in the main process alone. Its result, or the ValueError it raised, in all of them."""
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


def sum_and_clip_gradients(model, max_norm: float) -> float:
    """Every parameter's gradient becomes the sum over the processes, and all together are clipped to the norm. Returns
    the norm before that. A sharded model has summed by itself."""
    if world_size() > 1 and not is_sharded(model):
        for parameter in model.parameters():
            if parameter.grad is None:  # no micro-batch here
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
    return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)).item()


# ---------------------------------------------------------------- FSDP2


def shard_model(model, score) -> None:
    """Divides the model's weights among the processes. `score`: the function that will be called with the model, see
    `scorer`."""
    for layer in model.base_model.layers:
        fully_shard(layer)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the totals of all processes already
            module.set_force_sum_reduction_for_comms(True)
    model.score = types.MethodType(score, model)
    register_fsdp_forward_method(model, "score")


def bind_forward(model, score):
    """score(model, ...) as a function of the rest. A sharded model has it as a method, which gathers the weights."""
    return model.score if is_sharded(model) else functools.partial(score, model)


def check_fsdp_world_size(fsdp: bool) -> None:
    if fsdp and world_size() == 1:
        raise ValueError("--fsdp: there is nothing to divide for one process; launch several, with torchrun")


def is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the parts of all processes: each of them has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensor_on_main(tensor: torch.Tensor) -> torch.Tensor | None:
    """`whole`, on the CPU of the main process; None in the others, which have to ask too. One is whole at a time."""
    if not isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if is_main_process() else None


def gather_state_dict(model) -> dict[str, torch.Tensor] | None:
    """The parameters of a sharded model by name, tied ones once, for the main process; None for a model that has its
    own at hand."""
    return (
        {name: full_tensor_on_main(p.detach()) for name, p in model.named_parameters()} if is_sharded(model) else None
    )


def gather_optimizer_state(optimizer) -> dict:
    """optimizer.state_dict() as if nothing were divided, for the main process."""
    state = optimizer.state_dict()
    moments = {i: {name: full_tensor_on_main(t) for name, t in s.items()} for i, s in state["state"].items()}
    return state | {"state": moments}


def load_optimizer_state(optimizer, state: dict) -> None:
    """The reverse, into an optimizer whose parameters may be divided, among any number of processes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        p = parameters[i]
        if isinstance(p, DTensor):
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = distribute_tensor(moments[name].to(p.device), p.device_mesh, p.placements)
    optimizer.load_state_dict(state)
