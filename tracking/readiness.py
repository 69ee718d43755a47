"""Is this machine ready for a run: torch's version, the card, the disk, and how much memory is free.

Each check yields Findings for `main.py --doctor` (doctor.py). Nothing here loads a model.
Left out on purpose: speed, which the doctor measures; the size of logs, which is small beside one checkpoint.
"""

import os
import shutil
from pathlib import Path

import torch

from tracking.findings import Finding, judge

GIB = 2**30
OLDEST_TORCH = (2, 11)  # older ones lack arguments of the flash operator that engine/attention.py calls


def examine_torch(version=torch.__version__):
    """Yields a Finding about torch's version. version: a torch.torch_version.TorchVersion."""
    text = f"{version}, of {'.'.join(map(str, OLDEST_TORCH))} or newer"
    yield judge(version >= OLDEST_TORCH, "torch", text, advice="pip install -r requirements.txt", level="problem")


def examine_device(config, model_config, device: torch.device):
    """Yields Findings about the device and, on CUDA, about what its fast path asks for."""
    if device.type == "mps":
        text = "Apple's mps, in fp32: nothing here has been run on it"
        advice = "compare a short run with --device cpu first; PYTORCH_ENABLE_MPS_FALLBACK=1 if an operator is missing"
        yield Finding("warning", "device", text, advice=advice)
        return
    if device.type != "cuda":
        yield Finding("ok", "device", f"{device.type}, {torch.get_num_threads()} threads")
        return
    major, minor = torch.cuda.get_device_capability(device)
    yield Finding("ok", "device", f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}")
    if not config.uses_bf16(device):
        yield Finding("warning", "bf16", "off", advice="fp32 takes more memory, and decodes without the flash kernel")
        return
    text = f"compute capability {major}.{minor}, bf16 and the flash kernel need 8.0"
    advice = "use --bf16 false (slower, more memory), or a newer card"
    yield judge((major, minor) >= (8, 0), "bf16", text, advice=advice, level="problem")
    size = head_size(model_config)
    text = f"heads of {size} numbers; the flash kernel takes multiples of 8, at most 256"
    advice = "the general kernels are used: slower, and without CUDA graphs"
    yield judge(size % 8 == 0 and size <= 256, "head size", text, advice=advice)


def head_size(model_config) -> int:
    """Numbers of one attention head."""
    return getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads


# ---------------------------------------------------------------- disk


def checkpoint_bytes(config, num_parameters: int) -> int:
    """Size of one checkpoint: fp32 weights, Adam's two moments, and the reference if it changes during the run. With
    LoRA, the adapters and their moments are under a tenth of the merged weights, and counted as that."""
    if config.lora_rank:
        return int(num_parameters * 4 * (0.1 + config.save_merged))
    return num_parameters * 4 * (3 + (config.reference_refresh_steps > 0))


def checkpoints_at_once(config) -> int:
    """How many checkpoints are on the disk at the worst moment: the newest save_total_limit, an older best one, and the
    one that is being written. `latest` is the newest. A short run has fewer."""
    saves = config.max_steps // config.save_steps + (config.max_steps % config.save_steps > 0)
    return min(saves, config.save_total_limit + 2)


def examine_disk(config, num_parameters: int):
    """Yields a Finding that compares the run's checkpoints with the free space of output_dir's disk."""
    folder = Path(config.output_dir or f"runs/{config.preset}").expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    size, count = checkpoint_bytes(config, num_parameters), checkpoints_at_once(config)
    needed, free = size * count, shutil.disk_usage(folder).free
    text = f"{count} x {size / GIB:.2f} GiB of checkpoints, {free / GIB:,.1f} GiB free in {folder}"
    advice = "lower --save_total_limit, raise --save_steps, or put --output_dir on another disk"
    level = "problem" if needed > free else "warning"
    yield judge(needed <= 0.9 * free, "disk", text, advice=advice, level=level)


# ---------------------------------------------------------------- memory


def free_memory(device: torch.device) -> int | None:
    """Bytes that the device has free; of a CPU or of Apple's shared memory, what the system has. None: unknown.

    On CUDA, torch's context exists when this returns, so its half a GiB is not counted as free.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS not this name
        pass
    try:
        import psutil  # not one of the requirements, but often here
    except ImportError:
        return None
    return psutil.virtual_memory().available
