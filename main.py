"""DeepSeek-R1's reinforcement learning at small scale: GRPO on a language model, with rules for rewards.

One step: take a few problems; let the policy write a group of answers to each; score every answer (is it right, is it
in the asked-for form); make the tokens of the better answers of a group likelier, those of the worse ones less likely.
No demonstration is ever shown: what the model learns, it learns from its own samples.

    python main.py                                     # a GPU: Qwen2.5-1.5B on GSM8K; none: the embedded tiny model
    python main.py --preset tiny --seed 1 --output_dir runs/seed1
    python main.py --dataset_name gsm8k --dataset_path DIR --model_name DIR
    python main.py --doctor                            # check model, data, memory and hours before a long run
    python main.py --eval_only --model_name runs/tiny/checkpoints/latest --eval_samples 8
    torchrun --nproc_per_node 4 main.py                # several GPUs: see processes.py
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

import evaluator
import grpo
import llms
import rldatasets
from engine import distributed
from rollout import generate
from tracking import checkpoints, doctor, plotter, report, run_folder, step_records, training_run
from tracking.run_config import GRPOConfig, parse_config

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
    if config.problems_per_step % (config.minibatches * distributed.world_size()):
        raise ValueError(
            f"--problems_per_step {config.problems_per_step}: must be a multiple of --minibatches {config.minibatches} "
            f"times {distributed.world_size()} processes"
        )
    distributed.check_fsdp_world_size(config.fsdp)
    num_tokens = config.max_prompt_length + config.max_completion_length
    positions = llms.max_positions(model_config)
    if num_tokens > positions:
        raise ValueError(f"{num_tokens} tokens of prompt and completion exceed the {positions} positions of the model")
    folder = checkpoint = None
    state = {"step": 0, "best": -1.0}
    if config.resume_from_checkpoint:
        folder, checkpoint = checkpoints.find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        run_folder.check_same_config(folder, dataclasses.asdict(config), MAY_DIFFER_ON_RESUME)
        state = torch.load(checkpoint / "trainer_state.pt", weights_only=True, map_location="cpu", mmap=True)
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
    actor = llms.make_actor(policy, torch.bfloat16 if bf16 else torch.float32, always_copy=config.fsdp)
    reference = None
    if config.beta > 0:
        reference = llms.make_reference(load(config.model_name)[0] if checkpoint else policy, bf16)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        llms.compile_layers(policy)
    if config.fsdp:
        distributed.shard_model(policy, llms.completion_logprobs)
    optimizer = llms.make_optimizer(policy, config.learning_rate)
    if checkpoint:
        distributed.load_optimizer_state(optimizer, state["optimizer"])
        if "reference" in state:
            reference.load_state_dict(state["reference"])
    else:
        output_dir = config.output_dir or distributed.run_on_main(run_folder.unused_folder, f"runs/{config.preset}")
        folder = distributed.run_on_main(run_folder.create_folder, output_dir, config.overwrite_output_dir)
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
    return run_steps(config, prepare(config), training_run.SignalHandler())


def run_steps(config: GRPOConfig, run: Run, interrupt: training_run.SignalHandler) -> Path:
    """The loop. When `interrupt` has a signal, or updates stay non-finite, it ends early: with a checkpoint, by raising
    training_run.TrainingStopped."""
    started = time.time()
    policy, actor, tokenizer, folder, device = run.policy, run.actor, run.tokenizer, run.folder, run.policy.device
    weights = evaluator.parse_rewards(config.rewards)
    mode = config.rollout_mode()  # k = 1 in normal sampling
    hard_mode = dataclasses.replace(mode, k=1)  # what the figures without "soft" in their name are measured in
    metrics_log, samples_log = (
        run_folder.JsonLines(folder / "metrics.jsonl"),
        run_folder.JsonLines(folder / "samples.jsonl"),
    )
    if run.last_step > 0:
        metrics_log.truncate_after(run.last_step)
        samples_log.truncate_after(run.last_step)
    settings = dataclasses.asdict(config)
    run_folder.write_args(folder, settings, device)
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
            if distributed.is_main_process():
                plotter.plot_run(folder)

    def is_due(step: int) -> bool:
        return step % config.eval_steps == 0 or step % config.save_steps == 0 or step == config.max_steps

    def evaluate_saved_step() -> None:
        """What the checkpoint's step still lacks: a signal may have ended the run before its evaluation."""
        logged = distributed.run_on_main(metrics_log.read)
        if not logged or logged[-1]["step"] != run.last_step:
            return  # somebody lost the log
        if "eval/accuracy" not in logged[-1]:
            before = [r for r in samples_log.read() if r["step"] < run.last_step or r["split"] == "train"]
            samples_log.replace(before)  # killed between the next two lines, it comes here again
            logged[-1] |= evaluate(run.last_step)
            metrics_log.replace(logged)
            tracker.log(logged[-1], step=run.last_step)
            tqdm.write(describe(f"step {run.last_step}", logged[-1]))
        if logged[-1]["eval/accuracy"] > run.best:
            run.best = logged[-1]["eval/accuracy"]
            distributed.run_on_main(checkpoints.mark_best, folder, run.last_step)

    if run.last_step == 0:
        log({"step": 0, **evaluate(0)})
    elif is_due(run.last_step):
        evaluate_saved_step()
    places = distributed.shard_indices(
        config.problems_per_step, config.minibatches
    )  # of this process's problems in a step
    bad_updates = 0  # in a row
    steps = range(run.last_step + 1, config.max_steps + 1)
    progress = tqdm(
        steps, initial=run.last_step, total=config.max_steps, unit="step", disable=not distributed.is_main_process()
    )
    for step in progress:
        problems = rldatasets.problems_of_step(run.train_problems, step, config.problems_per_step, config.seed)
        prompts = [rldatasets.build_prompt(tokenizer, problems[i].question, **config.prompting()) for i in places]
        golds = [problems[i].answer for i in places for _ in range(config.group_size)]

        # 1. The policy writes group_size answers to each problem: B = problems x group_size rows, here and in all
        # other processes together.
        with run_folder.stopwatch(device) as rollout_time:
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
                places=places,
            )

        # 2. Rules score them, and each answer is compared with its own group.
        own_rows = [i * config.group_size + n for i in places for n in range(config.group_size)]  # of the B rows
        rows = distributed.all_gather(step_records.rollout_records(rollout, own_rows, prompts, golds, weights, config))
        rows.sort(key=lambda row: row["row"])
        rewards = torch.tensor([row["reward"] for row in rows], device=device)  # (B,)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        if config.control == "random_rewards":
            rewards = torch.rand(len(rewards), generator=generator).to(device)
        advantages = grpo.compute_advantages(rewards, config.group_size, config.advantage_scale)  # (B,)
        if config.control == "shuffled_advantages":
            advantages = advantages[torch.randperm(len(advantages), generator=generator).to(device)]

        # 3. The policy's weights move towards what scored above its group, and the actor follows.
        for group in run.optimizer.param_groups:
            group["lr"] = config.learning_rate * lr_factor(step, config)
        with run_folder.stopwatch(device) as train_time:
            train_stats = update(policy, actor, run.reference, run.optimizer, rollout, advantages[own_rows], config)
            llms.sync_actor(actor, policy)
        if config.reference_refresh_steps and step % config.reference_refresh_steps == 0:
            llms.refresh_reference(run.reference, policy, config.reference_mix)

        # 4. Everything about the step is written down.
        metrics = {"step": step, **step_records.metrics(rows, config), **train_stats}
        if config.control == "random_rewards":
            metrics["zero_std_groups"] = 0.0  # what was learned from is noise, and never equal
        metrics |= {"time/rollout": rollout_time(), "time/train": train_time()}
        metrics["tokens_per_second"] = sum(row["length"] for row in rows) / (rollout_time() + train_time())
        bad_updates = bad_updates + metrics["skipped_updates"] if metrics["updates"] == 0 else 0
        is_last, signal = step == config.max_steps, distributed.all_reduce_max(interrupt.signal or 0)
        stops = not is_last and (signal or bad_updates >= MAX_BAD_UPDATES)
        saves = is_last or step % config.save_steps == 0
        if step == 1 or is_due(step):
            after = all_logprobs(policy, rollout, config, range(config.group_size))
            if distributed.is_main_process():  # it has the step's first rows
                step_records.add_token_details(rows[: config.group_size], tokenizer, rollout, after)
        if is_due(step) and not stops:
            metrics |= evaluate(step)
        log(metrics)
        for row, advantage in zip(rows, step_records.rounded(advantages), strict=True):
            row |= {"advantage": advantage}
        samples_log.append(*({"step": step, "split": "train", **row} for row in rows))
        progress.set_postfix_str(
            f"reward {metrics['reward']:.2f}, accuracy {metrics['accuracy']:.0%}, "
            f"length {metrics['completion_length']:.0f}, {metrics['tokens_per_second']:.0f} tokens/s"
        )
        if saves or stops:
            accuracy = metrics.get("eval/accuracy", -1.0)
            is_best, run.best = accuracy > run.best, max(accuracy, run.best)
            state = dict(step=step, best=run.best, optimizer=distributed.gather_optimizer_state(run.optimizer))
            if config.reference_refresh_steps:
                state["reference"] = run.reference.state_dict()
            kept, model_weights = config.save_total_limit, distributed.gather_state_dict(policy)
            if distributed.is_main_process():
                checkpoints.save_checkpoint(folder, step, policy, tokenizer, state, kept, is_best, model_weights)
        if stops:
            progress.close()
            training_run.finish(tracker)
            if distributed.is_main_process():
                report.make_report(folder)
            distributed.barrier()  # for what the main one writes
            if signal:
                raise training_run.TrainingStopped(signal, f"step {step} is saved; go on with {resume_command(folder)}")
            advice = f"look at rewards and grad_norm in {folder}/metrics.jsonl, and try a lower --learning_rate"
            raise training_run.TrainingStopped(
                None, f"{bad_updates} updates in a row were not finite; step {step} is saved; {advice}"
            )
    training_run.finish(tracker)
    if distributed.is_main_process():
        report.make_report(folder)
        summarise(folder, time.time() - started)
    distributed.barrier()  # whoever goes on finds the last checkpoint
    return folder


MAX_BAD_UPDATES = 5  # in a row
MIN_MICRO_BATCH = 64  # tokens: less is not worth trying
# Settings that a resumed run may change: they do not change what a step does. (A longer run has another schedule.)
MAY_DIFFER_ON_RESUME = (
    "max_steps", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "eval_steps", "eval_problems",
    "eval_samples", "save_steps", "save_total_limit", "report_to", "tokens_per_micro_batch", "gradient_checkpointing",
    "fsdp", "compile", "preset", "doctor", "eval_only",
)  # fmt: skip


def resume_command(folder: Path) -> str:
    """The command line of this run, told to go on."""
    own = [a for a in sys.argv[1:] if a != "--overwrite_output_dir"]
    launcher = "python" if distributed.world_size() == 1 else f"torchrun --nproc_per_node {distributed.world_size()}"
    return " ".join([launcher, "main.py", *own, f"--output_dir {folder} --resume_from_checkpoint latest"])


def update(policy, actor, reference, optimizer, rollout, advantages, config) -> dict[str, float]:
    """The optimizer steps of one rollout, of which every process has its own rows: rollout and advantages are those.
    Returns what the optimizer really used, averaged over its steps."""
    mask = rollout.draw_mask  # (B, T, K)
    if config.mask_truncated:
        mask = mask & torch.tensor([f == "stop" for f in rollout.finish], device=mask.device).view(-1, 1, 1)
    row_tokens = mask.any(dim=-1).sum(dim=1)  # (B,) positions that count
    num_updates = config.updates_per_rollout * config.minibatches

    # Steps after the first need the log-probs that the policy had when it sampled. If it is the very model that
    # sampled, the rollout holds them; a bf16 actor's would differ by rounding.
    old = ref = None
    if num_updates > 1:
        old = rollout.logprobs if actor is policy else all_logprobs(policy, rollout, config)
    if reference is not None:
        ref = all_logprobs(reference, rollout, config)

    # Sums over the optimizer steps that are taken, divided by their number at the end.
    taken, skipped, gap = 0, 0, {}
    sums = {"grad_norm": 0.0, "clip_frac": 0.0} | ({} if ref is None else {"kl": 0.0})
    share = len(advantages) // config.minibatches
    policy.train()
    for number in range(num_updates):
        start = number % config.minibatches * share
        rows = torch.arange(start, start + share, device=mask.device)  # whole groups
        # Rows without advantage have no gradient, unless the KL gives them one.
        learning = rows[(row_tokens[rows] > 0) & ((advantages[rows] != 0) | (ref is not None))]
        # Totals of the whole optimizer step, so that its micro-batches and processes add up to one big batch, also
        # when rows are left out: they count, with a gradient of zero.
        totals = distributed.all_reduce_sum({
            "num_rows": (row_tokens[rows] > 0).sum().item(), "num_tokens": row_tokens[rows].sum().item(),
            "num_draws": mask[learning].sum().item(), "learning": len(learning),
        })  # fmt: skip
        if totals.pop("learning") == 0:
            continue  # nothing to learn from: no step at all, where Adam's momentum alone would take one
        stats = None
        while stats is None:
            try:
                stats = accumulate_gradient(policy, rollout, learning, advantages, mask, old, ref, totals, config)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                # The other processes of a sharded policy are waiting inside it: there, the run has to end.
                too_large = should_reduce_batch_size(error) and not distributed.is_sharded(policy)
                if not too_large or config.tokens_per_micro_batch < MIN_MICRO_BATCH:
                    raise
            if stats is None:  # out of memory, and out of the except block, which would keep the tensors alive
                optimizer.zero_grad()
                clear_device_cache(garbage_collection=True)
                config.tokens_per_micro_batch //= 2  # for the rest of the run
                now = f"--tokens_per_micro_batch is now {config.tokens_per_micro_batch}"
                tqdm.write(f"out of memory: {now}", file=sys.stderr)
        stats = distributed.all_reduce_sum(stats)
        if taken == 0:  # the policy was still the one that sampled: any gap is the arithmetic's
            gap = {"logprob_gap": stats["logprob_gap"]}
        stats["grad_norm"] = distributed.sum_and_clip_gradients(policy, config.max_grad_norm)
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


def accumulate_gradient(policy, rollout, rows, advantages, mask, old, ref, totals, config) -> dict[str, float]:
    """Adds the gradient of `rows`' loss, micro-batch by micro-batch, to the parameters. Returns the loss's stats, and
    "logprob_gap": how far the policy's log-probs are from those of sampling, nats, mean over draws. All of them are
    this process's share of the whole."""
    totals = dict(totals)
    num_draws = totals.pop("num_draws")
    stats = collections.Counter(dict.fromkeys(["clip_frac", "logprob_gap"] + ["kl"] * (ref is not None), 0.0))
    for micro in own_micro_batches(policy, rollout, rows.tolist(), config.tokens_per_micro_batch):
        counts = mask[micro or [0]] & bool(micro)  # nothing of a row that is only read to join in
        micro = micro or [0]
        logprobs = policy_logprobs(policy, rollout, micro, config)  # (b, T, K)
        before_updates = logprobs.detach() if old is None else old[micro]
        draw_weights = None
        if config.rollout_is_cap > 0:  # the actor's rounding made some draws likelier than the policy finds them
            draw_weights = grpo.importance_weights(before_updates, rollout.logprobs[micro], config.rollout_is_cap)
        loss, loss_stats = grpo.policy_loss(
            logprobs,
            None if old is None else old[micro],
            advantages[micro],
            counts,
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
        differences = (logprobs.detach() - rollout.logprobs[micro]).abs() * counts
        stats.update(loss_stats | {"logprob_gap": differences.sum().item() / num_draws})
    return dict(stats)


@torch.no_grad()
def all_logprobs(model, rollout, config, rows=None) -> torch.Tensor:
    """Log-probs of `rows` (default all) under `model`, without gradient: (B, T, K), 0 in other rows."""
    result = torch.zeros_like(rollout.logprobs)
    rows = range(len(result)) if rows is None else rows
    for micro in own_micro_batches(model, rollout, rows, config.tokens_per_micro_batch):
        logprobs = policy_logprobs(model, rollout, micro or [0], config)
        if micro:
            result[micro] = logprobs
    return result


def policy_logprobs(model, rollout, rows: list[int], config) -> torch.Tensor:
    """llms.completion_logprobs in the precision of training."""
    score = distributed.bind_forward(model, llms.completion_logprobs)
    device = rollout.draws.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=config.uses_bf16(rollout.draws.device)):
        return score(rollout, config.temperature, rows)


def own_micro_batches(model, rollout, rows, token_budget: int) -> list[list[int]]:
    """Micro-batches of this process's rows. A sharded model is read by all processes at once: whoever has fewer
    micro-batches than another joins in with empty ones."""
    batches = llms.micro_batches(rollout, rows, token_budget)
    missing = distributed.all_reduce_max(len(batches)) - len(batches) if distributed.is_sharded(model) else 0
    return batches + [[]] * missing


def lr_factor(step: int, config) -> float:
    """Linear warm-up to 1 at the step after the warm-up, then linear decay to final_lr_fraction at the last step."""
    if step <= config.warmup_steps:
        return step / (config.warmup_steps + 1)
    decay_steps = max(1, config.max_steps - config.warmup_steps - 1)
    done = min(1.0, (step - config.warmup_steps - 1) / decay_steps)
    return 1 - done * (1 - config.final_lr_fraction)


# ---------------------------------------------------------------- data, logs, messages


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
        distributed.run_on_main(run_folder.create_folder, str(folder), config.overwrite_output_dir)
        distributed.run_on_main(run_folder.write_args, folder, settings, model.device)
    run_folder.check_same_config(folder, settings, may_differ=("overwrite_output_dir", "output_dir"))

    table = {}
    for name, temperature, samples in (("greedy", 0.0, 1), ("sampled", config.temperature, config.eval_samples)):
        log = run_folder.JsonLines(folder / f"{name}.jsonl")
        table[name] = evaluator.evaluate(
            model, tokenizer, problems, samples=samples, temperature=temperature, soft=config.rollout_mode(),
            progress=True, log=log, **config.answering(),
        )  # fmt: skip
        del table[name]["records"]
    if distributed.is_main_process():
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
    samples = [row for row in run_folder.JsonLines(folder / "samples.jsonl").read() if row["split"] == "test"]
    for step in (evaluations[0]["step"], evaluations[-1]["step"]):
        print(f"\n--- the first two test problems, answered after step {step}")
        for sample in [row for row in samples if row["step"] == step][:2]:
            print(f"{sample['question']}\n{textwrap.indent(sample['completion'], '    ')}")
            print(f"    [gold {sample['gold']}: {'right' if sample['correct'] else 'wrong'}]")
    print("\n" + describe("before", evaluations[0]))
    print(describe("after ", evaluations[-1]))
    print(f"{seconds:.0f} s. In {folder}: report.html, plots/, metrics.jsonl, samples.jsonl, checkpoints/latest")


def main() -> None:
    distributed.init_distributed()
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
        with training_run.SignalHandler() as interrupt:
            run_steps(config, run, interrupt)
    except training_run.TrainingStopped as stopped:
        sys.exit(_complain(stopped, 1 if stopped.signal is None else 128 + stopped.signal))
    except OSError as error:  # a full disk, most likely
        sys.exit(_complain(f"{error}; logs and checkpoints written so far are in {run.folder}", 1))


def _complain(message, exit_code: int) -> int:
    print(f"main.py: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    main()
