"""CUDA graphs on a CPU, so that the code that records and replays them runs without a GPU.

    with emulated_cuda() as cuda:         # cuda counts captures, replays and streams
        rollout.generate(model, ...)      # a model on the CPU, decoded as a 16-bit model on a GPU: by replayed graphs

What is emulated, because code that is right in Python can be wrong there:
  - A capture computes nothing. Here its operators run, to find out shapes, and their effects are undone at the end.
  - A replay runs no Python: only the captured operators, on the captured addresses. Branches and numbers are frozen.
  - An address is no reference. If memory from outside a graph has been freed in between, its replay raises.
  - Temporaries lie in a pool that other graphs use too. They are overwritten after each replay: reading one gives NaN.
  - An operator that waits for the GPU's answer, such as .item(), cannot be captured and raises.
torch's flash operator gets a CPU kernel (naive_flash), so it is called under its own name with its own schema.
Left out on purpose: streams (everything runs in order), copies between devices (fake_cuda.py finds those).
"""

import contextlib
import weakref
from unittest import mock

import naive_flash
import torch
from fake_cuda import tensors_in, waits_for_gpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import rollout
from engine import cuda_graphs


def map_only(kind: type, function, tree):
    """The arguments of an operator with the function applied to all of that kind. As in pytree, and faster."""
    if isinstance(tree, (list, tuple)):
        return [map_only(kind, function, item) for item in tree]
    if isinstance(tree, dict):
        return {name: map_only(kind, function, item) for name, item in tree.items()}
    return function(tree) if isinstance(tree, kind) else tree


def storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Address:
    """Where a tensor from outside a graph lies, without a reference to its memory."""

    def __init__(self, tensor: torch.Tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.layout = tensor.dtype, (tensor.storage_offset(), tensor.size(), tensor.stride())

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a graph reads memory that was freed after its capture"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class EmulatedGraph:
    """Stands for torch.cuda.CUDAGraph. tape: operator, arguments and new results of each call that is replayed."""

    cuda: "EmulatedCUDA"
    pool = mock.Mock()

    def __init__(self):
        self.tape, self.temporaries, self.replays = [], [], 0
        self.cuda.live_graphs.add(self)

    def replay(self) -> None:
        self.replays += 1
        self.cuda.replays += 1
        for operator, arguments, results in self.tape:
            args, kwargs = map_only(Address, Address.tensor, arguments)
            again = operator(*args, **kwargs)
            for result, new in zip(results, tensors_in(again) if results else [], strict=True):
                assert (result.shape, result.dtype) == (new.shape, new.dtype), operator
                result.copy_(new)
        self.poison()

    def poison(self) -> None:
        for tensor in self.temporaries:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 99)


class Capture(TorchDispatchMode):
    """Stands for torch.cuda.graph: `with Capture(graph): ...` writes the graph's tape."""

    def __init__(self, graph: EmulatedGraph, pool=None):
        super().__init__()
        self.graph = graph
        self.made: dict[int, torch.Tensor] = {}  # by storage: what the captured code allocated
        self.before: dict[int, tuple] = {}  # by storage: what it wrote to, and a copy of what was there

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits_for_gpu(operator, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {operator}")
        inputs = {storage_id(tensor) for tensor in tensors_in((args, kwargs))}
        arguments = operator._schema.arguments
        by_name = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
        written = tensors_in([by_name.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write])
        for tensor in written:
            if storage_id(tensor) not in self.made | self.before:
                self.before[storage_id(tensor)] = tensor, tensor.untyped_storage().clone()
        results = operator(*args, **kwargs)
        new = [tensor for tensor in tensors_in(results) if storage_id(tensor) not in inputs]
        self.made |= {storage_id(tensor): tensor for tensor in new}
        if written or new:  # what is left are views, which are addresses, computed once
            assert not (written and new), operator
            self.graph.tape.append((operator, (args, kwargs), new))
        return results

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for tensor, before in self.before.values():
            tensor.untyped_storage().copy_(before)

        def address(tensor):  # without dimensions: a number in Python, such as the 1 of torch.where(mask, 1, x)
            return tensor if storage_id(tensor) in self.made or tensor.dim() == 0 else Address(tensor)

        tape, self.graph.temporaries = self.graph.tape, list(self.made.values())
        tape[:] = [(op, map_only(torch.Tensor, address, arguments), new) for op, arguments, new in tape]
        self.graph.cuda.captures += 1
        self.graph.poison()


class EmulatedCUDA:
    """What happened: numbers of captures, replays and streams, and the graphs that exist."""

    def __init__(self):
        self.captures = self.replays = self.streams = 0
        self.live_graphs = weakref.WeakSet()

    def stream(self, device):
        self.streams += 1
        return mock.Mock(spec=["wait_stream"])


@contextlib.contextmanager
def emulated_cuda():
    """Within, all models are decoded by (emulated) CUDA graphs. -> EmulatedCUDA"""
    cuda, current = EmulatedCUDA(), mock.Mock(spec=["wait_stream"])
    graphs = dict(CUDAGraph=type("CUDAGraph", (EmulatedGraph,), {"cuda": cuda}), graph=Capture)
    streams = dict(Stream=cuda.stream, current_stream=lambda: current, stream=lambda s: contextlib.nullcontext())
    cuda_graphs.side_stream.cache_clear()
    with (
        torch.library._scoped_library("aten", "IMPL") as kernels,
        mock.patch.multiple(torch.cuda, **graphs, **streams),
        mock.patch.object(rollout, "has_flash", lambda tensor: True),
    ):
        kernels.impl("_flash_attention_forward", naive_flash.flash_kernel, "CPU")
        yield cuda
    cuda_graphs.side_stream.cache_clear()
