"""Settings: one dataclass per script, made of sections; presets; and the command line that fills them.

A setting is a field with its default, its help, and its choices where there are few. `parse` reads the command line:
defaults, overridden by the preset, overridden by --config's file, overridden by the flags. Impossible values are
refused, in one line that names the value and the valid choices, before any model is loaded.

Nothing here imports torch or transformers, so --help and refusals answer at once. `uses_bf16` and the like take what
they need as arguments.
Left out on purpose: inheritance between presets or between configuration files. A run writes all its settings to
args.json, which --config reads (config_file.py).
"""

import ctypes
import dataclasses
import datetime
import importlib.util
import math
import os
from dataclasses import dataclass, field

import evaluator
import rldatasets
from engine import device
from engine.sampling_params import SAMPLINGS, STARTS, WEIGHTINGS, SoftThinking
from rewards.judge import check_judge
from tracking.argument_parser import ArgumentParser, parse_flags, read_early
from tracking.config_file import read_config

# The choices of grpo.py, which imports torch; a test compares them.
LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
ADVANTAGE_SCALES = ("group", "batch", "none")
ADVANTAGE_BASELINES = ("mean", "leave_one_out")

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}  # packages


def setting(default, help, choices=None):
    """A field of a section: what it is by default, what --help says, and its choices where there are few."""
    return field(default=default, metadata={"help": help} | ({"choices": choices} if choices else {}))


def check_values(config, may_be_zero: tuple[str, ...]) -> None:
    """What holds for the settings of every script: choices are kept, numbers are finite and above 0 (or 0 or more).

    Raises ValueError, one line, for the first setting that is wrong.
    """
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"--{f.name} {value!r}: choose from {', '.join(choices)}")
        if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and f.name in may_be_zero):
            low = "0 or more" if f.name in may_be_zero else "above 0"
            raise ValueError(f"--{f.name} {value}: must be a finite number, {low}")
    check_date(config.prompt_date)
    if config.report_to != "none" and not any(map(importlib.util.find_spec, TRACKERS[config.report_to])):
        raise ValueError(f"--report_to {config.report_to}: the package is not here (pip install {config.report_to})")


def check_dataset_name(config) -> None:
    if config.dataset_path is None and config.dataset_name not in rldatasets.DATASETS:
        raise ValueError(f"--dataset_name {config.dataset_name!r}: choose from {', '.join(rldatasets.DATASETS)}")


def check_date(date: str | None) -> None:
    try:
        datetime.date.fromisoformat(date or "2026-01-01")
    except ValueError as error:
        raise ValueError(f"--prompt_date {date!r}: give it as YYYY-MM-DD") from error


@dataclass
class ModelAndData:
    _argument_group_name = "model and data"
    model_name: str = setting(
        "tiny", "hub name, local folder, GGUF file, or a model of this repo: tiny, tiny_student, smollm2-135m"
    )
    dataset_name: str = setting("arithmetic", f"{' or '.join(rldatasets.DATASETS)}; any name when a path is given")
    dataset_path: str | None = setting(
        None, "a folder with train.jsonl and test.jsonl in GSM8K's shape, or one file; also JSON arrays, CSV, Parquet"
    )
    max_prompt_length: int = setting(128, "problems with a longer prompt (tokens) are dropped and counted, never cut")
    trust_remote_code: bool = setting(False, "run code that comes with the model")
    tags: str = setting("reasoning", "name of the reasoning block (think: as in R1)", tuple(evaluator.TAGS))
    prompt_style: str = setting(
        "auto", "chat: the tokenizer's template; plain: R1-Zero's, for base models", rldatasets.PROMPT_STYLES
    )
    prefill: bool = setting(False, "write the opening tag of the reasoning for the model; graded as if it had")
    prompt_date: str | None = setting(
        None, "YYYY-MM-DD, for chat templates that write today's date; default: the day the run began"
    )


@dataclass
class Sampling:
    _argument_group_name = "sampling"
    problems_per_step: int = setting(16, "different problems in a step")
    group_size: int = setting(8, "answers to each problem")
    max_completion_length: int = setting(72, "tokens of an answer, at most")
    temperature: float = setting(1.0, "of sampling; the loss uses the log-probs at the same temperature")
    stop_at_answer: bool = setting(False, "</answer> ends an answer too: base models often write on after it")


@dataclass
class Objective:
    _argument_group_name = "rewards and loss"
    rewards: str = setting(
        "accuracy:1,format:0.5",
        f"name:weight, comma-separated: {', '.join(evaluator.REWARDS)}, judge, or file.py:function of your own",
    )
    reward_timeout: float = setting(10.0, "seconds that a call of a function of your own may take")
    loss_type: str = setting("grpo", "explained in grpo.policy_loss", LOSS_TYPES)
    advantage_scale: str = setting("group", "whose standard deviation divides advantages", ADVANTAGE_SCALES)
    advantage_baseline: str = setting(
        "mean", "what is subtracted from a reward: its group's mean, or that of the others (RLOO)", ADVANTAGE_BASELINES
    )
    pass_at_k: int = setting(1, "reward the best of k answers, k up to group_size (pass@k training); 1: each by itself")
    clip_low: float = setting(0.2, "the ratio's objective is clipped below 1 - clip_low")
    clip_high: float = setting(0.2, "... and above 1 + clip_high (more than clip_low: DAPO's clip-higher)")
    clip_delta: float = setting(
        0.0, "bound the ratio where the advantage is negative too (above 1 + clip_high); 0: off"
    )
    top_entropy: float = setting(1.0, "learn from this share of the tokens, those of the highest entropy; 1: all")
    beta: float = setting(0.0, "weight of the KL to a reference, the starting model; 0 needs no reference")
    reference_refresh_steps: int = setting(0, "the policy becomes the reference every N steps; 0: never")
    reference_mix: float = setting(1.0, "... or is mixed into it with this weight")
    rollout_is_cap: float = setting(0.0, "weight draws by min(p_policy / p_actor, this), where the two differ; 0: off")
    rollout_is_mask: float = setting(
        0.0, "leave out answers whose p_policy / p_actor is above this or below its inverse (above 1); 0: off"
    )
    dynamic_sampling: int = setting(
        0, "replace groups of equal rewards by new problems, in up to N more rounds; 0: off"
    )
    mask_truncated: bool = setting(False, "leave answers that hit the length limit out of the loss (not the baseline)")
    control: str = setting(
        "none", "the same run with the signal destroyed", ("none", "shuffled_advantages", "random_rewards")
    )


@dataclass
class Judge:
    _argument_group_name = "judge (rewards/judge.py; with judge in --rewards)"
    judge_model: str | None = setting(None, "a model that compares answers, as model_name; random: a coin, the control")
    judge_url: str | None = setting(None, "... or an OpenAI-compatible server (needs openai; key in OPENAI_API_KEY)")
    judge_name: str | None = setting(None, "the server's name of the model")
    judge_timeout: float = setting(30.0, "seconds that a request to the server may take")
    judge_retries: int = setting(2, "requests after one without a verdict; then it is counted and left out")


@dataclass
class OptimizerSteps:
    """What main.py and self_play.py set alike."""

    max_steps: int = setting(60, "steps of the run: each samples, then learns from what was sampled")
    learning_rate: float = setting(1e-6, "peak of the schedule")
    warmup_steps: int = setting(5, "linear warm-up")
    final_lr_fraction: float = setting(1.0, "linear decay to this share of the peak at the end of the run")
    updates_per_rollout: int = setting(1, "passes over what was sampled; 1 with 1 minibatch is exactly on-policy")
    minibatches: int = setting(1, "optimizer steps a pass, each on an equal share of the groups")
    tokens_per_micro_batch: int = setting(
        2048, "tokens in one forward and backward pass, a group's prompt once (memory, not results)"
    )
    bf16: bool | None = setting(None, "fp32 weights under bf16 autocast, and a bf16 actor; default: on a GPU")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, about a third more time")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    seed: int = setting(0, "of the order of the data, or the start positions, and of the sampling")


@dataclass
class Optimization(OptimizerSteps):
    _argument_group_name = "optimization"
    lora_rank: int = setting(0, "learn adapters of this rank and freeze the model (engine/lora.py; needs peft); 0: off")
    lora_alpha: float = setting(32.0, "adapters are multiplied by lora_alpha / lora_rank")
    compile: bool = setting(False, "torch.compile the policy's MLPs: a minute at first, then faster on a GPU")
    fsdp: bool = setting(False, "several processes: divide the fp32 weights and Adam's moments among them (FSDP2)")


@dataclass
class RunFolder:
    """What main.py and self_play.py set alike."""

    output_dir: str | None = setting(None, "the run's folder; default runs/PRESET, numbered if taken")
    overwrite_output_dir: bool = setting(False, "replace the run that is in output_dir")
    resume_from_checkpoint: str | None = setting(None, "latest, best, step-N or a path: go on from there in output_dir")
    eval_steps: int = setting(10, "evaluate every N steps; also at first, at last and with checkpoints")
    save_steps: int = setting(60, "checkpoint every N steps (also after the last)")
    save_total_limit: int = setting(2, "keep the newest N checkpoints, and latest and best")
    report_to: str = setting("none", "a tracker, through accelerate", ("none", *TRACKERS))


@dataclass
class Output(RunFolder):
    _argument_group_name = "evaluation and output"
    eval_problems: int = setting(1024, "how many test problems")
    save_merged: bool = setting(False, "with --lora_rank: checkpoints hold the merged model too, beside the adapter")
    dry_run: bool = setting(False, "print the effective settings and the first prompt, and train nothing")
    doctor: bool = setting(False, "check model, data and machine, estimate memory and hours, and train nothing")
    eval_only: bool = setting(False, "measure the model on the test split, greedy and sampled, and train nothing")
    eval_samples: int = setting(1, "answers sampled to each problem by eval_only; N > 1: pass@2, 4, ... N, majority")


@dataclass
class Soft:
    _argument_group_name = "soft thinking (soft_thinking.py)"
    soft_thinking: bool = setting(False, "reason in mixtures of tokens")
    soft_thinking_k: int = setting(2, "tokens drawn at a position")
    soft_thinking_temperature: float = setting(1.0, "of prob and gumbel weights; sampling has its own")
    soft_thinking_sampling: str = setting(
        "sample", "sample: independent draws; gumbel: noisy weights; topk: deterministic, for inference only", SAMPLINGS
    )
    soft_thinking_weighting: str = setting("count", "of independent draws; count: exact gradient", WEIGHTINGS)
    soft_thinking_start: str = setting("tag", "when soft thinking begins", STARTS)
    soft_thinking_cold_stop_entropy: float = setting(0.0, "close the reasoning at lasting entropy under it (nats)")
    soft_thinking_cold_stop_steps: int = setting(256, "... for so many steps in a row")
    answer_reserve: int = setting(0, "close the reasoning by force with so many tokens left (with or without mixtures)")


SECTIONS = (ModelAndData, Sampling, Soft, Objective, Judge, Optimization, Output)
MAY_BE_ZERO = (
    "dynamic_sampling", "clip_low", "clip_high", "beta", "reference_refresh_steps", "rollout_is_cap",
    "rollout_is_mask", "clip_delta", "lora_rank", "judge_retries", "learning_rate", "warmup_steps",
    "final_lr_fraction", "seed",
    "soft_thinking_temperature", "soft_thinking_cold_stop_entropy", "answer_reserve",
)  # fmt: skip


@dataclass
class GRPOConfig(*reversed(SECTIONS)):
    """All settings of a run. Refuses impossible values with a ValueError of one line."""

    preset: str = "tiny"

    def __post_init__(self):
        check_values(self, MAY_BE_ZERO)
        check_dataset_name(self)
        for name in ("final_lr_fraction", "reference_mix", "top_entropy"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at most 1")
        if self.reference_refresh_steps and self.beta == 0:
            raise ValueError(
                f"--reference_refresh_steps {self.reference_refresh_steps}: there is no reference at --beta 0"
            )
        if self.group_size == 1:
            raise ValueError("--group_size 1: an answer is compared with its group, so a group needs 2 or more")
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            raise ValueError(f"--lora_rank {self.lora_rank}: the package peft is not here (pip install peft)")
        for name in ("fsdp", "compile", "reference_refresh_steps"):
            if self.lora_rank and getattr(self, name):
                raise ValueError(f"--{name} {getattr(self, name)}: not with --lora_rank")
        if self.save_merged and not self.lora_rank:
            raise ValueError("--save_merged True: without --lora_rank every checkpoint is a whole model")
        if self.pass_at_k > self.group_size:
            raise ValueError(f"--pass_at_k {self.pass_at_k}: must be at most --group_size {self.group_size}")
        if 0 < self.clip_delta <= 1 + self.clip_high:
            raise ValueError(
                f"--clip_delta {self.clip_delta}: must be above 1 + clip_high = {1 + self.clip_high}, or 0"
            )
        if 0 < self.rollout_is_mask <= 1:
            raise ValueError(f"--rollout_is_mask {self.rollout_is_mask}: must be above 1, or 0")
        if self.soft_thinking_sampling == "topk":
            raise ValueError(
                "--soft_thinking_sampling topk: every answer of a group would be the same; train with sample or gumbel"
            )
        self.rollout_mode()
        if self.problems_per_step % self.minibatches:
            raise ValueError(
                f"--minibatches {self.minibatches}: must divide --problems_per_step {self.problems_per_step} evenly"
            )
        if "judge" in evaluator.parse_rewards(self.rewards, self.reward_timeout):
            check_judge(self)

    def prompt_format(self, tokenizer=None) -> rldatasets.PromptFormat:
        """How questions are asked; with the tokenizer, also what its chat template writes of the answer."""
        prompt_format = rldatasets.PromptFormat(self.tags, self.prompt_style, self.prefill, self.prompt_date)
        return prompt_format if tokenizer is None else prompt_format.resolve(tokenizer)

    def sampling(self) -> dict:
        """How the answers of a step are sampled: options of rollout.generate."""
        return dict(
            group_size=self.group_size,
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature,
            stop_tag=self.stop_tag(),
            soft=self.rollout_mode(),
        )

    def adapters(self) -> dict:
        """Which adapters LoRA learns: options of lora.add_adapters."""
        return dict(rank=self.lora_rank, alpha=self.lora_alpha, seed=self.seed)

    def advantages(self) -> dict:
        """How rewards become advantages: options of grpo.compute_advantages."""
        return dict(scale=self.advantage_scale, baseline=self.advantage_baseline, k=self.pass_at_k)

    def answering(self, tokenizer=None) -> dict:
        """How answers are sampled and graded: options of evaluator.evaluate."""
        return dict(
            max_new_tokens=self.max_completion_length,
            prompt_format=self.prompt_format(tokenizer),
            stop_tag=self.stop_tag(),
            rows_per_batch=self.problems_per_step * self.group_size,
            seed=self.seed,
        )

    def uses_bf16(self, device) -> bool:
        """device: the policy's torch.device."""
        return device.type == "cuda" if self.bf16 is None else self.bf16

    def stop_tag(self) -> str | None:
        return "</answer>" if self.stop_at_answer else None

    def rollout_mode(self) -> SoftThinking:
        """How answers are sampled in training: one draw a position, unless soft thinking is on."""
        settings = SoftThinking(
            k=self.soft_thinking_k if self.soft_thinking else 1,
            temperature=self.soft_thinking_temperature,
            sampling=self.soft_thinking_sampling,
            weighting=self.soft_thinking_weighting,
            start=self.soft_thinking_start,
            answer_reserve=self.answer_reserve,
            cold_stop_entropy=self.soft_thinking_cold_stop_entropy if self.soft_thinking else 0.0,
            cold_stop_steps=self.soft_thinking_cold_stop_steps,
            tags=self.tags,
        )
        settings.check_budget(self.max_completion_length)
        return settings


PRESETS = {
    # Learns within two to four minutes on two CPU cores. The learning rate is high, as usual for so few parameters.
    # Each of the six evaluations of 1,024 problems took as long as eight steps; 256 problems say +-4 points.
    "tiny": dict(
        model_name="tiny", dataset_name="arithmetic", max_prompt_length=440, problems_per_step=32, group_size=8,
        max_completion_length=72, loss_type="dr_grpo", advantage_scale="none", max_steps=100, learning_rate=1.5e-4,
        warmup_steps=5, final_lr_fraction=0.1, minibatches=4, tokens_per_micro_batch=2048, eval_steps=20,
        eval_problems=256, save_steps=20,
    ),
    # One 80 GB GPU. R1's own reasoning RL used GRPO with group-scaled advantages, groups of 16 and a KL term;
    # here the KL is off, as in most work since (no reference model to hold).
    "qwen2.5-1.5b": dict(
        model_name="Qwen/Qwen2.5-1.5B-Instruct", dataset_name="gsm8k", max_prompt_length=512, problems_per_step=16,
        group_size=16, max_completion_length=786, loss_type="grpo", advantage_scale="group", max_steps=400,
        learning_rate=1e-6, warmup_steps=10, final_lr_fraction=1.0, minibatches=1, tokens_per_micro_batch=8192,
        eval_steps=50, eval_problems=1319, save_steps=50,
    ),
    # The same from the base model, as R1-Zero: no chat template, no supervised fine-tuning, R1's own tags. A base model
    # does not know when to stop, so the closing answer tag ends an answer.
    "qwen2.5-1.5b-base": dict(
        model_name="Qwen/Qwen2.5-1.5B", dataset_name="gsm8k", max_prompt_length=512, tags="think", prompt_style="plain",
        stop_at_answer=True, problems_per_step=16, group_size=16, max_completion_length=786, loss_type="grpo",
        advantage_scale="group", max_steps=400, learning_rate=1e-6, warmup_steps=10, final_lr_fraction=1.0,
        minibatches=1, tokens_per_micro_batch=8192, eval_steps=50, eval_problems=1319, save_steps=50,
    ),
    # One 24 GB GPU.
    "qwen2.5-0.5b": dict(
        model_name="Qwen/Qwen2.5-0.5B-Instruct", dataset_name="gsm8k", max_prompt_length=512, problems_per_step=8,
        group_size=16, max_completion_length=512, loss_type="grpo", advantage_scale="group", max_steps=400,
        learning_rate=1e-6, warmup_steps=10, final_lr_fraction=1.0, minibatches=1, tokens_per_micro_batch=2048,
        eval_steps=50, eval_problems=1319, save_steps=50,
    ),
    # A real pretrained model on two CPU cores, or on one 24 GB GPU: `make smollm2`. It knows nothing of the form, so it
    # needs a cold start first: pipeline.py.
    "smollm2-135m": dict(
        model_name="smollm2-135m", dataset_name="two_step", max_prompt_length=160, problems_per_step=8, group_size=8,
        max_completion_length=56, loss_type="dr_grpo", advantage_scale="none", max_steps=24, learning_rate=6e-6,
        warmup_steps=2, final_lr_fraction=0.1, minibatches=1, tokens_per_micro_batch=2048, eval_steps=8,
        eval_problems=256, save_steps=8,
    ),
}  # fmt: skip


def parse_config(arguments: list[str]) -> GRPOConfig:
    """main.py's settings. Raises ValueError, one line, on a bad argument."""
    return parse(arguments, GRPOConfig, SECTIONS, PRESETS, "qwen2.5-1.5b", "main.py", "Train a language model by GRPO.")


def parse(
    arguments: list[str],
    config_class,
    sections,
    presets: dict,
    gpu_preset: str,
    prog: str,
    description: str,
    cpu_preset: str = "tiny",
):
    """A config_class from the command line: defaults, overridden by the preset, by --config's file, by the flags.

    gpu_preset: taken when no preset is asked for and a CUDA device is present; else it is cpu_preset. The choice is
    printed, with its reason. --device is no setting of the run, which may be resumed on another one: it is applied to
    this process (engine/device.py).
    """
    flags = {
        "preset": dict(choices=presets, help="a set of defaults"),
        "config": dict(help="a JSON file of settings, as a run's args.json; flags win over it"),
        "device": dict(
            choices=device.CHOICES, default="auto", help="where the models live; auto: cuda, else mps, else cpu"
        ),
    }
    parser = ArgumentParser(sections, flags, prog=prog, description=description)
    asked, why = read_early(arguments, flags), "as asked"
    if asked.device == "cuda" and not has_cuda_device():
        raise ValueError("--device cuda: no CUDA device here")
    from_file = read_config(asked.config, sections, presets) if asked.config else {}
    preset = asked.preset or from_file.get("preset")
    if preset is None and asked.device in ("mps", "cpu"):
        preset, why = cpu_preset, f"--device {asked.device}"
    elif preset is None:
        preset, why = (
            (gpu_preset, "a CUDA device is here") if has_cuda_device() else (cpu_preset, "no CUDA device here")
        )
    parser.set_defaults(**presets[preset] | from_file | {"preset": preset})
    values = parse_flags(parser, arguments)
    del values["device"], values["config"]
    config = config_class(**values)
    device.choose(asked.device)  # only now, when nothing is left that could be refused
    if os.environ.get("RANK", "0") == "0":  # the main process, where several were launched
        print(f"preset {preset}: {why} (choose with --preset {'|'.join(presets)}; every flag overrides it)")
    return config


def has_cuda_device() -> bool:
    """Whether the CUDA driver finds a device. Asked without torch, whose import takes seconds."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
