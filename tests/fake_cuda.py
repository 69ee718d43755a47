"""Tensors on a GPU that does not exist: shapes, types and devices of a real one, and no values.

    with fake_cuda() as cuda:
        model = cuda.place(Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16))
        decoder_for(model, ...)     # warm-up and capture at the real shapes of a real model, in no memory
    assert cuda.flash_calls > 0

Whatever is captured raises RuntimeError where a GPU would wait for an answer, or copy from or to the CPU; torch's
FakeTensorMode raises for shapes that do not fit and for operands on different devices. Operators that depend on values
raise outside captures too.
Left out on purpose: values. Indices out of bounds are what cuda_graph_emulator.py finds.
"""

import contextlib
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import cuda_graphs

aten = torch.ops.aten

# Operators that wait for the GPU: their result, or its shape, depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}


def waits_for_gpu(operator, args) -> bool:
    """Whether a GPU has to answer before the operator returns."""
    name = operator._schema.name.removeprefix("aten::")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # a bool mask is turned into indices
        one_value = name != "index" and args[2].numel() == 1  # without indices: the mask is filled with it
        return not one_value and any(i is not None and i.dtype == torch.bool for i in args[1])
    return name in WAITING or operator is torch.ops.aten.repeat_interleave.Tensor


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class FakeCapture(TorchDispatchMode):
    """Stands for torch.cuda.graph: refuses what cannot be captured."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __enter__(self):
        self.cuda.captures += 1
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if waits_for_gpu(operator, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {operator}")
        if operator is aten._flash_attention_forward.default:
            self.cuda.flash_calls += 1
            check_flash(*args, **kwargs)
        results = operator(*args, **(kwargs or {}))
        # Numbers without dimensions are passed to a kernel by value.
        devices = {t.device.type for t in tensors_in((args, kwargs, results)) if t.dim() > 0}
        if len(devices) > 1 or devices == {"cpu"}:
            raise RuntimeError(f"a captured step works on {sorted(devices)}: {operator}")
        return results


def check_flash(query, key, value, query_starts, key_starts, max_q, max_k, *rest, scale, seqused_k):
    """What the kernel asks of its arguments, in decode form."""
    n = len(query)
    assert query.dtype == key.dtype == value.dtype in (torch.bfloat16, torch.float16)
    assert all(t.is_cuda and t.dim() == 3 and t.stride(-1) == 1 for t in (query, key, value))
    assert key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    assert query.shape[2] == key.shape[2] and key.shape[2] % 8 == 0 and key.shape[2] <= 256
    for lengths, count in ((query_starts, n + 1), (key_starts, n + 1), (seqused_k, n)):
        assert lengths.dtype == torch.int32 and lengths.is_contiguous() and lengths.shape == (count,)


class Bindings(TorchFunctionMode):
    """The few methods of a tensor that set the current device before they call an operator, which needs a build of
    torch for CUDA, by their operators alone: x[...], x[...] = value and those in `METHODS`."""

    T = torch.Tensor
    METHODS = {T.__invert__: aten.bitwise_not, T.copy_: aten.copy_, T.nonzero: aten.nonzero}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            view, indices = self.view(*args)
            return aten.index(view, indices) if indices else view
        if function is torch.Tensor.__setitem__:
            tensor, index, value = args
            view, indices = self.view(tensor, index)
            if not isinstance(value, torch.Tensor):
                value = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
            return aten.index_put_(view, indices, value) if indices else aten.copy_(view, value)
        return self.METHODS.get(function, function)(*args, **(kwargs or {}))

    def view(self, tensor, index):
        """The numbers and slices of an index applied to the tensor, and what is left: tensors, None for whole
        dimensions, or an empty list."""
        index = list(index) if isinstance(index, tuple) else [index]
        places = [i for i, item in enumerate(index) if item is Ellipsis]
        if places:
            taken = sum(item is not None for item in index) - 1
            index[places[0] : places[0] + 1] = [slice(None)] * (tensor.dim() - taken)
        indices = []
        for item in index:
            dim = len(indices)
            if isinstance(item, torch.Tensor):
                if item.dim() == 0:
                    item.item()  # as Python does
                indices.append(item)
                continue
            if isinstance(item, int):
                tensor = aten.select(tensor, dim, item)
                continue
            tensor = tensor.unsqueeze(dim) if item is None else self.slice(tensor, dim, item)
            indices.append(None)
        return tensor, indices if any(item is not None for item in indices) else []

    def slice(self, tensor, dim, item):
        return tensor if item == slice(None) else aten.slice(tensor, dim, item.start, item.stop, item.step or 1)


class FakeCUDA:
    """device, and how many captures there were, with how many calls of the flash kernel in them."""

    def __init__(self):
        self.device = torch.device("cuda:0")
        self.captures = self.flash_calls = 0

    def place(self, model):
        """The model with all its tensors on the device."""
        placed = {}  # tied weights stay one
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        moved = placed.setdefault(id(tensor), torch.empty_like(tensor, device=self.device))
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        tensors[name] = torch.nn.Parameter(moved, requires_grad=False) if is_parameter else moved
        return model


@contextlib.contextmanager
def fake_cuda():
    cuda, stream = FakeCUDA(), mock.Mock(spec=["wait_stream"])
    stand_ins = dict(
        get_device_capability=lambda device=None: (9, 0),
        Stream=lambda device: stream,
        current_stream=lambda: stream,
        stream=lambda stream: contextlib.nullcontext(),
        CUDAGraph=lambda: mock.Mock(spec=["pool", "replay"]),
        graph=lambda graph, pool: FakeCapture(cuda),
    )
    cuda_graphs.side_stream.cache_clear()
    with mock.patch.multiple(torch.cuda, **stand_ins), FakeTensorMode(), Bindings(), torch.no_grad():
        yield cuda
    cuda_graphs.side_stream.cache_clear()
