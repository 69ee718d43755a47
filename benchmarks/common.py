"""What the benchmarks share: models of a given size, clocks, memory, a straight-line fit, and how results are shown.

Every figure is the median of several rounds, with the smallest and the largest beside it. What is compared takes
turns within a round (A, B, A, B...), so that a machine that slows down slows both.

Left out on purpose: automatic choice of the number of rounds, comparison with older runs. --json FILE keeps them all.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import llms

# ---------------------------------------------------------------- the command line


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has. doc: the script's docstring."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name", default="tiny", help=f"{', '.join(SHAPES)} (random weights), or as in main.py")
    parser.add_argument("--vocab_size", type=int, help="of a model with random weights, in place of its own")
    parser.add_argument("--rounds", type=int, default=5, help="timed")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that are not")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: what torch takes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return parser


def prepare(args) -> torch.device:
    """Checks the shared flags and applies them -> the device: cuda where there is one. ValueError for a bad one."""
    if args.rounds < 1 or args.warmup < 0:
        raise ValueError(f"--rounds {args.rounds} --warmup {args.warmup}: at least 1 and 0")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: must be at least 1")
        torch.set_num_threads(args.threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(script: str, main, arguments=None) -> None:
    """Calls main; what a user got wrong becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)


def write_json(args, results: dict) -> None:
    """All figures of a benchmark and its flags, if --json asks for them. Times are lists: one number a timed round."""
    if args.json is not None:
        flags = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"flags": flags, **results}, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- models

# Qwen2 shapes with random weights. The two Qwen2.5 are the published configurations.
SHAPES = {
    "1m": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
               intermediate_size=384, vocab_size=512),
    "10m": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
                intermediate_size=1152, vocab_size=512),
    "100m": dict(hidden_size=768, num_hidden_layers=14, num_attention_heads=12, num_key_value_heads=2,
                 intermediate_size=2688, vocab_size=512),
    "real_vocabulary": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                            intermediate_size=768, vocab_size=151_936),
    "qwen2.5-0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                         intermediate_size=4864, vocab_size=151_936),
    "qwen2.5-1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                         intermediate_size=8960, vocab_size=151_936),
}  # fmt: skip
MAX_POSITIONS = 32_768


def load_model(model_name: str, vocab_size: int | None, device: torch.device):
    """(fp32 model, tokenizer): random weights for a name in SHAPES, else as llms.load. The same ones every time.

    A random model reads and writes with the tiny model's tokenizer: only the number of its tokens matters.
    """
    if model_name not in SHAPES:
        if vocab_size is not None:
            raise ValueError(f"--vocab_size {vocab_size}: {model_name} has its own; choose from {', '.join(SHAPES)}")
        return llms.load(model_name, device)
    tokenizer = AutoTokenizer.from_pretrained(
        Path(llms.__file__).parent / "models" / "tiny", model_max_length=MAX_POSITIONS
    )
    settings = SHAPES[model_name] | ({} if vocab_size is None else {"vocab_size": vocab_size})
    if settings["vocab_size"] < len(tokenizer):
        raise ValueError(f"--vocab_size {vocab_size}: the prompts' tokenizer has {len(tokenizer)} tokens")
    config = Qwen2Config(
        **settings, max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(config).eval()
    # Tied to its embeddings, a random model repeats its last token. With small logits every token is about as likely.
    torch.nn.init.constant_(model.model.norm.weight, 0.01)
    return model, tokenizer


def has_random_weights(model_name: str) -> bool:
    return model_name in SHAPES


def stop_ids_for(mean_length: float, vocab_size: int) -> list[int]:
    """Stop tokens that a random model draws once in `mean_length` tokens: lengths are then geometric."""
    count = round(vocab_size / mean_length)
    if not 1 <= count < vocab_size:
        raise ValueError(f"--mean_length {mean_length}: must be more than 1 and at most {vocab_size} tokens")
    return list(range(vocab_size - count, vocab_size))


# ---------------------------------------------------------------- time


def finish(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, device: torch.device) -> float:
    finish(device)
    started = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - started


def take_turns(candidates: dict, rounds: int, warmup: int, device: torch.device) -> dict[str, list[float]]:
    """Calls every candidate(round_number) in turn, round after round -> seconds of each in the timed rounds."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmup + rounds):
        for name, candidate in candidates.items():
            elapsed = seconds(lambda candidate=candidate, number=number: candidate(number), device)
            if number >= warmup:
                times[name].append(elapsed)
    return times


def repeat(candidate, rounds: int, warmup: int, device: torch.device) -> list[float]:
    """take_turns with nobody else."""
    return take_turns({"alone": candidate}, rounds, warmup, device)["alone"]


def show(values: list[float], unit: str = "s", scale: float = 1.0, digits: int = 2) -> str:
    """'0.53 s (0.50-0.61)': median, smallest and largest."""
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{middle:.{digits}f} {unit} ({low:.{digits}f}-{high:.{digits}f})"


# ---------------------------------------------------------------- memory


class PeakMemory:
    """Bytes that some work takes at its worst, on top of what was in use when it began.

    CUDA: tensors, as its allocator counts them. CPU: the process's resident memory, from Linux's /proc.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.before = 0
        if not self.on_gpu and not Path("/proc/self/clear_refs").exists():
            raise ValueError("the memory of a CPU process is read from /proc, which only Linux has")

    def start(self) -> None:
        self.restart()
        self.before = torch.cuda.memory_allocated() if self.on_gpu else _resident("VmRSS")

    def restart(self) -> None:
        """Forgets the peak, but not what was in use at the start."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept for later would hide an increase
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use

    def increase(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else _resident("VmHWM")
        return max(0, peak - self.before)

    def of(self, work) -> int:
        self.start()
        work()
        return self.increase()


def _resident(field: str) -> int:
    """Bytes: VmRSS is what is in use, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


# ---------------------------------------------------------------- the machine


def measure_machine(device: torch.device) -> dict:
    """What this is, and what its memory and its matrix units really reach (which no kernel here can exceed by much)."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    size = 2**30 if on_gpu else 2**27  # bytes
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if on_gpu else 1024
    matrix = torch.randn(n, n, device=device).to(dtype)
    jobs = {"copy": lambda _: target.copy_(source), "matmul": lambda _: matrix @ matrix}
    times = {name: statistics.median(t) for name, t in take_turns(jobs, 7, 2, device).items()}
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "bandwidth": 2 * size / times["copy"],  # bytes a second: read and written
        "flops": 2 * n**3 / times["matmul"],  # a second
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def show_machine(machine: dict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['device']}, {machine['threads']} CPU threads; {versions}")
    print(
        f"measured: copies at {machine['bandwidth'] / 1e9:.1f} GB/s, {machine['dtype']} matrix products at "
        f"{machine['flops'] / 1e12:.3f} TFLOP/s"
    )


class Work:
    """How much arithmetic and memory traffic a model needs, whoever does it."""

    def __init__(self, model):
        config = model.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        tied = embeddings is head
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p is not embeddings and p is not head)
        self.head = 2 * head.numel()  # flops a predicted token
        self.layers = 2 * matrices  # flops a token read
        self.attention = 4 * config.num_hidden_layers * heads * head_dim  # flops a token read and token it looks at
        self.weights = model.num_parameters() - (0 if tied else embeddings.numel())  # numbers read in a decode step
        self.kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim  # numbers a token of context

    def decode_step(self, rows: int, live: float, element_size: int) -> tuple[float, float]:
        """(bytes, flops) of one decode step of `rows` rows that look at `live` tokens each."""
        return (
            element_size * (self.weights + rows * live * self.kv),
            rows * (self.layers + self.head + self.attention * live),
        )

    def update(self, prompt_lengths, lengths, group_size: int, attention: bool = True) -> float:
        """Flops of a forward and a backward pass (three times forward) over rows of these lengths, without padding.

        A prompt counts once for the group_size rows that share it; only answers go through the head. attention: count
        it too, each token looking at those before it.
        """
        total = 0.0
        for row, (prompt, length) in enumerate(zip(prompt_lengths, lengths, strict=True)):
            total += length * (self.layers + self.head) + attention * self.attention * length * (prompt + length / 2)
            if row % group_size == 0:
                total += prompt * self.layers + attention * self.attention * prompt**2 / 2
        return 3 * total


# ---------------------------------------------------------------- growth


def linear_fit(columns: dict[str, list[float]], values: list[float]) -> dict:
    """Least squares: values = constant + the sum of coefficient x column -> {"constant", each column's name, "r2"}.

    r2: the share of the values' variance that the fit explains; 1 is a perfect line. With a column too many for the
    points at hand there is nothing to fit, and ValueError is raised.
    """
    y = torch.tensor(values, dtype=torch.float64)
    X = torch.tensor([[1.0] * len(values), *columns.values()], dtype=torch.float64).T
    scale = X.abs().amax(dim=0).clamp(min=1e-30)  # columns of one size, or a large one drowns the others
    if len(y) <= X.shape[1] or torch.linalg.matrix_rank(X / scale) < X.shape[1]:
        raise ValueError(f"{len(y)} points do not determine {X.shape[1]} coefficients")
    coefficients = torch.linalg.lstsq(X / scale, y, driver="gelsd").solution / scale
    residual = ((y - X @ coefficients) ** 2).sum().item()
    variance = ((y - y.mean()) ** 2).sum().item()
    r2 = 1 - residual / variance if variance > 0 else 1.0  # a constant is a perfect fit to equal values
    return {**dict(zip(["constant", *columns], coefficients.tolist(), strict=True)), "r2": r2}
