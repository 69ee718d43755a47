"""DeepSeek-R1's reinforcement learning at small scale: GRPO on a language model, with rules for rewards.

One step: take a few problems; let the policy write a group of answers to each; score every answer (is it right, is it
in the asked-for form); make the tokens of the better answers of a group likelier, those of the worse ones less likely.
No demonstration is ever shown: what the model learns, it learns from its own samples.

    python main.py                                     # a GPU: Qwen2.5-1.5B on GSM8K; none: the embedded tiny model
    python main.py --preset tiny --seed 1 --output_dir runs/seed1
    python main.py --dataset_name gsm8k --dataset_path DIR --model_name DIR
    python main.py --doctor                            # check model, data, memory and hours before a long run
    python main.py --eval_only --model_name runs/tiny/checkpoints/latest --eval_samples 8
    python main.py --help

Read `train` first, then grpo.py (advantages and the loss) and rollout.py (sampling); settings.py holds the presets.
Left out on purpose: supervised fine-tuning before RL, learned reward models, a value network, a replay buffer.
"""

import dataclasses
import json
import math
import sys
import textwrap
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

import doctor
import evaluator
import grpo
import llms
import plotter
import rldatasets
import runs
from rollout import generate
from settings import GRPOConfig, parse_config

# ---------------------------------------------------------------- the training loop


def train(config: GRPOConfig) -> Path:
    """Runs GRPO as configured; returns the run's folder."""
    started = time.time()
    weights = evaluator.parse_rewards(config.rewards)
    train_problems = rldatasets.load_problems(config.dataset_name, "train", path=config.dataset_path)
    test_problems = rldatasets.load_problems(config.dataset_name, "test", config.eval_problems, config.dataset_path)
    mode = config.rollout_mode()  # k = 1 in normal sampling
    hard_mode = dataclasses.replace(mode, k=1)  # what the figures without "soft" in their name are measured in
    model_config = llms.load_config(config.model_name, config.trust_remote_code)
    mode.check_vocabulary(model_config.vocab_size)
    num_tokens = config.max_prompt_length + config.max_completion_length
    positions = llms.max_positions(model_config)
    if num_tokens > positions:
        raise ValueError(f"{num_tokens} tokens of prompt and completion exceed the {positions} positions of the model")

    folder = checkpoint = None
    if config.resume_from_checkpoint:
        folder, checkpoint = runs.find_checkpoint(config.output_dir, config.resume_from_checkpoint)
    policy, tokenizer = llms.load(str(checkpoint or config.model_name), trust_remote_code=config.trust_remote_code)
    mode.check_reserve(tokenizer)
    train_problems = rldatasets.drop_long_prompts(
        train_problems, tokenizer, config.max_prompt_length, **config.prompting()
    )
    test_problems = rldatasets.drop_long_prompts(
        test_problems, tokenizer, config.max_prompt_length, **config.prompting()
    )

    device = policy.device
    on_gpu = device.type == "cuda"
    # fp32 weights learn, under bf16 autocast on a GPU, where a bf16 copy samples. On a CPU both are one fp32 model.
    bf16 = config.uses_bf16(device)
    actor = llms.make_actor(policy, torch.bfloat16 if bf16 else torch.float32)
    reference = None
    if config.beta > 0:
        start = (
            llms.load(config.model_name, device, trust_remote_code=config.trust_remote_code)[0]
            if checkpoint
            else policy
        )
        reference = llms.make_reference(start, bf16)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        llms.compile_layers(policy)
    if folder is None:  # only now, when nothing is left that could be refused, may an older run be replaced
        output_dir = config.output_dir or runs.unused_folder(f"runs/{config.preset}")
        folder = runs.create_folder(output_dir, config.overwrite_output_dir)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu
    )

    metrics_log, samples_log = runs.JsonLines(folder / "metrics.jsonl"), runs.JsonLines(folder / "samples.jsonl")
    last_step, best = 0, -1.0
    if checkpoint:
        state = torch.load(checkpoint / "trainer_state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state["optimizer"])
        if reference is not None and "reference" in state:
            reference.load_state_dict(state["reference"])
        last_step, best = state["step"], state["best"]
        if last_step >= config.max_steps:
            raise ValueError(f"--max_steps {config.max_steps}: the checkpoint is at step {last_step} already")
        metrics_log.keep_until(last_step)
        samples_log.keep_until(last_step)
    settings = dataclasses.asdict(config)
    runs.write_args(folder, settings, device)
    tracker = Accelerator(log_with=None if config.report_to == "none" else config.report_to, project_dir=folder)
    tracker.init_trackers("r1", config={name: value for name, value in settings.items() if value is not None})

    def evaluate(step: int) -> dict[str, float]:
        """Accuracy on the test split, sampled and greedy, and in soft mode if that is trained; the first 16 sampled
        answers go to samples.jsonl."""

        def measure(temperature, soft):
            return evaluator.evaluate(
                actor, tokenizer, test_problems, temperature=temperature, soft=soft, **config.answering()
            )

        sampled, greedy = measure(config.temperature, hard_mode), measure(0.0, hard_mode)
        samples_log.append(*({"step": step, "split": "test", **r} for r in sampled.pop("records")[:16]))
        result = {f"eval/{name}": value for name, value in sampled.items()}
        result["eval/accuracy_greedy"] = greedy["accuracy"]
        if mode.k > 1:
            result["eval/accuracy_soft"] = measure(config.temperature, mode)["accuracy"]
        return result

    def log(row: dict) -> None:
        metrics_log.append(row)
        tracker.log(row, step=row["step"])
        if "eval/accuracy" in row:
            tqdm.write(describe(f"step {row['step']}", row))
            plotter.plot_run(folder)

    if last_step == 0:
        log({"step": 0, **evaluate(0)})
    progress = tqdm(range(last_step + 1, config.max_steps + 1), initial=last_step, total=config.max_steps, unit="step")
    for step in progress:
        problems = rldatasets.problems_of_step(train_problems, step, config.problems_per_step, config.seed)
        prompts = [rldatasets.build_prompt(tokenizer, problem.question, **config.prompting()) for problem in problems]
        golds = [problem.answer for problem in problems for _ in range(config.group_size)]

        # 1. The policy writes group_size answers to each problem: B = problems x group_size rows.
        with runs.stopwatch(device) as rollout_time:
            rollout = generate(
                actor,
                tokenizer,
                prompts,
                group_size=config.group_size,
                max_new_tokens=config.max_completion_length,
                temperature=config.temperature,
                stop_tag=config.stop_tag(),
                soft=mode,
                seed=config.seed * 1_000_003 + step,
            )

        # 2. Rules score them, and each answer is compared with its own group.
        answers = [rldatasets.prefilled(config.tags) * config.prefill + text for text in rollout.texts]
        scores = [evaluator.score(text, gold, weights, config.tags) for text, gold in zip(answers, golds, strict=True)]
        rewards = torch.tensor([evaluator.total(s, weights) for s in scores], device=device)  # (B,)
        advantages = grpo.compute_advantages(rewards, config.group_size, config.advantage_scale)  # (B,)
        if config.control == "shuffled_advantages":
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            order = torch.randperm(len(advantages), generator=generator)
            advantages = advantages[order.to(device)]

        # 3. The policy's weights move towards what scored above its group, and the actor follows.
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * lr_factor(step, config)
        with runs.stopwatch(device) as train_time:
            train_stats = update(policy, actor, reference, optimizer, rollout, advantages, config)
            llms.sync_actor(actor, policy)
        if config.reference_refresh_steps and step % config.reference_refresh_steps == 0:
            llms.refresh_reference(reference, policy, config.reference_mix)

        # 4. Everything about the step is written down.
        row = {"step": step, **rollout_metrics(rollout, answers, scores, rewards, golds, config), **train_stats}
        row |= {"time/rollout": rollout_time(), "time/train": train_time()}
        row["tokens_per_second"] = rollout.lengths.sum().item() / (rollout_time() + train_time())
        is_last = step == config.max_steps
        saves = is_last or step % config.save_steps == 0
        if saves or step % config.eval_steps == 0:
            row |= evaluate(step)
        log(row)
        samples_log.append(*sample_records(step, prompts, golds, answers, rollout, scores, rewards, advantages))
        progress.set_postfix_str(
            f"reward {row['reward']:.2f}, accuracy {row['accuracy']:.0%}, "
            f"length {row['completion_length']:.0f}, {row['tokens_per_second']:.0f} tokens/s"
        )
        if saves:
            is_best, best = row["eval/accuracy"] > best, max(row["eval/accuracy"], best)
            state = dict(step=step, best=best, optimizer=optimizer.state_dict())
            if config.reference_refresh_steps:
                state["reference"] = reference.state_dict()
            runs.save_checkpoint(folder, step, policy, tokenizer, state, config.save_total_limit, is_best)
    tracker.end_training()
    summarise(folder, time.time() - started)
    return folder


def update(policy, actor, reference, optimizer, rollout, advantages, config) -> dict[str, float]:
    """The optimizer steps of one rollout. Returns what the optimizer really used, averaged over its steps."""
    mask = rollout.draw_mask  # (B, T, K)
    if config.mask_truncated:
        mask = mask & torch.tensor([f == "stop" for f in rollout.finish], device=mask.device).view(-1, 1, 1)
    row_tokens = mask.any(dim=-1).sum(dim=1)  # (B,) positions that count
    num_updates = config.updates_per_rollout * config.minibatches
    autocast = torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=config.uses_bf16(policy.device))

    # Steps after the first need the log-probs that the policy had when it sampled. If it is the very model that
    # sampled, the rollout holds them; a bf16 actor's would differ by rounding.
    old = ref = None
    if num_updates > 1:
        old = rollout.logprobs if actor is policy else all_logprobs(policy, rollout, autocast, config)
    if reference is not None:
        ref = all_logprobs(reference, rollout, autocast, config)

    # Sums over the optimizer steps that are taken, divided by their number at the end.
    taken, skipped = 0, 0
    sums = {"grad_norm": 0.0, "clip_frac": 0.0} | ({} if ref is None else {"kl": 0.0})
    gap = None
    share = len(advantages) // config.minibatches
    policy.train()
    for number in range(num_updates):
        start = number % config.minibatches * share
        rows = torch.arange(start, start + share, device=mask.device)  # whole groups
        # Totals of the whole optimizer step, so that its micro-batches add up to one big batch, also when rows are
        # left out below: they count, with a gradient of zero.
        num_rows, num_tokens = (row_tokens[rows] > 0).sum().item(), row_tokens[rows].sum().item()
        # Rows without advantage have no gradient, unless the KL gives them one.
        rows = rows[(row_tokens[rows] > 0) & ((advantages[rows] != 0) | (ref is not None))]
        if len(rows) == 0:
            continue  # nothing to learn from: no step at all, where Adam's momentum alone would take one
        for micro in llms.micro_batches(rollout, rows.tolist(), config.tokens_per_micro_batch):
            with autocast:
                logprobs = llms.completion_logprobs(policy, rollout, config.temperature, micro)  # (b, T, K)
            draw_weights = None
            if config.rollout_is_cap > 0:  # the actor's rounding made some draws likelier than the policy finds them
                before_update = logprobs.detach() if old is None else old[micro]
                draw_weights = grpo.importance_weights(before_update, rollout.logprobs[micro], config.rollout_is_cap)
            loss, loss_stats = grpo.policy_loss(
                logprobs,
                None if old is None else old[micro],
                advantages[micro],
                mask[micro],
                loss_type=config.loss_type,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                ref_logprobs=None if ref is None else ref[micro],
                beta=config.beta,
                draw_weights=draw_weights,
                max_length=config.max_completion_length,
                num_rows=num_rows,
                num_tokens=num_tokens,
            )
            loss.backward()
            for name, value in loss_stats.items():
                sums[name] += value
            if taken == 0:  # the policy is still the one that sampled: any gap is the arithmetic's
                differences = (logprobs.detach() - rollout.logprobs[micro]).abs() * mask[micro]
                gap = (gap or 0.0) + differences.sum().item() / mask[rows].sum().item()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        if math.isfinite(grad_norm):
            sums["grad_norm"] += grad_norm
            taken += 1
            optimizer.step()
        else:
            skipped += 1  # one such step would ruin every weight
        optimizer.zero_grad()
    policy.eval()
    stats = {name: value / max(1, taken) for name, value in sums.items()}
    stats |= {"lr": optimizer.param_groups[0]["lr"], "skipped_updates": skipped}
    return stats if gap is None else stats | {"logprob_gap": gap}


@torch.no_grad()
def all_logprobs(model, rollout, autocast, config) -> torch.Tensor:
    """Log-probs of all rows under `model`, without gradient: (B, T, K)."""
    result = torch.zeros_like(rollout.logprobs)
    for micro in llms.micro_batches(rollout, range(len(result)), config.tokens_per_micro_batch):
        with autocast:
            result[micro] = llms.completion_logprobs(model, rollout, config.temperature, micro)
    return result


def lr_factor(step: int, config) -> float:
    """Linear warm-up to 1 at the step after the warm-up, then linear decay to final_lr_fraction at the last step."""
    if step <= config.warmup_steps:
        return step / (config.warmup_steps + 1)
    decay_steps = max(1, config.max_steps - config.warmup_steps - 1)
    done = min(1.0, (step - config.warmup_steps - 1) / decay_steps)
    return 1 - done * (1 - config.final_lr_fraction)


# ---------------------------------------------------------------- data, logs, messages


def rollout_metrics(rollout, answers, scores, rewards, golds, config) -> dict[str, float]:
    """What to log about the samples of a step. Fractions are 0-1, lengths are tokens, entropy is nats a token."""
    correct = [
        evaluator.accuracy_reward(text, gold, config.tags) == 1 for text, gold in zip(answers, golds, strict=True)
    ]
    well_formed = [evaluator.format_reward(text, config.tags) for text in answers]
    groups = rewards.view(-1, config.group_size)
    B = len(correct)
    return {
        "reward": rewards.mean().item(),
        **{f"reward/{name}": sum(s[name] for s in scores) / B for name in scores[0]},
        "accuracy": sum(correct) / B,
        "format_rate": sum(well_formed) / B,
        "completion_length": rollout.lengths.float().mean().item(),
        "soft_share": rollout.is_soft[rollout.completion_mask].float().mean().item(),
        "entropy": rollout.entropy[rollout.completion_mask].mean().item(),
        "zero_std_groups": (groups == groups[:, :1]).all(dim=1).float().mean().item(),
        **evaluator.behaviour_metrics(answers, rollout.lengths.tolist(), rollout.finish, correct),
    }


def sample_records(step, prompts, golds, answers, rollout, scores, rewards, advantages) -> list[dict]:
    """samples.jsonl: everything a row was and got."""
    return [
        {"step": step, "split": "train", "prompt": prompts[row // (len(golds) // len(prompts))], "gold": golds[row],
         "completion": answers[row], "finish": rollout.finish[row], "length": int(rollout.lengths[row]),
         **{f"reward/{name}": value for name, value in scores[row].items()},
         "reward": round(rewards[row].item(), 6), "advantage": round(advantages[row].item(), 6)}
        for row in range(len(golds))
    ]  # fmt: skip


def evaluate_only(config: GRPOConfig) -> Path:
    """Measures a model on the test split, greedy and sampled, and prints a table; returns the folder with eval.json.

    Every batch's answers are logged when they are done. Started again with the same settings, it goes on from there.
    """
    problems = rldatasets.load_problems(config.dataset_name, "test", config.eval_problems, config.dataset_path)
    on_gpu = torch.cuda.is_available()
    model, tokenizer = llms.load(
        config.model_name, dtype=torch.bfloat16 if on_gpu else None, trust_remote_code=config.trust_remote_code
    )
    problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, **config.prompting())
    folder = Path(config.output_dir or f"runs/eval-{Path(config.model_name).name}")
    settings = dataclasses.asdict(config)
    if config.overwrite_output_dir or not (folder / "args.json").exists():
        runs.create_folder(str(folder), config.overwrite_output_dir)
        runs.write_args(folder, settings, model.device)
    runs.refuse_other_settings(folder, settings, may_differ=("overwrite_output_dir", "output_dir"))

    table = {}
    for name, temperature, samples in (("greedy", 0.0, 1), ("sampled", config.temperature, config.eval_samples)):
        log = runs.JsonLines(folder / f"{name}.jsonl")
        table[name] = evaluator.evaluate(
            model, tokenizer, problems, samples=samples, temperature=temperature, soft=config.rollout_mode(),
            progress=True, log=log, **config.answering(),
        )  # fmt: skip
        del table[name]["records"]
    (folder / "eval.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"\n{config.model_name} on {len(problems)} test problems, 95 % Wilson intervals:")
    print(f"{'':8} {'accuracy':>8} {'interval':>16} {'flexible':>9} {'format':>7} {'tokens':>7} {'cut off':>8}")
    for name, r in table.items():
        interval = f"[{r['accuracy_low']:.1%}, {r['accuracy_high']:.1%}]"
        print(
            f"{name:8} {r['accuracy']:8.1%} {interval:>16} {r['accuracy_flexible']:9.1%} {r['format_rate']:7.1%} "
            f"{r['length']:7.1f} {r['truncated_rate']:8.1%}"
            + "".join(f"  {key} {value:.1%}" for key, value in r.items() if "@" in key)
        )
    print(f"In {folder}: eval.json, and every answer in greedy.jsonl and sampled.jsonl")
    return folder


def describe(when: str, result: dict) -> str:
    """One line about an evaluation."""
    r = {name.removeprefix("eval/"): value for name, value in result.items()}
    return (
        f"{when}: accuracy {r['accuracy']:.1%} [{r['accuracy_low']:.1%}, {r['accuracy_high']:.1%}], "
        f"greedy {r['accuracy_greedy']:.1%}, format {r['format_rate']:.1%}, "
        f"{r['length']:.1f} tokens (test, n = {r['n']})"
    )


def summarise(folder, seconds: float) -> None:
    """The end of a run, on one screen: what changed, on the same problems, and where everything is."""
    evaluations = [row for row in plotter.read_metrics(folder) if "eval/accuracy" in row]
    samples = [row for row in runs.JsonLines(folder / "samples.jsonl").read() if row["split"] == "test"]
    for step in (evaluations[0]["step"], evaluations[-1]["step"]):
        print(f"\n--- the first two test problems, answered after step {step}")
        for sample in [row for row in samples if row["step"] == step][:2]:
            print(f"{sample['question']}\n{textwrap.indent(sample['completion'], '    ')}")
            print(f"    [gold {sample['gold']}: {'right' if sample['correct'] else 'wrong'}]")
    print("\n" + describe("before", evaluations[0]))
    print(describe("after ", evaluations[-1]))
    print(f"{seconds:.0f} s. In {folder}: plots/, metrics.jsonl, samples.jsonl, checkpoints/latest")


def main() -> None:
    try:
        config = parse_config(sys.argv[1:])
        if config.doctor:
            sys.exit(doctor.run(config))
        evaluate_only(config) if config.eval_only else train(config)
    except ValueError as error:
        print(f"main.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted: logs, pictures and the checkpoints written so far are kept")


if __name__ == "__main__":
    main()
