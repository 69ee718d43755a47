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

import collections
import dataclasses
import json
import math
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


@dataclass
class Run:
    """What a run holds from step to step."""

    folder: Path
    policy: PreTrainedModel  # learns: fp32
    actor: PreTrainedModel  # samples: a bf16 copy on a GPU, the policy itself on a CPU
    reference: PreTrainedModel | None  # what the KL is taken to
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    train_problems: list[rldatasets.Problem]
    test_problems: list[rldatasets.Problem]
    last_step: int  # steps that are done: 0, or a checkpoint's
    best: float  # accuracy of the best checkpoint


def prepare(config: GRPOConfig) -> Run:
    """Loads all that a run needs. Raises ValueError, one line, for whatever can be refused; an older run in output_dir
    is only replaced when nothing is left that could be."""
    train_problems = rldatasets.load_problems(config.dataset_name, "train", path=config.dataset_path)
    test_problems = rldatasets.load_problems(config.dataset_name, "test", config.eval_problems, config.dataset_path)
    mode, model_config = config.rollout_mode(), llms.load_config(config.model_name, config.trust_remote_code)
    mode.check_vocabulary(model_config.vocab_size)
    num_tokens = config.max_prompt_length + config.max_completion_length
    positions = llms.max_positions(model_config)
    if num_tokens > positions:
        raise ValueError(f"{num_tokens} tokens of prompt and completion exceed the {positions} positions of the model")
    folder = checkpoint = None
    state = {"step": 0, "best": -1.0}
    if config.resume_from_checkpoint:
        folder, checkpoint = runs.find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        runs.refuse_other_settings(folder, dataclasses.asdict(config), MAY_DIFFER_ON_RESUME)
        state = torch.load(checkpoint / "trainer_state.pt", weights_only=True, map_location="cpu")
        if state["step"] >= config.max_steps:
            raise ValueError(f"--max_steps {config.max_steps}: the checkpoint is at step {state['step']} already")

    def load(name):
        return llms.load(str(name), trust_remote_code=config.trust_remote_code)

    policy, tokenizer = load(checkpoint or config.model_name)
    mode.check_reserve(tokenizer)
    fitting = (config.max_prompt_length, config.prompting())
    train_problems, test_problems = (
        rldatasets.drop_long_prompts(problems, tokenizer, fitting[0], **fitting[1])
        for problems in (train_problems, test_problems)
    )

    bf16 = config.uses_bf16(policy.device)
    actor = llms.make_actor(policy, torch.bfloat16 if bf16 else torch.float32)
    reference = None
    if config.beta > 0:
        reference = llms.make_reference(load(config.model_name)[0] if checkpoint else policy, bf16)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        fused=policy.device.type == "cuda",
    )
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        llms.compile_layers(policy)
    if checkpoint:
        optimizer.load_state_dict(state["optimizer"])
        if "reference" in state:
            reference.load_state_dict(state["reference"])
    else:
        output_dir = config.output_dir or runs.unused_folder(f"runs/{config.preset}")
        folder = runs.create_folder(output_dir, config.overwrite_output_dir)
    return Run(
        folder,
        policy,
        actor,
        reference,
        tokenizer,
        optimizer,
        train_problems,
        test_problems,
        state["step"],
        state["best"],
    )


def train(config: GRPOConfig) -> Path:
    """Runs GRPO as configured; returns the run's folder."""
    return run_steps(config, prepare(config), runs.Interrupt())


def run_steps(config: GRPOConfig, run: Run, interrupt: runs.Interrupt) -> Path:
    """The loop. When `interrupt` has a signal, or updates stay non-finite, it ends early: with a checkpoint, by raising
    runs.Stopped."""
    started = time.time()
    policy, actor, tokenizer, folder, device = run.policy, run.actor, run.tokenizer, run.folder, run.policy.device
    weights = evaluator.parse_rewards(config.rewards)
    mode = config.rollout_mode()  # k = 1 in normal sampling
    hard_mode = dataclasses.replace(mode, k=1)  # what the figures without "soft" in their name are measured in
    metrics_log, samples_log = runs.JsonLines(folder / "metrics.jsonl"), runs.JsonLines(folder / "samples.jsonl")
    if run.last_step > 0:
        metrics_log.keep_until(run.last_step)
        samples_log.keep_until(run.last_step)
    settings = dataclasses.asdict(config)
    runs.write_args(folder, settings, device)
    tracker = Accelerator(log_with=None if config.report_to == "none" else config.report_to, project_dir=folder)
    tracker.init_trackers("r1", config={name: value for name, value in settings.items() if value is not None})

    def evaluate(step: int) -> dict[str, float]:
        """Accuracy on the test split, sampled and greedy, and in soft mode if that is trained; the first 16 sampled
        answers go to samples.jsonl."""

        def measure(temperature, soft):
            return evaluator.evaluate(
                actor, tokenizer, run.test_problems, temperature=temperature, soft=soft, **config.answering()
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

    def is_due(step: int) -> bool:
        return step % config.eval_steps == 0 or step % config.save_steps == 0 or step == config.max_steps

    if run.last_step == 0:
        log({"step": 0, **evaluate(0)})
    elif is_due(run.last_step) and "eval/accuracy" not in (rows := metrics_log.read())[-1]:
        rows[-1] |= evaluate(run.last_step)  # the run was stopped before it
        metrics_log.replace(rows)
    bad_updates = 0  # in a row
    steps = range(run.last_step + 1, config.max_steps + 1)
    progress = tqdm(steps, initial=run.last_step, total=config.max_steps, unit="step")
    for step in progress:
        problems = rldatasets.problems_of_step(run.train_problems, step, config.problems_per_step, config.seed)
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
        for group in run.optimizer.param_groups:
            group["lr"] = config.learning_rate * lr_factor(step, config)
        with runs.stopwatch(device) as train_time:
            train_stats = update(policy, actor, run.reference, run.optimizer, rollout, advantages, config)
            llms.sync_actor(actor, policy)
        if config.reference_refresh_steps and step % config.reference_refresh_steps == 0:
            llms.refresh_reference(run.reference, policy, config.reference_mix)

        # 4. Everything about the step is written down.
        row = {"step": step, **rollout_metrics(rollout, answers, scores, rewards, golds, config), **train_stats}
        row |= {"time/rollout": rollout_time(), "time/train": train_time()}
        row["tokens_per_second"] = rollout.lengths.sum().item() / (rollout_time() + train_time())
        bad_updates = bad_updates + row["skipped_updates"] if row["updates"] == 0 else 0
        is_last = step == config.max_steps
        stops = interrupt.signal or bad_updates >= MAX_BAD_UPDATES
        saves = is_last or step % config.save_steps == 0
        if is_due(step) and not stops:
            row |= evaluate(step)
        log(row)
        samples_log.append(*sample_records(step, prompts, golds, answers, rollout, scores, rewards, advantages))
        progress.set_postfix_str(
            f"reward {row['reward']:.2f}, accuracy {row['accuracy']:.0%}, "
            f"length {row['completion_length']:.0f}, {row['tokens_per_second']:.0f} tokens/s"
        )
        if saves or stops:
            accuracy = row.get("eval/accuracy", -1.0)
            is_best, run.best = accuracy > run.best, max(accuracy, run.best)
            state = dict(step=step, best=run.best, optimizer=run.optimizer.state_dict())
            if config.reference_refresh_steps:
                state["reference"] = run.reference.state_dict()
            runs.save_checkpoint(folder, step, policy, tokenizer, state, config.save_total_limit, is_best)
        if stops and not is_last:
            progress.close()
            tracker.end_training()
            if interrupt.signal:
                raise runs.Stopped(interrupt.signal, f"step {step} is saved; go on with {resume_command(folder)}")
            advice = f"look at rewards and grad_norm in {folder}/metrics.jsonl, and try a lower --learning_rate"
            raise runs.Stopped(None, f"{bad_updates} updates in a row were not finite; step {step} is saved; {advice}")
    tracker.end_training()
    summarise(folder, time.time() - started)
    return folder


MAX_BAD_UPDATES = 5  # in a row
MIN_MICRO_BATCH = 64  # tokens: less is not worth trying
# Settings that a resumed run may change: they do not change what a step does. (A longer run has another schedule.)
MAY_DIFFER_ON_RESUME = (
    "max_steps", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "eval_steps", "eval_problems",
    "eval_samples", "save_steps", "save_total_limit", "report_to", "tokens_per_micro_batch", "gradient_checkpointing",
    "compile", "preset", "doctor", "eval_only",
)  # fmt: skip


def resume_command(folder: Path) -> str:
    """The command line of this run, told to go on."""
    own = [a for a in sys.argv[1:] if a != "--overwrite_output_dir"]
    return " ".join(["python main.py", *own, f"--output_dir {folder} --resume_from_checkpoint latest"])


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
    taken, skipped, gap = 0, 0, {}
    sums = {"grad_norm": 0.0, "clip_frac": 0.0} | ({} if ref is None else {"kl": 0.0})
    share = len(advantages) // config.minibatches
    policy.train()
    for number in range(num_updates):
        start = number % config.minibatches * share
        rows = torch.arange(start, start + share, device=mask.device)  # whole groups
        # Totals of the whole optimizer step, so that its micro-batches add up to one big batch, also when rows are
        # left out below: they count, with a gradient of zero.
        totals = dict(num_rows=(row_tokens[rows] > 0).sum().item(), num_tokens=row_tokens[rows].sum().item())
        # Rows without advantage have no gradient, unless the KL gives them one.
        rows = rows[(row_tokens[rows] > 0) & ((advantages[rows] != 0) | (ref is not None))]
        if len(rows) == 0:
            continue  # nothing to learn from: no step at all, where Adam's momentum alone would take one
        stats = None
        while stats is None:
            try:
                stats = accumulate_gradient(policy, rollout, rows, advantages, mask, old, ref, totals, autocast, config)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                if not should_reduce_batch_size(error) or config.tokens_per_micro_batch < MIN_MICRO_BATCH:
                    raise
            if stats is None:  # out of memory, and out of the except block, which would keep the tensors alive
                optimizer.zero_grad()
                clear_device_cache(garbage_collection=True)
                config.tokens_per_micro_batch //= 2  # for the rest of the run
                tqdm.write(f"out of memory: --tokens_per_micro_batch is now {config.tokens_per_micro_batch}")
        if taken == 0:  # the policy was still the one that sampled: any gap is the arithmetic's
            gap = {"logprob_gap": stats["logprob_gap"]}
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        if math.isfinite(stats["grad_norm"]):
            sums = {name: value + stats[name] for name, value in sums.items()}
            taken += 1
            optimizer.step()
        else:
            skipped += 1  # one such step would ruin every weight
        optimizer.zero_grad()
    policy.eval()
    means = {name: value / max(1, taken) for name, value in sums.items()}
    used = {"lr": optimizer.param_groups[0]["lr"], "tokens_per_micro_batch": config.tokens_per_micro_batch}
    return means | gap | used | {"updates": taken, "skipped_updates": skipped}


def accumulate_gradient(
    policy, rollout, rows, advantages, mask, old, ref, totals, autocast, config
) -> dict[str, float]:
    """Adds the gradient of `rows`' loss, micro-batch by micro-batch, to the parameters. Returns the loss's stats, and
    "logprob_gap": how far the policy's log-probs are from those of sampling, nats, mean over draws."""
    stats = collections.Counter()
    num_draws = mask[rows].sum().item()
    for micro in llms.micro_batches(rollout, rows.tolist(), config.tokens_per_micro_batch):
        with autocast:
            logprobs = llms.completion_logprobs(policy, rollout, config.temperature, micro)  # (b, T, K)
        before_updates = logprobs.detach() if old is None else old[micro]
        draw_weights = None
        if config.rollout_is_cap > 0:  # the actor's rounding made some draws likelier than the policy finds them
            draw_weights = grpo.importance_weights(before_updates, rollout.logprobs[micro], config.rollout_is_cap)
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
            **totals,
        )
        loss.backward()
        differences = (logprobs.detach() - rollout.logprobs[micro]).abs() * mask[micro]
        stats.update(loss_stats | {"logprob_gap": differences.sum().item() / num_draws})
    return stats


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
        if config.eval_only:
            evaluate_only(config)
            return
        run = prepare(config)
    except ValueError as error:
        sys.exit(_complain(error, 2))
    try:
        with runs.Interrupt() as interrupt:
            run_steps(config, run, interrupt)
    except runs.Stopped as stopped:
        sys.exit(_complain(stopped, 1 if stopped.signal is None else 128 + stopped.signal))
    except OSError as error:  # a full disk, most likely
        sys.exit(_complain(f"{error}; logs and checkpoints written so far are in {run.folder}", 1))


def _complain(message, exit_code: int) -> int:
    print(f"main.py: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    main()
