"""Does the GPU path work on this machine, and how fast is it? One command, ten minutes at most, no downloads.

Every section runs in a process of its own and has a time limit, so that a crash of the CUDA context, or a hang, ends
that section alone. It prints one line, ok or FAIL with its figures, and all of them are written as Markdown and JSON to
--output_dir, after every section. Models have random weights at Qwen2.5's shapes, or are the embedded ones.

    machine     versions, the card, bf16, the flash operator's schema; speed of copies and matrix products
    flash       the flash kernel as decoding and as training call it, forward and gradients, against fp32 attention
    graphs      rollouts by CUDA graphs against the decoder as it is written, on the same bf16 model
    draws       frequencies of tokens drawn from a vocabulary of 151,936; none of probability 0
    memory      flat over alternations of sampled and greedy; freed with the model
    decode      milliseconds a step, and the share of the floor that reading weights, keys and values sets
    update      one step of the preset: seconds by phase, MFU, logprob_gap, peak memory against the doctor's table
    end_to_end  main.py, its resume and --doctor, distill.py, token_analysis.py; with two GPUs --fsdp

Left out on purpose: whether anything is learned (make train shows that), other people's engines (vs_trl.py, decode.py).

    python benchmarks/gpu_check.py                    # a GPU; writes plots/gpu/
    python benchmarks/gpu_check.py --smoke            # every section at toy size on a CPU, with stand-ins for kernels
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace

import common
import decode
import step
import torch

import llms
import rldatasets
import rollout
import update
from engine import attention
from soft_thinking import SoftThinking
from tracking import memory, readiness
from tracking.run_config import has_cuda_device, parse_config

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 590  # of all sections together
FORK = multiprocessing.get_context("fork")  # of a process that never touches CUDA: each child may


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, help="default plots/gpu; for --smoke a temporary folder")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on a CPU: does every section run?")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="which ones, in order")
    args = parser.parse_args(arguments)
    end = time.monotonic() + SECONDS
    if not args.smoke and not in_a_process(lambda: {"here": has_cuda_device()}, 60).get("here"):
        raise ValueError("no CUDA device here; --smoke tries every section on a CPU")
    if args.smoke:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "R1_DEVICE": "cpu"}
    folder = args.output_dir or (Path(tempfile.mkdtemp(prefix="gpu_check-")) if args.smoke else ROOT / "plots/gpu")
    folder.mkdir(parents=True, exist_ok=True)
    size, results = (SMOKE if args.smoke else FULL), {}
    gc.freeze()  # what is imported: collecting garbage in the children would read all of it
    for name in args.sections:
        section, limit = SECTIONS[name]
        started = time.monotonic()
        limit = min(limit, end - started)
        work = lambda section=section: section(size, results)  # noqa: E731
        result = in_a_process(work, limit) if limit > 1 else {"failure": f"no time left of {SECONDS} s"}
        results[name] = result | {"seconds": time.monotonic() - started}
        print(line_of(name, results[name]), flush=True)
        write(folder, results, args.smoke)
    print(f"in {folder}: gpu_check.md, gpu_check.json")
    return int(any("failure" in result for result in results.values()))


def line_of(name: str, result: dict) -> str:
    said = f"FAIL  {name:11} {result['failure']}" if "failure" in result else f"ok    {name:11} {result['figure']}"
    return f"{said}  [{result['seconds']:.0f} s]"


def write(folder: Path, results: dict, smoke: bool) -> None:
    """All results so far, for people and for programs."""
    (folder / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = ["# gpu_check", "", "Toy sizes on a CPU, with stand-ins." if smoke else "`python benchmarks/gpu_check.py`"]
    lines += ["", "| section | | figures | seconds |", "|---|---|---|---|"]
    for name, result in results.items():
        state, said = ("FAIL", result["failure"]) if "failure" in result else ("ok", result["figure"])
        lines.append(f"| {name} | {state} | {said.replace('|', '/')} | {result['seconds']:.0f} |")
    for name, result in results.items():
        if "table" in result:
            lines += ["", f"## {name}", "", "```", *result["table"], "```"]
        if "traceback" in result:
            lines += ["", f"## {name}: where it failed", "", "```", *result["traceback"].splitlines(), "```"]
    (folder / "gpu_check.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def in_a_process(work, limit: float) -> dict:
    """work() in a process of its own -> its dict; {"failure": one line} if it raises, dies, or takes over `limit` s."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_send_result, args=(sender, work))
    process.start()
    sender.close()
    try:
        if not receiver.poll(max(0.0, limit)):
            return {"failure": f"took more than its {limit:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join(10)
        return {"failure": f"its process died, exit code {process.exitcode}"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.join()


def _send_result(sender, work) -> None:
    os.setsid()
    try:
        result = work()
    except BaseException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        result = {
            "failure": f"{type(error).__name__}: {lines[0][:300]}",
            "traceback": traceback.format_exc().replace(f"{ROOT}/", "")[-4000:],
        }
    sender.send(result)


def check(passed, message: str) -> None:
    """Fails the section."""
    if not passed:
        raise AssertionError(message)


# ---------------------------------------------------------------- sizes


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the sections are."""

    device: str
    dtype: torch.dtype  # that samples
    shape: str  # of common.SHAPES: random weights
    preset: str  # of the update
    flags: tuple[str, ...]  # over the preset, for the update
    mean_length: float  # of its answers
    decode: dict
    draws: int
    group_size: int  # of the rollouts that are compared
    tokens: int  # of the rollouts that memory is watched over
    flash: dict  # sizes of the attention that is compared
    run_flags: tuple[str, ...]  # of the runs from end to end
    distill_flags: tuple[str, ...]
    runs: int  # seconds that each may take


FULL = Size(
    device="cuda", dtype=torch.bfloat16, shape="qwen2.5-1.5b", preset="qwen2.5-1.5b",
    flags=("--dataset_name", "arithmetic", "--max_prompt_length", "512"), mean_length=250,
    decode=dict(rows=[8, 64, 256], context=[280, 573, 1298], steps=64, rounds=3, warmup=1),
    draws=2**16, group_size=4, tokens=24,
    flash=dict(rows=16, heads=12, kv_heads=2, dim=128, longest=1298), run_flags=("--eval_problems", "256"),
    distill_flags=(), runs=60,
)  # fmt: skip
SMOKE = Size(
    device="cpu", dtype=torch.float32, shape="1m", preset="tiny",
    flags=("--problems_per_step", "4", "--group_size", "2", "--max_completion_length", "16"), mean_length=8,
    decode=dict(rows=[2, 4], context=[8, 12], steps=3, rounds=1, warmup=0), draws=2**12, group_size=2, tokens=4,
    flash=dict(rows=3, heads=4, kv_heads=2, dim=16, longest=20),
    run_flags=("--eval_problems", "2", "--problems_per_step", "4", "--group_size", "2",
               "--max_completion_length", "24"),
    distill_flags=("--stage", "train"), runs=40,
)  # fmt: skip


def model_of(size: Size, spread: float | None = None):
    """(model that samples, tokenizer): random weights. spread: of the final norm, so that some tokens are likelier."""
    policy, tokenizer = common.load_model(size.shape, None, torch.device(size.device))
    if spread is not None:
        torch.nn.init.constant_(policy.model.norm.weight, spread)
    model = llms.make_actor(llms.speed_up(policy), size.dtype)
    return model.requires_grad_(False), tokenizer


# ---------------------------------------------------------------- sections


def machine(size: Size, results: dict) -> dict:
    check(torch.__version__ >= readiness.OLDEST_TORCH, f"torch {torch.__version__} is too old")
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    check("seqused_k" in names, f"_flash_attention_forward has no seqused_k: {names}")
    device = torch.device(size.device)
    found = common.measure_machine(device)
    card = found["device"]
    if size.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        check(
            (major, minor) >= (8, 0) and torch.cuda.is_bf16_supported(), f"{card}: no bf16 (capability {major}.{minor})"
        )
        free, total = torch.cuda.mem_get_info()
        card += f" ({major}.{minor}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, CUDA {torch.version.cuda})"
    figure = (
        f"{card}, torch {torch.__version__}; copies {found['bandwidth'] / 1e9:,.0f} GB/s, "
        f"{found['dtype']} products {found['flops'] / 1e12:,.1f} TFLOP/s"
    )
    return {"figure": figure, "machine": found}


def measured_machine(size: Size, results: dict) -> dict:
    """What the machine section measured; measured now if it failed or was left out."""
    return results.get("machine", {}).get("machine") or common.measure_machine(torch.device(size.device))


def naive_flash():
    """The slow obvious version of the kernel."""
    sys.path.insert(0, str(ROOT / "tests"))
    from naive_flash import naive_flash

    return naive_flash


def flash(size: Size, results: dict) -> dict:
    """Largest error relative to the largest number, of outputs and gradients. bf16 keeps 8 bits: 4e-3 a rounding."""
    kernel, naive = (attention.flash_attention if size.device == "cuda" else naive_flash()), naive_flash()
    s = SimpleNamespace(**size.flash)
    generator = torch.Generator().manual_seed(0)
    errors = {}

    def compare(name, shapes, starts, longest, gradients, **options):
        inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        outputs = {}
        for side, function, device, dtype in (
            ("kernel", kernel, size.device, torch.bfloat16), ("fp32", naive, "cpu", torch.float32)
        ):  # fmt: skip
            tensors = [x.detach().to(device, dtype).requires_grad_(gradients) for x in inputs]
            numbers = [x.to(device) for x in starts]
            on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            out = function(*tensors, *numbers, *longest, s.dim**-0.5, **on_device)
            if gradients:
                direction = torch.linspace(-1, 1, out.numel()).view(out.shape).to(device, dtype)
                out.backward(direction)
            outputs[side] = [out, *(x.grad for x in tensors if gradients)]
        for part, ours, right in zip(
            ("", " dq", " dk", " dv"), outputs["kernel"], outputs["fp32"], strict=False
        ):  # fmt: skip
            error = (ours.detach().float().cpu() - right.detach()).abs().max() / right.abs().max()
            errors[name + part] = error.item()

    # Decoding: a query a row, in a cache whose rows have room for more keys than exist.
    capacity = s.longest + 7
    rows = torch.randperm(s.rows, generator=generator)
    starts = torch.arange(s.rows + 1, dtype=torch.int32), torch.cat([rows * capacity, torch.zeros(1)]).int()
    lengths = torch.randint(1, s.longest + 1, (s.rows,), generator=generator).int()
    store = (s.rows * capacity, s.kv_heads, s.dim)
    compare(
        "decode", [(s.rows, s.heads, s.dim), store, store], starts, (1, capacity), False, causal=False,
        context_lens=lengths,
    )  # fmt: skip
    # Training: rows of different lengths, each behind a context of its own.
    queries, contexts = (torch.randint(1, s.longest // 2 + 1, (s.rows,), generator=generator) for _ in range(2))
    keys = queries + contexts
    starts = [torch.cat([torch.zeros(1), n.cumsum(0)]).int() for n in (queries, keys)]
    total = (int(keys.sum()), s.kv_heads, s.dim)
    longest = int(queries.max()), int(keys.max())
    compare("ragged", [(int(queries.sum()), s.heads, s.dim), total, total], starts, longest, True)
    figure = "relative errors: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    check(max(errors.values()) < 2e-2, figure)
    return {"figure": figure, "errors": errors}


def graphs(size: Size, results: dict) -> dict:
    """Two comparisons. The trained embedded model ends its rows by itself: the share of rows that are the same by both
    decoders (rounding moves a draw now and then, so not all are). A random model at the real shape: the distance of
    the log-probs while sampling from those of one pass over the whole text."""
    soft = SoftThinking(k=3, start="immediately")
    modes = {
        "hard": dict(temperature=1.0), "soft": dict(temperature=1.0, soft=soft), "greedy": dict(temperature=0.0),
        "stop tag": dict(temperature=1.0, stop_tag="</answer>"), "temperature 0.7": dict(temperature=0.7),
    }  # fmt: skip
    problems = rldatasets.load_problems("arithmetic", "test", 3 if size is SMOKE else 6)
    same, gaps, shrunk = [], [], 0
    trained, tokenizer = llms.load("tiny", size.device)
    models = {"tiny": llms.make_actor(trained, size.dtype).requires_grad_(False), size.shape: model_of(size, 1.0)[0]}
    for name, model in models.items():
        for mode, options in modes.items():
            if size is SMOKE and name != "tiny" and mode not in ("hard", "soft"):
                continue
            for length in (1, 2, 3, 40):
                # Then fewer rows and another seed, which use the same graphs again.
                for count, seed in ((len(problems), 0), (2, 1)):
                    prompts = [rldatasets.build_prompt(tokenizer, p.question) for p in problems[:count]]
                    options = options | dict(group_size=size.group_size, max_new_tokens=length, seed=seed)
                    ours = rollout.generate(model, tokenizer, prompts, **options)
                    where = f"{name}, {mode}, {length} tokens, {count} prompts"
                    check(torch.isfinite(ours.logprobs).all(), f"{where}: log-probs that are not finite")
                    again = llms.completion_logprobs(model, ours, options["temperature"] or 1.0)
                    gap = ((again - ours.logprobs).abs() * ours.draw_mask).sum() / ours.draw_mask.sum()
                    check(gap < 0.05, f"{where}: log-probs {gap:.3f} nats from those of one pass")
                    gaps.append(gap.item())
                    if name == "tiny":
                        with plain_decoder():
                            plain = rollout.generate(model, tokenizer, prompts, **options)
                        shrunk += len(set(ours.lengths.tolist())) > 1
                        same += rows_alike(ours, plain)
    share = statistics.mean(same)
    check(shrunk > 0, "no batch shrank: nothing was tried")
    figure = (
        f"{share:.1%} of {len(same)} rows as without graphs, log-probs within {statistics.mean(gaps):.4f} nats of one "
        f"pass (at most {max(gaps):.4f}), over {len(gaps)} rollouts"
    )
    check(share > (0.8 if size.dtype == torch.bfloat16 else 0.999), figure)
    return {"figure": figure, "same": share, "gaps": gaps}


def rows_alike(one, other) -> list[bool]:
    """For each row: does it have the same draws in both rollouts?"""
    lengths = zip(one.lengths.tolist(), other.lengths.tolist(), strict=True)
    return [m == n and torch.equal(one.draws[i, :m], other.draws[i, :n]) for i, (m, n) in enumerate(lengths)]


@contextlib.contextmanager
def plain_decoder():
    """Within it, generate decodes step by step, without graphs and without the flash kernel."""
    chosen = rollout.decoder_for
    rollout.decoder_for = rollout.Decoder
    try:
        yield
    finally:
        rollout.decoder_for = chosen


def draws(size: Size, results: dict) -> dict:
    """Frequencies against a peaked distribution in which every tenth token has probability 0."""
    vocab_size, rows = 151_936, 8
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(vocab_size, generator=generator)
    logits[::10] = -torch.inf
    logits[5], logits[77] = 14.0, 12.0
    probs = logits.softmax(dim=-1).to(size.device)
    uniform = torch.rand(rows, size.draws // rows, generator=generator, dtype=torch.float64).to(size.device)
    probs_of_rows = probs.expand(rows, -1).contiguous()
    drawn = torch.cat([rollout.draw(probs_of_rows, some) for some in uniform.split(2**12, dim=1)], dim=1).flatten()
    n = len(drawn)
    counts = torch.bincount(drawn, minlength=vocab_size)
    impossible = int(counts[probs == 0].sum())
    check(impossible == 0, f"{impossible} of {n} draws have probability 0")
    # The likeliest tokens one by one, all others by the 64 parts of the vocabulary that they are in.
    top = probs.topk(20).indices
    rest_probs, rest_counts = probs.clone(), counts.clone()
    rest_probs[top], rest_counts[top] = 0, 0
    expected = torch.cat([probs[top], rest_probs.view(64, -1).sum(dim=1)]).double()
    seen = torch.cat([counts[top], rest_counts.view(64, -1).sum(dim=1)]) / n
    deviation = ((seen - expected).abs() / (expected * (1 - expected) / n).sqrt()).max().item()
    figure = (
        f"{n:,} draws of {vocab_size:,} tokens: frequencies within {deviation:.1f} standard errors, none impossible"
    )
    check(deviation < 5, figure)
    return {"figure": figure, "deviation": deviation}


def memory_flat(size: Size, results: dict) -> dict:
    on_gpu = size.device == "cuda"

    def in_use() -> int:
        gc.collect()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return torch.cuda.memory_allocated() if on_gpu else common._resident("VmRSS")

    torch.zeros(1, device=size.device)
    before, used = in_use(), []
    model, tokenizer = model_of(size)
    weights = in_use() - before
    for _ in range(6):
        for temperature in (1.0, 0.0):
            rollout.generate(
                model, tokenizer, [decode.WORD * 20] * 4, group_size=8, max_new_tokens=size.tokens,
                temperature=temperature, stop_ids=[], seed=0,
            )  # fmt: skip
        used.append(in_use())
    reference = weakref.ref(model)
    del model
    left = in_use() - before
    growth = used[-1] - used[1]
    figure = f"weights {weights / 2**20:,.0f} MiB; grew {growth / 2**20:.1f} MiB over 4 alternations, "
    figure += f"{left / 2**20:.1f} left"
    check(reference() is None, "the model lives on after del")
    if on_gpu:  # a CPU process's resident memory says little
        check(growth <= 2**20 and left <= 256 * 2**20, figure)  # left: cuBLAS keeps its workspaces
    return {"figure": figure, "used": used, "left": left}


def decode_steps(size: Size, results: dict) -> dict:
    found = measured_machine(size, results)
    model, tokenizer = model_of(size)
    args = SimpleNamespace(**size.decode)
    with contextlib.redirect_stdout(None):
        points = decode.sweep(model, tokenizer, found, args, torch.device(size.device))
    table = [f"{'rows':>5}{'context':>9}{'ms a step':>11}{'of the floor':>14}"]
    for point in points:
        milliseconds = 1e3 * statistics.median(point["seconds"])
        table.append(f"{point['rows']:5}{point['context']:9}{milliseconds:11.2f}{point['roofline']:14.0%}")
    shares, kernels = kernel_shares(model, tokenizer, args, size)
    said = "time at most rows, middle context: " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items())
    table += [said, f"the same, prefill and {args.steps} steps: {kernels[0]}", *kernels[1:]]
    middle = sorted(args.context)[len(args.context) // 2]
    shown = [p for p in points if p["context"] == middle]
    figure = f"at {middle} tokens: " + ", ".join(
        f"{p['rows']} rows {1e3 * statistics.median(p['seconds']):.2f} ms ({p['roofline']:.0%} of the floor)"
        for p in shown
    )
    check(all(math.isfinite(p["roofline"]) for p in points), figure)
    return {"figure": f"{figure}; {said}", "points": points, "shares": shares, "table": table}


KERNELS = {  # names of GPU kernels, or of operators on a CPU, by part; the first that fits counts
    "flash": ("flash", "fmha", "attention"),
    "products": ("gemm", "gemv", "nvjet", "cutlass", "cublas", "aten::mm", "aten::addmm", "aten::bmm"),
    "sampling": (
        "softmax",
        "scan",
        "cumsum",
        "searchsorted",
        "argmax",
        "vecdot",
        "logsumexp",
        "aten::exp",
        "exp_kernel",
        "entr_",
    ),
}


def kernel_shares(model, tokenizer, args, size: Size) -> tuple[dict[str, float], list[str]]:
    """One rollout at the most rows and the middle context -> the parts' shares of its kernels' time, and the table."""
    prompt = decode.WORD * (sorted(args.context)[len(args.context) // 2] - args.steps // 2)

    def work():
        rollout.generate(
            model, tokenizer, [prompt], group_size=max(args.rows), max_new_tokens=1 + args.steps, stop_ids=[], seed=0
        )

    work()  # records the graphs
    kernels, table = kernels_of(work, size)
    times = dict.fromkeys([*KERNELS, "rest"], 0.0)
    for name, (milliseconds, _) in kernels.items():
        part = next((part for part, words in KERNELS.items() if any(word in name.lower() for word in words)), "rest")
        times[part] += milliseconds
    return {part: t / max(1e-9, sum(times.values())) for part, t in times.items()}, table


def kernels_of(work, size: Size) -> tuple[dict[str, tuple[float, int]], list[str]]:
    """Kernels (on a CPU: operators) of work() -> name: (milliseconds of all calls, calls), and a table of the longest.
    Its first line says for which share of the time the GPU was busy; with the profiler on, launches take longer."""
    activity = torch.profiler.ProfilerActivity.CUDA if size.device == "cuda" else torch.profiler.ProfilerActivity.CPU
    common.finish(torch.device(size.device))
    with torch.profiler.profile(activities=[activity]) as profiler:
        started = time.perf_counter()
        work()
        common.finish(torch.device(size.device))
        wall = 1e3 * (time.perf_counter() - started)
    kernels = {}
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if size.device == "cuda" else event.self_cpu_time_total
        if microseconds > 0:  # else a call of CUDA's by the CPU
            kernels[event.key] = microseconds / 1e3, event.count
    busy, calls = (sum(numbers[i] for numbers in kernels.values()) for i in (0, 1))  # 0 where the profiler is refused
    table = [f"{calls:,} kernels, busy {busy:.1f} of {wall:.1f} ms"]
    longest = sorted(kernels.items(), key=lambda kernel: -kernel[1][0])[:24]
    table += [f"{t:9.2f} ms{n:7}  {' '.join(name.split())[:150]}" for name, (t, n) in longest]
    return kernels, table


def update_step(size: Size, results: dict) -> dict:
    """The second of two steps of the preset, with random weights."""
    found, device = measured_machine(size, results), torch.device(size.device)
    with contextlib.redirect_stdout(None):
        config = parse_config(
            ["--preset", size.preset, "--model_name", size.shape, "--learning_rate", "0", *size.flags]
        )
    args = SimpleNamespace(vocab_size=None, mean_length=size.mean_length)
    one = step.Step(step.Task(config, args, device))
    on_gpu = device.type == "cuda"
    step.measure(one, 0)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = step.measure(one, 1)
    peak = torch.cuda.max_memory_allocated() if on_gpu else common._resident("VmHWM")
    table = memory.memory_table(config, one.task.policy.config, on_gpu)
    sampled = one.sample(2)
    advantages, stats = one.score(sampled, 2), {}

    def work():
        stats.update(update.update(one.task.policy, one.actor, None, one.optimizer, sampled, advantages, config))

    _, kernels = kernels_of(work, size)
    lengths, prompts = sampled.lengths.tolist(), [len(ids) for ids in sampled.prompt_ids]
    flops = common.Work(one.task.policy).update(prompts, lengths, config.group_size)
    seconds = times["forward"] + times["backward"] + times["optimizer"]
    mfu = flops / seconds / found["flops"] * times["tokens"] / sum(lengths)  # the timed rollout had other lengths
    figure = (
        ", ".join(f"{phase} {times[phase]:.2f} s" for phase in step.PHASES)
        + f"; {times['tokens']:,} tokens, MFU {mfu:.0%}, logprob_gap {stats['logprob_gap']:.4f}, "
        f"peak {peak / 2**30:.1f} GiB (the doctor's table: {table['peak'] / 2**30:.1f})"
    )
    check(stats["skipped_updates"] == 0 and stats["updates"] > 0, f"updates were skipped: {figure}")
    check(stats["logprob_gap"] < 0.05, figure)
    if on_gpu:
        check(peak < 1.1 * table["peak"], f"more memory than the doctor's table says: {figure}")
    rows = [f"{value / 2**30:8.2f} GiB  {name}" for name, value in table.items()]
    rows += [f"another update, {sum(lengths):,} tokens: {kernels[0]}", *kernels[1:]]
    return {"figure": figure, "times": times, "peak": peak, "memory_table": table, "mfu": mfu, "table": rows}


def end_to_end(size: Size, results: dict) -> dict:
    took, failures = {}, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = ("--preset", "tiny", "--output_dir", str(folder / "run"), "--save_steps", "5", *size.run_flags)
        distill = (
            "--preset", "tiny", "--teacher_name", str(folder / "run/checkpoints/latest"), "--train_problems", "16",
            "--problems_per_step", "16", "--epochs", "1", "--batch_size", "4", "--eval_problems", "16",
            "--control", "none", "--output_dir", str(folder / "distill"), *size.distill_flags,
        )  # fmt: skip
        analysis = (
            "--model_name", str(folder / "run/checkpoints/latest"), "--max_new_tokens", "24", "--num_resamples", "2",
            "--forks", "0", "--skip_individual_pdfs", "--output_dir", str(folder / "analysis"),
        )  # fmt: skip
        jobs = {
            "train": ("main.py", *run, "--max_steps", "5"),
            "resume": ("main.py", *run, "--max_steps", "7", "--resume_from_checkpoint", "latest"),
            "doctor": ("main.py", "--doctor", *run),
            "distill": ("distill.py", *distill),
            "token_analysis": ("token_analysis.py", *analysis),
        }
        if size is not SMOKE and torch.cuda.device_count() >= 2:
            fsdp = [*run, "--output_dir", str(folder / "fsdp"), "--fsdp", "--max_steps", "2"]
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
            jobs["fsdp, 2 GPUs"] = (*launcher, "main.py", *fsdp)
        for name, command in jobs.items():
            started = time.monotonic()
            try:
                (forked if size is SMOKE else launched)(name, command, size.runs)
            except AssertionError as error:  # the others may work
                failures.append(str(error)[:120])
            took[name] = time.monotonic() - started
        check(not failures, "; ".join(failures))
        steps = [json.loads(line)["step"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        check(steps == list(range(8)), f"steps in the log after the resume: {steps}")
    return {"figure": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items()), "took": took}


def launched(name: str, command: tuple[str, ...], limit: float) -> None:
    """`python command`, as a user starts it. Fails with the last line on stderr."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=limit, errors="replace"
        )
    except subprocess.TimeoutExpired:
        check(False, f"{name}: took more than its {limit} s")
    check_exit(name, done.returncode, done.stderr)


def forked(name: str, command: tuple[str, ...], limit: float) -> None:
    """The same without importing torch and transformers again, and without pictures: both take seconds."""
    sys.path.insert(0, str(ROOT / "tests"))
    from drawing import no_drawing

    def work():
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.chdir(ROOT)
        sys.argv = list(command)
        sys.path.insert(0, str(ROOT))
        try:
            with no_drawing():
                runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        except SystemExit as ended:
            return {"code": ended.code}
        return {"code": 0}

    with tempfile.TemporaryFile("w+", errors="replace") as output:
        result = in_a_process(work, limit)
        output.seek(0)
        check("failure" not in result, f"{name}: {result.get('failure')}")
        check_exit(name, result["code"] or 0, output.read())


def check_exit(name: str, code: int, output: str) -> None:
    last = (output.strip().splitlines() or [""])[-1]
    check(code == 0, f"{name}: exit code {code}: {last[:200]}")


SECTIONS = {  # and seconds that each may take
    "machine": (machine, 20),
    "flash": (flash, 30),
    "graphs": (graphs, 90),
    "draws": (draws, 20),
    "memory": (memory_flat, 30),
    "decode": (decode_steps, 80),
    "update": (update_step, 80),
    "end_to_end": (end_to_end, 240),
}

if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except ValueError as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
