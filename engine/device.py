"""Which device the models of this process live on. The only place that decides it.

    default_device()    what --device or R1_DEVICE names; else cuda if there is one, else Apple's mps, else cpu

The choice is kept in an environment variable, because the processes that a script starts (distill.py measures every
student in one of its own) must choose as their parent did.

On mps and cpu, models sample in fp32 with the decoder as it is written: bf16, the flash kernel and CUDA graphs are for
cuda alone. On mps nothing here has been run.

Left out on purpose: several devices in one process (engine/distributed.py has one process per GPU), other accelerators.
"""

import os

VARIABLE = "R1_DEVICE"
CHOICES = ("auto", "cuda", "mps", "cpu")


def choose(name: str) -> None:
    """Makes `name` the device of this process and of those that it starts. "auto" keeps an earlier choice."""
    if name not in CHOICES:
        raise ValueError(f"--device {name!r}: choose from {', '.join(CHOICES)}")
    if name != "auto":
        os.environ[VARIABLE] = name


def default_device():
    """The torch.device to load models on. Raises ValueError, one line, if the chosen one is not here."""
    import torch  # here, because a command line is checked without it

    is_here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = os.environ.get(VARIABLE) or "auto"
    if name == "auto":
        name = next(name for name, available in is_here.items() if available)
    if name not in is_here:
        raise ValueError(f"{VARIABLE}={name}: choose from {', '.join(CHOICES)}")
    if not is_here[name]:
        available = ", ".join(name for name, available in is_here.items() if available)
        raise ValueError(f"device {name}: torch {torch.__version__} finds none; available: {available}")
    return torch.device(name)


def missing_operator(error: NotImplementedError) -> str | None:
    """One line for an operator that Apple's mps lacks; None for any other NotImplementedError."""
    first_line = str(error).strip().split("\n")[0]
    if "MPS" not in first_line:
        return None
    operator = first_line.split("'")[1] if first_line.count("'") >= 2 else "an operator"
    return f"mps has no {operator}: set PYTORCH_ENABLE_MPS_FALLBACK=1 to compute it on the CPU, or use --device cpu"
