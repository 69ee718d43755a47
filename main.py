"""DeepSeek-R1's reinforcement learning at small scale: GRPO on a language model, with rules for rewards.

One step: take a few problems; let the policy write a group of answers to each; score every answer (is it right, is it
in the asked-for form); make the tokens of the better answers of a group likelier and those of the worse ones less
likely. This stage shows the model no demonstration: it learns from its own samples.

    python main.py                                     # a GPU: Qwen2.5-1.5B on GSM8K; none: the embedded tiny model
    python main.py --preset tiny --seed 1 --output_dir runs/seed1
    python main.py --dataset_name gsm8k --dataset_path DIR --model_name DIR
    python main.py --config runs/tiny/args.json --seed 1 --dry_run        # show the settings and the first prompt
    python main.py --doctor                            # check model, data, memory and hours before a long run
    python main.py --eval_only --model_name runs/tiny/checkpoints/latest --eval_samples 8
    torchrun --nproc_per_node 4 main.py                # several GPUs: see docs/gpu.md
    python main.py --help

Read `train` first, then rollout.py (sampling), evaluator.py (rewards), grpo.py (advantages and the loss) and update.py
(the optimizer steps). tracking/run_config.py has all settings and the presets.
Left out on purpose: supervised fine-tuning before RL (see pipeline.py), trained reward models (a judge can be asked:
rewards/judge.py), a value network, a replay buffer.
"""

from tracking import command_line
from tracking.run_config import GRPOConfig, parse_config

if __name__ == "__main__":  # --help and refused flags are answered before torch is imported, which takes seconds
    CONFIG = command_line.parse_or_exit(parse_config)

import dataclasses
import functools
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import evaluator
import llms
import rldatasets
from dynamic_sampling import StepGroups, step_seed
from engine import distributed, lora
from engine.statistics import pack_outcomes
from grpo import compute_advantages
from rewards.functions import Rewards
from rollout import generate
from tracking import checkpoints, doctor, run_folder, step_records, summaries
from tracking.step_records import graded_records
from tracking.training_run import SignalHandler, TrainingRun
from update import TokenBudget, all_logprobs, make_trainable, set_learning_rate, update


@dataclass
class Setup:
    """What a run needs, loaded."""

    folder: Path
    policy: PreTrainedModel  # learns: fp32
    actor: PreTrainedModel  # samples: a bf16 copy on a GPU, the policy itself on a CPU
    reference: PreTrainedModel | None  # the KL is taken to it
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    train_problems: list[rldatasets.Problem]
    test_problems: list[rldatasets.Problem]
    rewards: Rewards  # what scores answers
    last_step: int  # steps that are done: 0, or a checkpoint's
    best: float  # accuracy of the best checkpoint


# ---------------------------------------------------------------- the training loop


def train(
    config: GRPOConfig,
    setup: Setup | None = None,
    signals: SignalHandler | None = None,
    how_to_resume: str | None = None,
) -> Path:
    """Runs GRPO as configured; returns the run's folder. setup, signals: default, `prepare` and TrainingRun make them.
    how_to_resume: what is said when a signal ends the run; default, this script's command line.

    Raises ValueError, one line, for what cannot be run, and training_run.TrainingStopped, after a checkpoint, when a
    signal came or updates stay non-finite.
    """
    config = with_prompt_date(config)
    setup, started = setup or prepare(config), time.time()
    policy, actor, tokenizer, optimizer = setup.policy, setup.actor, setup.tokenizer, setup.optimizer
    prompt_format, G = config.prompt_format(tokenizer), config.group_size
    indices = distributed.shard_indices(config.problems_per_step, config.minibatches)  # of this process's problems
    own_rows = [i * G + n for i in indices for n in range(G)]  # of the step's B = problems x group_size rows
    budget = TokenBudget(config.tokens_per_micro_batch)
    run = TrainingRun(
        setup.folder, config, policy=policy, tokenizer=tokenizer, optimizer=optimizer, max_steps=config.max_steps,
        last_step=setup.last_step, best=setup.best, evaluate=functools.partial(evaluate, config, setup),
        more_state=functools.partial(reference_state, config, setup), signals=signals,
        how_to_resume=how_to_resume or f"go on with {resume_command(setup.folder)}",
    )  # fmt: skip
    with run:
        for step in run.steps():
            groups = StepGroups(setup.train_problems, config, step, indices)
            for problems, slots in groups.rounds():  # one, unless --dynamic_sampling replaces groups of equal rewards
                # 1. Sample: the policy writes group_size answers to each problem.
                prompts = [prompt_format.prompt(tokenizer, problem.question) for problem in problems]
                with run.timer("rollout"):
                    rollout = generate(actor, tokenizer, prompts, **groups.sampling()) if prompts else None

                # 2. Score: rewards grade the answers of all processes.
                records = graded_records(rollout, problems, prompts, slots, config, setup.rewards, prompt_format)
                groups.add(rollout, records)
            rollout, records = groups.rollout, groups.records
            rewards = torch.tensor([record["reward"] for record in records], device=policy.device)  # (B,)

            # 3. Compare: an answer's advantage is its reward relative to its own group.
            rewards = control_rewards(rewards, config, step)
            advantages = compute_advantages(rewards, G, **config.advantages())  # (B,)
            advantages = control_advantages(advantages, config, step)

            # 4. Update: the weights move towards what scored above its group, and the actor follows.
            set_learning_rate(optimizer, config, step, config.max_steps)
            with run.timer("train"):
                stats = update(policy, actor, setup.reference, optimizer, rollout, advantages[own_rows], config, budget)
                llms.sync_actor(actor, policy)
            if config.reference_refresh_steps and step % config.reference_refresh_steps == 0:
                llms.refresh_reference(setup.reference, policy, config.reference_mix)

            # 5. Log. The run evaluates, saves and stops when due.
            metrics = step_records.metrics(records, config) | stats
            if config.control == "random_rewards":
                metrics["zero_std_groups"] = 0.0  # the rewards that were learned from are noise, and never equal
            metrics |= groups.cost() | run.times(groups.num_tokens)
            if step == 1 or run.is_due(step):  # every process joins in; the main one has the step's first group
                after = all_logprobs(policy, rollout, config, budget, rows=range(G))
                if distributed.is_main_process():
                    step_records.add_token_details(records[:G], tokenizer, rollout, after)
            samples = step_records.samples(records, advantages)
            run.finish_step(metrics, samples, note=step_records.progress_note(metrics))
    if distributed.is_main_process():
        summaries.print_run_summary(setup.folder, time.time() - started)
    return setup.folder


# The controls' random numbers are not those of the rollout, which step_seed alone gives: noise must be independent of
# the answers. Below 2^32, beyond which torch's generator ignores a seed's digits.
CONTROL_SEED = 1_500_000_001


def control_rewards(rewards: torch.Tensor, config: GRPOConfig, step: int) -> torch.Tensor:
    """The rewards (B,), or uniform noise in their place with --control random_rewards."""
    if config.control != "random_rewards":
        return rewards
    generator = torch.Generator().manual_seed(step_seed(config, step) + CONTROL_SEED)
    return torch.rand(len(rewards), generator=generator).to(rewards.device)


def control_advantages(advantages: torch.Tensor, config, step: int) -> torch.Tensor:
    """The advantages, (B,) or in self-play (games, 2), or the same ones dealt to other rows, and seats, with --control
    shuffled_advantages. config: GRPOConfig or SelfPlayConfig."""
    if config.control != "shuffled_advantages":
        return advantages
    generator = torch.Generator().manual_seed(step_seed(config, step) + CONTROL_SEED)
    order = torch.randperm(advantages.numel(), generator=generator).to(advantages.device)
    return advantages.flatten()[order].view_as(advantages)


def evaluate(config: GRPOConfig, setup: Setup) -> tuple[dict[str, float], list[dict]]:
    """Accuracy on the test split, sampled and greedy, and in soft mode if that is trained -> metrics, and the first 16
    sampled answers."""
    mode = config.rollout_mode()
    hard_mode = dataclasses.replace(mode, k=1)  # metrics without "soft" in their name are measured in it

    answering = config.answering(setup.tokenizer)

    def measure(temperature, soft):
        return evaluator.evaluate(
            setup.actor, setup.tokenizer, setup.test_problems, temperature=temperature, soft=soft, **answering
        )

    sampled, greedy = measure(config.temperature, hard_mode), measure(0.0, hard_mode)
    records = sampled.pop("records")
    samples = [{"split": "test"} | record for record in records[:16]]
    metrics = {f"eval/{name}": value for name, value in sampled.items()}
    metrics["eval/accuracy_greedy"] = greedy["accuracy"]
    metrics["eval/outcomes"] = pack_outcomes([record["correct"] for record in records])
    metrics["eval/outcomes_greedy"] = pack_outcomes([record["correct"] for record in greedy["records"]])
    if mode.k > 1:
        metrics["eval/accuracy_soft"] = measure(config.temperature, mode)["accuracy"]
    return metrics, samples


# ---------------------------------------------------------------- before and after the loop

# Settings that a resumed run may change: they do not change what a step does. (A longer run has another schedule.)
MAY_DIFFER_ON_RESUME = (
    "max_steps", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "eval_steps", "eval_problems",
    "eval_samples", "save_steps", "save_total_limit", "save_merged", "report_to", "tokens_per_micro_batch",
    "gradient_checkpointing", "fsdp", "compile", "preset", "dry_run", "doctor", "eval_only",
)  # fmt: skip


def prepare(config: GRPOConfig) -> Setup:
    """Loads all that a run needs. Raises ValueError, one line, for whatever can be refused. An older run in output_dir
    is replaced only when nothing is left that could be refused."""
    config = with_prompt_date(config)
    train_problems = rldatasets.load_problems(config.dataset_name, "train", path=config.dataset_path)
    test_problems = rldatasets.load_problems(config.dataset_name, "test", config.eval_problems, config.dataset_path)
    overlap = rldatasets.overlap_note(train_problems, test_problems)
    if overlap and distributed.is_main_process():
        print(overlap, file=sys.stderr)
    model_name = checkpoints.resolve_model_name(config.model_name)
    mode, model_config = config.rollout_mode(), llms.load_config(model_name, config.trust_remote_code)
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
    state = {"step": 0, "best": -1.0, "optimizer": None}
    if config.resume_from_checkpoint:
        folder, checkpoint, state = checkpoints.find_resumed(config, MAY_DIFFER_ON_RESUME)

    def load(name):
        return llms.load(str(name), trust_remote_code=config.trust_remote_code)

    policy, tokenizer = load(model_name if config.lora_rank else checkpoint or model_name)
    mode.check_reserve(tokenizer)
    rewards = step_records.run_rewards(config)
    train_problems, test_problems = (
        rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, config.prompt_format())
        for problems in (train_problems, test_problems)
    )

    bf16 = config.uses_bf16(policy.device)
    separate = config.fsdp or config.lora_rank > 0
    actor = llms.make_actor(policy, torch.bfloat16 if bf16 else torch.float32, always_copy=separate)
    reference = None
    if config.lora_rank:
        lora.add_adapters(policy, **config.adapters(), bf16=bf16, save_merged=config.save_merged)
        reference = policy if config.beta > 0 else None  # with its adapters off
        if checkpoint:
            lora.load_adapter(policy, checkpoint)
            llms.sync_actor(actor, policy)
    elif config.beta > 0:
        reference = llms.make_reference(load(model_name)[0] if checkpoint else policy, bf16)
        if "reference" in state:
            reference.load_state_dict(state["reference"])
    optimizer = make_trainable(policy, config, llms.completion_logprobs, state["optimizer"])
    if not checkpoint:
        distributed.run_on_main(checkpoints.try_saving, policy, tokenizer)
        output_dir = config.output_dir or distributed.run_on_main(run_folder.unused_folder, f"runs/{config.preset}")
        folder = distributed.run_on_main(run_folder.create_folder, output_dir, config.overwrite_output_dir)
        distributed.run_on_main(run_folder.keep_copies, folder / "rewards", rewards.files)
    return Setup(
        folder, policy, actor, reference, tokenizer, optimizer, train_problems, test_problems, rewards, state["step"],
        state["best"],
    )  # fmt: skip


def with_prompt_date(config: GRPOConfig) -> GRPOConfig:
    """The config with the date that its chat template writes: a resumed run's, else today's."""
    resumed = [Path(config.output_dir).expanduser()] if config.resume_from_checkpoint and config.output_dir else []
    return run_folder.fix_prompt_date(config, *resumed)


def reference_state(config: GRPOConfig, setup: Setup) -> dict:
    """What a checkpoint holds beside the policy and the optimizer: a reference that has been refreshed."""
    return {"reference": setup.reference.state_dict()} if config.reference_refresh_steps else {}


def resume_command(folder: Path) -> str:
    """The command line of this run, told to go on; for a shell in the same working folder."""
    own: list[str] = []
    replaced = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
    given = sys.argv[1:]
    while given:
        flag, *given = given
        name, has_value, _ = flag.removeprefix("--").replace("-", "_").partition("=")
        if not flag.startswith("--") or name not in replaced:
            own.append(flag)
        elif not has_value and given and not given[0].startswith("--"):
            del given[0]  # its value
    script = Path(__file__).resolve()
    script = script.name if script.parent == Path.cwd() else str(script)
    processes = distributed.world_size()
    launcher = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(processes)]
    going_on = ["--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    return shlex.join([*launcher, script, *own, *going_on])


def main(config: GRPOConfig) -> int | None:
    distributed.init_distributed()
    if config.dry_run:
        return summaries.print_dry_run(with_prompt_date(config))
    if config.doctor:
        return doctor.run(dataclasses.replace(config, model_name=checkpoints.resolve_model_name(config.model_name)))
    if config.eval_only:
        summaries.evaluate_only(config)
    else:
        train(config)


if __name__ == "__main__":
    command_line.run_script(main, CONFIG)
