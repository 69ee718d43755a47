"""How fast are tokens written: a decode step over rows and context, and whole rollouts beside transformers' `generate`.

1. Sweep. One step of rollout.generate at so many rows that each look at so many tokens: the time of N + 1 new tokens
   minus that of 1 (the prefill), over N. Beside it the share of the roofline: the time that the step's traffic (all
   weights, every row's keys and values) or its arithmetic takes at the measured speed of this machine, whichever is
   longer, over the time it took. And the memory the call takes at its worst, beyond the weights. Least-squares fits
   say how time and memory grow with rows and with context.
2. Rollout. Rows that end at different lengths, taking turns with `generate`: the same weights, prompts, limit and
   precision, temperature 1 over the whole vocabulary. A random model draws one of its stop tokens once in
   --mean_length tokens; a trained one ends where it does.

Left out on purpose: servers such as vLLM (another process, another kind of comparison), and beam search.

    python benchmarks/decode.py                                              # the tiny model
    python benchmarks/decode.py --model_name 1m --rows 8 32 128 256 --context 64 256 1024
    python benchmarks/decode.py --model_name real_vocabulary --rows 8 32 --context 64 256 --rollout_rows 32
    python benchmarks/decode.py --model_name qwen2.5-1.5b --rows 8 32 128 256 --rollout_rows 128 \\
        --max_new_tokens 786 --mean_length 250                               # a GPU
"""

import copy
import statistics

import common
import torch
from common import show, take_turns

import llms
import rldatasets
from rollout import generate

WORD = " eggs"  # one token, however often it is repeated


def main(arguments):
    parser = common.argument_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128], help="of the sweep")
    parser.add_argument("--context", type=int, nargs="+", default=[64, 128, 256], help="tokens each row looks at")
    parser.add_argument("--steps", type=int, default=16, help="decode steps that a point of the sweep averages over")
    parser.add_argument("--rollout_rows", type=int, default=128, help="of the rollout; a multiple of --group_size")
    parser.add_argument("--group_size", type=int, default=8, help="rows of a prompt")
    parser.add_argument("--max_new_tokens", type=int, default=72, help="of the rollout")
    parser.add_argument("--mean_length", type=float, default=24, help="of the rollout's rows, for random weights")
    args = parser.parse_args(arguments)
    device = common.prepare(args)
    for name in ("rows", "steps", "rollout_rows", "group_size", "max_new_tokens"):
        size = getattr(args, name)
        if (min(size) if isinstance(size, list) else size) < 1:
            raise ValueError(f"--{name} {size}: must be at least 1")
    if args.rollout_rows % args.group_size:
        raise ValueError(f"--rollout_rows {args.rollout_rows}: must be a multiple of --group_size {args.group_size}")
    if min(args.context) <= args.steps:
        raise ValueError(f"--context {min(args.context)}: must be more than --steps {args.steps}")
    policy, tokenizer = common.load_model(args.model_name, args.vocab_size, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # what main.py samples in
    peer = copy.deepcopy(llms.make_actor(policy, dtype))  # for transformers' loop, as transformers made it
    model = llms.make_actor(llms.speed_up(policy), dtype)
    machine = common.measure_machine(device)
    common.show_machine(machine)
    print(f"{args.model_name}: {model.num_parameters() / 1e6:.1f}M parameters, {model.config.vocab_size} tokens\n")
    results = {"machine": machine, "sweep": sweep(model, tokenizer, machine, args, device)}
    results["fit"] = fits(results["sweep"])
    results["rollout"] = rollouts(model, peer, tokenizer, args, device)
    common.write_json(args, results)


# ---------------------------------------------------------------- 1. one step


def sweep(model, tokenizer, machine, args, device) -> list[dict]:
    print(f"{'rows':>6}{'context':>9}  {'ms a step':<26}{'tokens/s':>10}{'roofline':>10}{'memory':>12}")
    work, element_size = common.Work(model), torch.finfo(model.dtype).bits // 8
    memory = common.PeakMemory(device)
    memory.start()
    points = []
    for context in args.context:
        # One prompt for all rows: it is read once, so the prefill is a small part of what is timed.
        prompt = WORD * (context - args.steps // 2)  # half of the steps look at less than `context`, half at more
        for rows in args.rows:

            def decode(new_tokens, rows=rows, prompt=prompt):
                generate(model, tokenizer, [prompt], group_size=rows, max_new_tokens=new_tokens, stop_ids=[], seed=0)

            # One after the other, not in turns: for each number of new tokens a GPU records its step anew.
            prefill = common.repeat(lambda _: decode(1), args.rounds, args.warmup, device)
            memory.restart()
            whole = common.repeat(lambda _: decode(1 + args.steps), args.rounds, args.warmup, device)
            step = [(seconds - statistics.median(prefill)) / args.steps for seconds in whole]
            num_bytes, flops = work.decode_step(rows, context, element_size)
            floor = max(num_bytes / machine["bandwidth"], flops / machine["flops"])
            median = statistics.median(step)
            point = {
                "rows": rows,
                "context": context,
                "seconds": step,
                "tokens_per_second": rows / median,
                "roofline": floor / median,
                "memory_increase": memory.increase(),
            }
            points.append(point)
            print(
                f"{rows:6}{context:9}  {show(step, 'ms', 1000, 3):<26}{point['tokens_per_second']:10.0f}"
                f"{point['roofline']:10.0%}{point['memory_increase'] / 2**20:8.0f} MiB"
            )
    return points


def fits(points: list[dict]) -> dict | None:
    """Time and memory = constant + a rows + b rows x context. Prints both; None when the points are too few."""
    columns = {"rows": [p["rows"] for p in points], "row_tokens": [p["rows"] * p["context"] for p in points]}
    try:
        time = common.linear_fit(columns, [statistics.median(p["seconds"]) for p in points])
        memory = common.linear_fit(columns, [p["memory_increase"] for p in points])
    except ValueError as error:
        print(f"no fit: {error}\n")
        return None
    print(
        f"fit: {1e3 * time['constant']:.3f} ms + {1e6 * time['rows']:.2f} us a row "
        f"+ {1e9 * time['row_tokens']:.2f} ns a row and token of context, R^2 = {time['r2']:.4f}\n"
        f"     {memory['constant'] / 2**20:.1f} MiB + {memory['rows'] / 2**10:.1f} KiB a row "
        f"+ {memory['row_tokens']:.0f} bytes a row and token of context, R^2 = {memory['r2']:.4f}\n"
    )
    return {"seconds": time, "memory": memory}


# ---------------------------------------------------------------- 2. whole rollouts


def rollouts(model, peer, tokenizer, args, device) -> dict:
    """Times of ours and of transformers' `generate`, in the same rounds, and the ratio of their tokens a second."""
    stops = None  # whatever the model's configuration and its tokenizer name
    if common.has_random_weights(args.model_name):
        stops = common.stop_ids_for(args.mean_length, model.config.vocab_size)
    problems = rldatasets.load_problems("arithmetic", "train", args.rollout_rows // args.group_size)
    prompts = [rldatasets.build_prompt(tokenizer, problem.question) for problem in problems]
    lengths: dict[str, list[torch.Tensor]] = {"ours": [], "generate": []}

    def ours(number):
        rollout = generate(
            model, tokenizer, prompts, group_size=args.group_size, max_new_tokens=args.max_new_tokens,
            stop_ids=stops, seed=number,
        )  # fmt: skip
        lengths["ours"].append(rollout.lengths)

    def transformers(number):
        torch.manual_seed(number)
        lengths["generate"].append(
            transformers_generate(peer, tokenizer, prompts, args.group_size, args.max_new_tokens, stops)
        )

    times = take_turns({"ours": ours, "generate": transformers}, args.rounds, args.warmup, device)
    print(f"rollout: {args.rollout_rows} rows, up to {args.max_new_tokens} new tokens")
    result = {}
    for name, seconds in times.items():
        timed = lengths[name][args.warmup :]
        rates = [n.sum().item() / t for n, t in zip(timed, seconds, strict=True)]
        mean, longest = torch.cat(timed).float().mean().item(), max(int(n.max()) for n in timed)
        result[name] = {"seconds": seconds, "tokens_per_second": statistics.median(rates), "mean_length": mean}
        print(f"{name:>10}: {show(seconds)}, {show(rates, 'tokens/s', digits=0)}; {mean:.1f} tokens, up to {longest}")
    result["ratio"] = result["ours"]["tokens_per_second"] / result["generate"]["tokens_per_second"]
    print(f"{'ratio':>10}: {result['ratio']:.2f} times generate's tokens a second")
    return result


def transformers_generate(model, tokenizer, prompts, group_size, max_new_tokens, stops) -> torch.Tensor:
    """Lengths (B,) of what transformers samples, the stop token counted: left-padded prompts, nothing filtered."""
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    inputs = tokenizer(rows, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    stops = llms.stop_ids(model, tokenizer) if stops is None else stops
    ids = model.generate(
        **inputs.to(model.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id,
    )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
    is_stop = torch.isin(ids, torch.tensor(stops, device=ids.device))
    return (is_stop.cumsum(dim=1) - is_stop.long() == 0).sum(dim=1)


if __name__ == "__main__":
    common.run("decode.py", main)
