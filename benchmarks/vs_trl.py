"""How fast is a training step beside TRL's GRPOTrainer? The same model, problems, lengths, sampling, loss, precision.

One process, rounds taking turns: before each of TRL's steps comes one of ours, on the same problems. TRL is timed from
its on_step_begin to its on_step_end: generation, rewards, loss, backward, clipping, AdamW, and its metrics; no setting
up, data loader, log, evaluation or checkpoint. Ours is step.py's step: the same things, and the copy to the actor.
Rows without an advantage are left out of our update, which changes no gradient; TRL computes them.

The same on both sides: the weights (trained, or random with one seed); one problem's answers as a group; temperature 1
over the whole vocabulary (top_k 0, top_p 1, no penalties); rewards; advantages scaled by group; TRL's default loss
(dapo, beta 0); one AdamW step a rollout, at learning rate 0, so that every round starts from the same weights and
lengths stay alike; the number of CPU threads; the precision: fp32 on a CPU, and on a GPU (or with --bf16 true) fp32
weights under bf16 autocast. The answers themselves are drawn by each side, so the mean length of both is printed.

TRL's generation is transformers' `generate` (no vLLM), its model fp32. Its variants:
    defaults          as GRPOConfig has it but for the precision, all rows in one batch: activations are recomputed
    no_checkpointing  gradient_checkpointing=False: faster, more memory
    small_batches     and --small_batch rows at a time (gradient accumulation)

Memory is measured in processes of their own: what the second update takes at its worst (the first makes AdamW's
state), on top of what was in use after its rollout.

    pip install -r benchmarks/requirements.txt
    python benchmarks/vs_trl.py --threads 1
    python benchmarks/vs_trl.py --model_name real_vocabulary --problems_per_step 4 --max_completion_length 48
Flags that are not listed below are main.py's, as in step.py.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import statistics
import tempfile
import time

import common
from common import finish, show
from step import SETTINGS, Step, Task

from tracking.run_config import parse_config

try:
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from transformers.utils import logging
except ImportError:
    trl, TrainerCallback = None, object

VARIANTS = ("defaults", "no_checkpointing", "small_batches")
# Settings of main.py that TRL has not, or not in the same way.
SAME = dict(
    loss_type="dapo", advantage_scale="group", beta=0.0, minibatches=1, updates_per_rollout=1, soft_thinking=False,
    mask_truncated=False, prefill=False, stop_at_answer=False, answer_reserve=0,
)  # fmt: skip


def main(arguments):
    parser = common.argument_parser(__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="of TRL, to compare with")
    parser.add_argument("--small_batch", type=int, default=16, help="rows in one of TRL's small batches")
    parser.add_argument("--mean_length", type=float, help="of answers, where weights are random")
    parser.add_argument("--no_memory", action="store_true", help="leave the memory of an update out")
    args, flags = parser.parse_known_args(arguments)
    if trl is None:
        raise ValueError("TRL is not installed: pip install -r benchmarks/requirements.txt")
    device = common.prepare(args)
    config = parse_config([*SETTINGS, "--model_name", args.model_name, *flags])
    for name, value in SAME.items():
        if getattr(config, name) != value:
            raise ValueError(f"--{name} {getattr(config, name)}: TRL is only set up here for {value}")
    if (config.problems_per_step * config.group_size) % args.small_batch:
        raise ValueError(f"--small_batch {args.small_batch}: must divide the rows of a step evenly")
    machine = common.measure_machine(device) | {"trl": trl.__version__}
    common.show_machine(machine)
    print(f"{args.model_name}, {config.problems_per_step} problems x {config.group_size} answers, "
          f"up to {config.max_completion_length} tokens each; TRL {trl.__version__}")  # fmt: skip
    results = {"machine": machine, "config": dataclasses.asdict(config)}
    results["memory"] = None if args.no_memory else compare_memory(args, config)
    step = Step(Task(config, args, device))
    results["variants"] = {variant: compare(variant, step, args, config, device) for variant in args.variants}
    common.write_json(args, results)


# ---------------------------------------------------------------- time


def compare(variant: str, step: Step, args, config, device) -> dict:
    """Rounds of ours and of one of TRL's variants, taking turns."""
    turns = TakeTurns(step)
    lengths = train_with_trl(variant, args, config, device, args.warmup + args.rounds, turns)
    timed = slice(args.warmup, None)
    ours, theirs, rollouts = turns.ours[timed], turns.trl[timed], turns.trl_rollout[timed]
    ratio = statistics.median(theirs) / statistics.median(ours)
    rounds = [t / o for t, o in zip(theirs, ours, strict=True)]
    mean = {"ours": statistics.mean(turns.lengths[timed]), "trl": statistics.mean(lengths[timed])}
    print(f"{variant}\n  ours {show(ours)}, {mean['ours']:.1f} tokens an answer")
    print(f"  TRL  {show(theirs)}, {mean['trl']:.1f} tokens an answer; {show(rollouts)} of it rollout and rewards")
    print(f"  {ratio:.2f} times TRL's speed (by round {min(rounds):.2f}-{max(rounds):.2f})")
    return {"ours": ours, "trl": theirs, "trl_rollout": rollouts, "ratio": ratio, "mean_length": mean}


class TakeTurns(TrainerCallback):
    """Before each of TRL's steps, one of ours; both are timed."""

    def __init__(self, step: Step):
        self.step, self.device = step, step.task.device
        self.ours: list[float] = []  # seconds of each step
        self.trl: list[float] = []
        self.trl_rollout: list[float] = []  # the part of TRL's step until its rewards are known
        self.lengths: list[float] = []  # mean of our answers, a step each

    def on_step_begin(self, args, state, control, **_):
        finish(self.device)
        started = time.perf_counter()
        rollout = self.step.run(state.global_step)
        finish(self.device)
        self.ours.append(time.perf_counter() - started)
        self.lengths.append(rollout.lengths.float().mean().item())
        self.trl_rollout.append(0.0)
        self.started = time.perf_counter()

    def on_inputs_ready(self, seconds: float) -> None:
        self.trl_rollout[-1] += seconds

    def on_step_end(self, args, state, control, **_):
        finish(self.device)
        self.trl.append(time.perf_counter() - self.started)


def train_with_trl(variant: str, args, config, device, num_steps: int, callback) -> list[float]:
    """num_steps steps of GRPOTrainer -> the mean length of the answers of each.

    callback: a TrainerCallback; its on_inputs_ready is told how long TRL took to have the inputs of a forward pass,
    which for the first batch of a step means to sample and to score.
    """
    logging.set_verbosity_error()  # TRL says that the tokenizer's stop token is not in the model's configuration
    task = Task(config, args, device)
    task.policy.generation_config.eos_token_id = task.stops
    problems = [problem for number in range(num_steps) for problem in task.problems_of(number)]
    prompts = [prompt for number in range(num_steps) for prompt in task.prompts_of(number)]
    if task.tokenizer(prompts[0])["input_ids"] != task.tokenizer(prompts[0], add_special_tokens=False)["input_ids"]:
        raise ValueError(f"{args.model_name}: its tokenizer adds tokens to a prompt, so TRL would read another one")
    lengths: list[float] = []

    def reward(completions, completion_ids, answer, **_):
        lengths.append(statistics.mean(map(len, completion_ids)))
        return task.rewards(task.scores(completions, answer))

    batch = args.small_batch if variant == "small_batches" else task.num_rows
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder, num_generations=config.group_size, max_steps=num_steps, shuffle_dataset=False,
            per_device_train_batch_size=batch, gradient_accumulation_steps=task.num_rows // batch,
            max_completion_length=config.max_completion_length, temperature=config.temperature, learning_rate=0.0,
            max_grad_norm=config.max_grad_norm, gradient_checkpointing=variant == "defaults",
            bf16=config.uses_bf16(device),
            use_cpu=not on_gpu, dataloader_pin_memory=on_gpu, disable_tqdm=True, logging_strategy="no",
            save_strategy="no", report_to="none",
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=task.policy,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts, "answer": [problem.answer for problem in problems]}),
            processing_class=task.tokenizer,
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)
        prepare_inputs = trainer._prepare_inputs

        def timed_prepare_inputs(inputs):
            started = time.perf_counter()
            prepared = prepare_inputs(inputs)
            finish(device)
            callback.on_inputs_ready(time.perf_counter() - started)
            return prepared

        trainer._prepare_inputs = timed_prepare_inputs
        trainer.train()
    return lengths


# ---------------------------------------------------------------- memory


def compare_memory(args, config) -> dict:
    """Bytes that an update takes at its worst, ours and every variant's, each in a process of its own."""
    increase = {}
    for side in ("ours", *args.variants):
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
            increase[side] = process.submit(memory_of, side, args, config).result()
    print("memory that an update takes at its worst:")
    for side, num_bytes in increase.items():
        print(f"  {side:17} {num_bytes / 2**20:6.0f} MiB" + (
            "" if side == "ours" else f", ours is {increase['ours'] / num_bytes:.2f} of it"
        ))  # fmt: skip
    return increase


def memory_of(side: str, args, config) -> int:
    device = common.prepare(args)
    memory = common.PeakMemory(device)
    if side == "ours":
        step = Step(Task(config, args, device))
        step.run(0)
        rollout = step.sample(1)
        advantages = step.score(rollout, 1)
        return memory.of(lambda: step.update(rollout, advantages))
    meter = MeasureSecond(memory)
    train_with_trl(side, args, config, device, 2, meter)
    return meter.increase


class MeasureSecond(TrainerCallback):
    """The memory of TRL's second update: from its first batch's inputs to the end of the step."""

    def __init__(self, memory: common.PeakMemory):
        self.memory = memory
        self.first_batch = False
        self.increase = 0

    def on_step_begin(self, args, state, control, **_):
        self.first_batch = True

    def on_inputs_ready(self, seconds: float) -> None:
        if self.first_batch:
            self.memory.start()
        self.first_batch = False

    def on_step_end(self, args, state, control, **_):
        self.increase = self.memory.increase()  # of the last step; the one before is written over


if __name__ == "__main__":
    common.run("vs_trl.py", main)
