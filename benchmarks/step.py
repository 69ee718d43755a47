"""What does a whole training step cost, and which part of it? Rollout, scores, forward, backward, optimizer, sync.

The step is main.py's, with its functions, on new problems every round. Flags that are not listed below are main.py's
and shape the step; those it starts from are in SETTINGS. The learning rate is 0: the optimizer does all its work, the
weights stay, and so every round writes answers of the same kind. A model with random weights earns no rewards, so its
rows are given 1 and 0 in turn; otherwise every advantage would be 0 and nothing would be left to train on.

Left out on purpose: evaluation, plots, checkpoints and the log, which a run makes every few steps or in no time.

    python benchmarks/step.py                                                        # the tiny model, 16 x 8 rows
    python benchmarks/step.py --model_name real_vocabulary --problems_per_step 4 --max_completion_length 48
    python benchmarks/step.py --model_name qwen2.5-1.5b --problems_per_step 16 --group_size 16 \\
        --max_completion_length 786 --mean_length 250 --tokens_per_micro_batch 8192   # a GPU
"""

import contextlib
import dataclasses
import statistics
import time

import common
import torch
from common import finish, show

import evaluator
import grpo
import llms
import rldatasets
from rollout import generate
from tracking import step_records
from tracking.run_config import GRPOConfig, parse_config
from update import update

# The tiny preset's task. One optimizer step a rollout, and the loss that TRL takes by default, so that vs_trl.py
# compares the same step.
SETTINGS = (
    "--preset tiny --problems_per_step 16 --minibatches 1 --learning_rate 0 --loss_type dapo --advantage_scale group"
).split()
PHASES = ("rollout", "scores", "forward", "backward", "optimizer", "sync")


def main(arguments):
    parser = common.argument_parser(__doc__)
    parser.add_argument("--mean_length", type=float, help="of answers, where weights are random")
    parser.add_argument("--profile", action="store_true", help="show the operations that take the most time")
    args, flags = parser.parse_known_args(arguments)
    device = common.prepare(args)
    config = parse_config([*SETTINGS, "--model_name", args.model_name, *flags])
    machine = common.measure_machine(device)
    common.show_machine(machine)
    step = Step(Task(config, args, device))
    print(
        f"{args.model_name}, {config.problems_per_step} problems x {config.group_size} answers, "
        f"up to {config.max_completion_length} tokens each"
    )
    rounds = [measure(step, number) for number in range(args.warmup + args.rounds)][args.warmup :]
    whole = [sum(r[phase] for phase in PHASES) for r in rounds]
    tokens = [r["tokens"] for r in rounds]
    rates = [n / s for n, s in zip(tokens, whole, strict=True)]
    print(f"{'whole step':>12}: {show(whole, digits=3)}, {show(rates, 'tokens/s', digits=0)}")
    for phase in PHASES:
        times = [r[phase] for r in rounds]
        print(f"{phase:>12}: {show(times, digits=3):24} {statistics.median(times) / statistics.median(whole):4.0%}")
    learning = statistics.mean(r["learning_rows"] for r in rounds)
    print(
        f"{statistics.mean(tokens) / step.task.num_rows:.1f} tokens an answer; {learning:.0%} of rows have an advantage"
    )
    memory = common.PeakMemory(device)
    increase = memory.of(lambda: step.run(args.warmup + args.rounds))
    print(f"peak memory of a step, beyond the models and the optimizer: {increase / 2**20:.0f} MiB")
    if args.profile:
        profile(lambda: step.run(args.warmup + args.rounds), device)
    common.write_json(
        args,
        {
            "machine": machine,
            "config": dataclasses.asdict(config),
            "seconds": whole,
            "tokens_per_second": statistics.median(rates),
            "phases": {phase: [r[phase] for r in rounds] for phase in PHASES},
            "mean_length": statistics.mean(tokens) / step.task.num_rows,
            "learning_rows": learning,
            "memory_increase": increase,
        },
    )


class Task:
    """What is learned: the model, the problems of every round, and the rewards."""

    def __init__(self, config: GRPOConfig, args, device: torch.device):
        self.config, self.device = config, device
        self.policy, self.tokenizer = common.load_model(config.model_name, args.vocab_size, device)
        self.random_weights = common.has_random_weights(config.model_name)
        self.reward_weights = {"turn": 1.0} if self.random_weights else evaluator.parse_rewards(config.rewards)
        self.stops = llms.stop_ids(self.policy, self.tokenizer)
        if self.random_weights and args.mean_length is not None:
            self.stops += common.stop_ids_for(args.mean_length, self.policy.config.vocab_size)
        self.problems = rldatasets.load_problems("arithmetic", "train")

    @property
    def num_rows(self) -> int:
        return self.config.problems_per_step * self.config.group_size

    def problems_of(self, number: int) -> list[rldatasets.Problem]:
        """The problems of round `number`, in the dataset's order."""
        start = number * self.config.problems_per_step
        return [self.problems[i % len(self.problems)] for i in range(start, start + self.config.problems_per_step)]

    def prompts_of(self, number: int) -> list[str]:
        prompt_format = self.config.prompt_format()
        return [prompt_format.prompt(self.tokenizer, p.question) for p in self.problems_of(number)]

    def scores(self, answers: list[str], golds: list[str]) -> list[dict[str, float]]:
        if self.random_weights:
            return [{"turn": float(row % 2)} for row in range(len(answers))]
        return [
            evaluator.score(answer, gold, self.reward_weights, self.config.tags)
            for answer, gold in zip(answers, golds, strict=True)
        ]

    def rewards(self, scores: list[dict[str, float]]) -> list[float]:
        return [evaluator.total(s, self.reward_weights) for s in scores]


class Step:
    """main.py's training step on a task, part by part."""

    def __init__(self, task: Task):
        self.task = task
        config, device, policy = task.config, task.device, llms.speed_up(task.policy)
        self.actor = llms.make_actor(policy, torch.bfloat16 if config.uses_bf16(device) else torch.float32)
        if config.gradient_checkpointing:
            llms.checkpoint_gradients(policy)
        if config.compile:
            llms.compile_layers(policy)
        self.optimizer = llms.make_optimizer(policy, learning_rate=0.0)

    def sample(self, number: int):
        """The rollout of round `number`."""
        config = self.task.config
        return generate(
            self.actor, self.task.tokenizer, self.task.prompts_of(number), group_size=config.group_size,
            max_new_tokens=config.max_completion_length, temperature=config.temperature, stop_ids=self.task.stops,
            stop_tag=config.stop_tag(), soft=config.rollout_mode(), seed=number,
        )  # fmt: skip

    def score(self, rollout, number: int) -> torch.Tensor:
        """Advantages (B,) of its rows. The metrics that main.py logs are computed too."""
        config = self.task.config
        problems, prompts = self.task.problems_of(number), self.task.prompts_of(number)
        rows = step_records.graded_records(rollout, problems, prompts, list(range(len(problems))), config)
        step_records.metrics(rows, config)
        answers, golds = ([row[name] for row in rows] for name in ("completion", "gold"))
        rewards = torch.tensor(self.task.rewards(self.task.scores(answers, golds)), device=self.task.device)
        return grpo.compute_advantages(rewards, config.group_size, config.advantage_scale)

    def update(self, rollout, advantages) -> None:
        update(self.task.policy, self.actor, None, self.optimizer, rollout, advantages, self.task.config)

    def sync(self) -> None:
        llms.sync_actor(self.actor, self.task.policy)

    def run(self, number: int):
        """All of it, for round `number` -> the rollout."""
        rollout = self.sample(number)
        self.update(rollout, self.score(rollout, number))
        self.sync()
        return rollout


def measure(step: Step, number: int) -> dict[str, float]:
    """One step -> seconds of every phase, and how much there was to do."""
    clock = Clock(step.task.device)
    rollout = step.sample(number)
    clock.lap("rollout")
    advantages = step.score(rollout, number)
    clock.lap("scores")
    with timed_update(step.optimizer, clock):
        step.update(rollout, advantages)
    clock.lap("forward")  # all that is neither backward nor optimizer: log-probs, the loss, micro-batches
    step.sync()
    clock.lap("sync")
    learning = (advantages != 0).float().mean().item()
    return {**clock.laps, "tokens": int(rollout.lengths.sum()), "learning_rows": learning}


class Clock:
    """Adds up seconds by phase. On a GPU the end of every phase waits for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.laps = dict.fromkeys(PHASES, 0.0)
        finish(device)
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What passed since the last lap was `phase`."""
        finish(self.device)
        now = time.perf_counter()
        self.laps[phase] += now - self.last
        self.last = now


@contextlib.contextmanager
def timed_update(optimizer, clock: Clock):
    """Within it, what happens in Tensor.backward and in optimizer.step gets laps of its own, whoever calls them."""
    backward = torch.Tensor.backward

    def timed_backward(*args, **kwargs):
        clock.lap("forward")
        backward(*args, **kwargs)
        clock.lap("backward")

    hooks = [
        optimizer.register_step_pre_hook(lambda *_: clock.lap("forward")),
        optimizer.register_step_post_hook(lambda *_: clock.lap("optimizer")),
    ]
    torch.Tensor.backward = timed_backward
    try:
        yield
    finally:
        torch.Tensor.backward = backward
        for hook in hooks:
            hook.remove()


def profile(work, device: torch.device) -> None:
    """Prints the operations of one call that take the most time themselves, and how often each was called."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=40))


if __name__ == "__main__":
    common.run("step.py", main)
