"""Settings of distill.py: its sections, presets and command line. As tracking/run_config.py, without torch."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

from tracking import run_config
from tracking.run_config import GRPOConfig, ModelAndData, Sampling, setting

MAX_HEAD_DIM = 256  # of the flash kernel, as in attention.flash_takes_heads
LOSSES = ("sft", "fkl", "rkl", "jsd")  # explained in losses.token_losses


@dataclass
class Teacher:
    _argument_group_name = "teacher and its answers (group_size to each problem)"
    teacher_name: str | None = setting(
        None, "hub name or folder; default: the newest finished run of main.py in runs/TEACHER_PRESET, or one made here"
    )
    teacher_preset: str = setting("tiny", "preset of main.py for it", tuple(run_config.PRESETS))
    teacher_steps: int = setting(60, "GRPO steps of a teacher that is made here")
    train_problems: int = setting(4096, "training problems that the teacher answers")
    keep_per_problem: int = setting(4, "right answers kept of one problem, at most")


@dataclass
class Student:
    _argument_group_name = "student (--model_name) and loss"
    student_config: str | None = setting(
        None, "a new student of the teacher's family instead: layers=N[,width=W][,init=random|teacher_layers]"
    )
    loss: str = setting("sft", "explained in distillation.losses.token_losses", LOSSES)
    jsd_beta: float = setting(0.5, "weight of the teacher in jsd's mixture")
    on_policy_fraction: float = setting(0.0, "share of batches that the student writes now and the teacher scores")
    control: str = setting(
        "gold", "also train a twin: on the data set's own solutions (gold), on as many unchecked answers of the "
        "teacher (unfiltered), or one on each (both)", ("gold", "unfiltered", "both", "none"),
    )  # fmt: skip
    sweep_students: str = setting("tiny_student", "names and student_configs, separated by semicolons")


@dataclass
class StudentOptimization:
    _argument_group_name = "optimization"
    epochs: float = setting(3.0, "passes over the kept answers")
    batch_size: int = setting(64, "answers in an optimizer step")
    learning_rate: float = setting(1e-4, "peak of the schedule")
    warmup_steps: int = setting(10, "linear warm-up")
    final_lr_fraction: float = setting(0.1, "cosine decay to this share of the peak at the end")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    seed: int = setting(0, "of the data order, the sampling and random weights")
    tokens_per_micro_batch: int = setting(2048, "tokens in one forward and backward pass (memory, not results)")
    fsdp: bool = setting(False, "several processes: divide the student's fp32 weights and moments among them (FSDP2)")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, about a third more time")


@dataclass
class StageOutput:
    _argument_group_name = "stages and output"
    stage: str = setting(
        "all",
        "all: generate to report; also as the first word",
        ("all", "generate", "filter", "train", "report", "sweep"),
    )
    output_dir: str | None = setting(None, "folder of the stages; default runs/distill-PRESET")
    data_dir: str | None = setting(None, "output_dir of another run: its generate and filter are used")
    overwrite_output_dir: bool = setting(False, "make the asked stage, and what was built on it, again")
    eval_problems: int = setting(1024, "how many test problems")
    save_steps: int = setting(60, "checkpoint every N steps (also after the last)")
    save_total_limit: int = setting(1, "keep the newest N checkpoints")
    report_to: str = setting("none", "a tracker, through accelerate", ("none", *run_config.TRACKERS))


SECTIONS = (Teacher, ModelAndData, Sampling, Student, StudentOptimization, StageOutput)
MAY_BE_ZERO = ("on_policy_fraction", "warmup_steps", "final_lr_fraction", "seed")


@dataclass
class DistillConfig(*reversed(SECTIONS)):
    """All settings. model_name is the student. Refuses impossible values with a ValueError of one line."""

    preset: str = "tiny"
    compile = False  # no setting here; update.make_trainable reads it

    # Problems are asked, and answers sampled and graded, as in main.py.
    prompt_format, answering, stop_tag = GRPOConfig.prompt_format, GRPOConfig.answering, GRPOConfig.stop_tag
    uses_bf16, bf16 = GRPOConfig.uses_bf16, None  # None: on a GPU

    def __post_init__(self):
        run_config.check_values(self, MAY_BE_ZERO)
        run_config.check_dataset_name(self)
        for name in ("on_policy_fraction", "final_lr_fraction"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at most 1")
        if self.jsd_beta >= 1:
            raise ValueError(f"--jsd_beta {self.jsd_beta}: must be between 0 and 1")
        if self.on_policy_fraction and self.loss == "sft":
            raise ValueError(
                f"--on_policy_fraction {self.on_policy_fraction}: sft would teach the student its own samples; "
                "choose --loss fkl, rkl or jsd"
            )
        for student in (self.student_config, *self.sweep_list()):
            if student is not None and "=" in student:
                StudentConfig.parse(student)

    def controls(self) -> tuple[str, ...]:
        """The twins that are trained too, in their order."""
        return {"none": (), "both": ("unfiltered", "gold")}.get(self.control, (self.control,))

    def sweep_list(self) -> list[str]:
        return [student.strip() for student in self.sweep_students.split(";") if student.strip()]


class StudentConfig(NamedTuple):
    """A student that does not exist yet."""

    layers: int
    width: int | None  # None: the teacher's
    init: str  # "random" | "teacher_layers"

    @classmethod
    def parse(cls, text: str) -> "StudentConfig":
        """Reads "layers=2,width=64,init=random"; only layers must be there. Raises ValueError, one line."""
        fields = dict(layers=None, width=None, init="random")
        for item in text.split(","):
            name, _, value = (part.strip() for part in item.partition("="))
            known = value in ("random", "teacher_layers") if name == "init" else value.isdecimal() and int(value) > 0
            if name not in fields or not known:
                raise ValueError(f"student {text!r}: {item!r} is none of layers=N, width=W, init=random|teacher_layers")
            fields[name] = value if name == "init" else int(value)
        if fields["layers"] is None:
            raise ValueError(f"student {text!r}: how many layers? For example layers=2,width=64")
        return cls(**fields)

    def teacher_layers(self, depth: int) -> list[int]:
        """Which layer of the teacher each of the student's stands for: evenly spread, first and last included."""
        return [round(i * (depth - 1) / max(1, self.layers - 1)) for i in range(self.layers)]

    def model_config(self, teacher_config):
        """The teacher's configuration, smaller: as many heads, each narrower with the width; the feed-forward block in
        proportion. Raises ValueError, one line, when that cannot be."""
        config = copy.deepcopy(teacher_config)
        heads, depth, width = config.num_attention_heads, config.num_hidden_layers, self.width or config.hidden_size
        head_dim = width / heads
        if width != config.hidden_size and (head_dim % 8 or head_dim > MAX_HEAD_DIM):
            raise ValueError(
                f"student width={width}: must be a multiple of {8 * heads} up to {MAX_HEAD_DIM * heads}, because each "
                f"of the {heads} heads needs a width that is a multiple of 8 for attention on a GPU"
            )
        if self.init == "teacher_layers" and (width != config.hidden_size or self.layers > depth):
            raise ValueError(
                f"student layers={self.layers},width={width}: copied from a teacher with {depth} layers of width "
                f"{config.hidden_size}; it can have fewer layers, but not another width"
            )
        config.intermediate_size = config.intermediate_size * width // config.hidden_size
        config.num_hidden_layers, config.hidden_size = self.layers, width
        if hasattr(config, "head_dim") and width != teacher_config.hidden_size:
            config.head_dim = width // heads
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[layer] for layer in self.teacher_layers(depth)]
        return config


PRESETS = {
    # From nothing to the table within six minutes on two CPU cores, the teacher's GRPO included.
    "tiny": dict(
        model_name="tiny_student", teacher_preset="tiny", teacher_steps=60, dataset_name="arithmetic",
        max_prompt_length=440, problems_per_step=256, group_size=1, max_completion_length=72, train_problems=4096,
        epochs=3.0, batch_size=64, learning_rate=2e-3, warmup_steps=10, tokens_per_micro_batch=2048,
        eval_problems=1024, save_steps=60,
        sweep_students="layers=1,init=teacher_layers;layers=2,init=teacher_layers;layers=3,init=teacher_layers;"
        "tiny_student",
    ),
    # One 80 GB GPU. Epochs, batch, learning rate and schedule are those of R1's 1.5B student (DeepSeek-AI 2025).
    "qwen2.5-0.5b": dict(
        model_name="Qwen/Qwen2.5-0.5B", teacher_preset="qwen2.5-1.5b", teacher_steps=400, dataset_name="gsm8k",
        max_prompt_length=512, problems_per_step=64, group_size=4, max_completion_length=786, train_problems=7473,
        epochs=2.0, batch_size=64, learning_rate=1e-4, warmup_steps=20, tokens_per_micro_batch=8192,
        eval_problems=1319, save_steps=100, sweep_students="Qwen/Qwen2.5-0.5B;Qwen/Qwen2.5-1.5B",
    ),
    # A real pretrained model on two CPU cores, or on one 24 GB GPU: a teacher and a student of 135M parameters.
    "smollm2-135m": dict(
        model_name="smollm2-135m", teacher_preset="smollm2-135m", teacher_steps=40, dataset_name="two_step",
        max_prompt_length=160, problems_per_step=32, group_size=4, max_completion_length=56, train_problems=256,
        epochs=1.0, batch_size=16, learning_rate=5e-5, warmup_steps=4, tokens_per_micro_batch=2048, eval_problems=256,
        save_steps=16, sweep_students="smollm2-135m",
    ),
}  # fmt: skip


def parse_config(arguments: list[str]) -> DistillConfig:
    """distill.py's settings; the first word may be the stage. Raises ValueError, one line, on a bad argument."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--stage", *arguments]
    description = "Distil an RL-trained teacher into a smaller student."
    return run_config.parse(arguments, DistillConfig, SECTIONS, PRESETS, "qwen2.5-0.5b", "distill.py", description)
