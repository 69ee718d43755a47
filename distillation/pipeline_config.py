"""Settings of pipeline.py: its sections, presets and command line. As tracking/run_config.py, without torch.

RL is main.py's: a preset here has the name of one of main.py, and the settings of GRPO that have no flag below (loss,
rewards, clipping, schedule) come from it.
"""

import dataclasses
from dataclasses import dataclass

from tracking import run_config
from tracking.run_config import GRPOConfig, ModelAndData, Sampling, setting

# The stages in their order, and what each control does in place of one of them; pipeline.py has the functions.
STAGES = ("cold_start", "rl", "rejection", "rl_again")
CONTROLS = ("zero", "shuffled", "base_answers", "random_answers", "longer_rl")


@dataclass
class ColdStart:
    _argument_group_name = "cold start: the base learns worked solutions of the data set"
    cold_start_examples: int = setting(512, "solutions, at most")
    cold_start_epochs: float = setting(1.0, "passes over them")
    cold_start_batch_size: int = setting(16, "solutions in an optimizer step")
    cold_start_learning_rate: float = setting(5e-5, "peak of the schedule")


@dataclass
class Reinforcement:
    _argument_group_name = "RL (the rest is as in main.py's preset of the same name)"
    rl_steps: int = setting(60, "rollouts of an RL stage")
    rl_learning_rate: float = setting(1e-6, "peak of the schedule")


@dataclass
class RejectionSampling:
    _argument_group_name = "rejection sampling, and fine-tuning of the base on the kept answers"
    train_problems: int = setting(2048, "training problems that the RL model answers")
    samples_per_problem: int = setting(1, "answers to each")
    keep_per_problem: int = setting(4, "right answers kept of one problem, at most")
    sft_epochs: float = setting(2.0, "passes over the kept answers")
    sft_batch_size: int = setting(64, "answers in an optimizer step")
    sft_learning_rate: float = setting(1e-4, "peak of the schedule")
    sft_warmup_steps: int = setting(3, "linear warm-up, of the cold start too")


@dataclass
class PipelineOutput:
    _argument_group_name = "stages, controls and output"
    stage: str = setting(
        "all",
        "all: every stage, the controls and the table; or one, with what it is built on; also as the first word",
        ("all", *STAGES, *CONTROLS),
    )
    controls: str = setting("all", f"all, none, or some of {','.join(CONTROLS)}")
    output_dir: str | None = setting(None, "folder of the stages; default runs/pipeline-PRESET")
    overwrite_output_dir: bool = setting(False, "replace the pipeline that is in output_dir")
    eval_problems: int = setting(512, "test problems of the table")
    eval_samples: int = setting(8, "answers sampled to each: accuracy, and k of pass@k")
    save_steps: int = setting(20, "checkpoint every N steps of a training (also after the last)")
    report_to: str = setting("none", "a tracker, through accelerate", ("none", *run_config.TRACKERS))
    seed: int = setting(0, "of the data order and the sampling")
    tokens_per_micro_batch: int = setting(2048, "tokens in one forward and backward pass (memory, not results)")
    fsdp: bool = setting(False, "several processes: divide the fp32 weights and moments among them (FSDP2)")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, about a third more time")


SECTIONS = (ModelAndData, Sampling, ColdStart, Reinforcement, RejectionSampling, PipelineOutput)


@dataclass
class PipelineConfig(*reversed(SECTIONS)):
    """All settings. model_name is the base. Refuses impossible values with a ValueError of one line."""

    preset: str = "tiny"

    # Problems are asked, and answers sampled and graded, as in main.py.
    prompt_format, answering, stop_tag = GRPOConfig.prompt_format, GRPOConfig.answering, GRPOConfig.stop_tag

    def __post_init__(self):
        run_config.check_values(self, may_be_zero=("seed", "sft_warmup_steps"))
        run_config.check_dataset_name(self)
        self.control_list()

    def control_list(self) -> tuple[str, ...]:
        """The controls to run, in the order of CONTROLS."""
        if self.controls in ("all", "none"):
            return CONTROLS if self.controls == "all" else ()
        asked = [name.strip() for name in self.controls.split(",")]
        for name in asked:
            if name not in CONTROLS:
                raise ValueError(f"--controls {self.controls!r}: {name!r} is none of all, none, {', '.join(CONTROLS)}")
        return tuple(name for name in CONTROLS if name in asked)


def from_main(preset: str) -> dict:
    """What main.py's preset says of the settings that both scripts have."""
    names = {f.name for section in SECTIONS for f in dataclasses.fields(section)} - {"save_steps", "eval_problems"}
    values = run_config.PRESETS[preset]
    shared = {name: value for name, value in values.items() if name in names}
    return shared | {"rl_learning_rate": values["learning_rate"]}


PRESETS = {
    # Everything, controls included, within eight minutes on two CPU cores.
    "tiny": from_main("tiny")
    | dict(
        cold_start_examples=128, cold_start_learning_rate=6e-4, rl_steps=20,
        train_problems=2048, samples_per_problem=1, sft_epochs=2.0, sft_batch_size=64, sft_learning_rate=6e-4,
        eval_samples=4,
    ),
    # R1's own path at small scale, on one 80 GB GPU: a base model, no chat template, R1's tags. Batch, epochs and
    # learning rate of the fine-tuning are those of R1's 1.5B student (DeepSeek-AI 2025).
    "qwen2.5-1.5b-base": from_main("qwen2.5-1.5b-base")
    | dict(
        cold_start_examples=512, cold_start_learning_rate=1e-5, rl_steps=200,
        train_problems=7473, samples_per_problem=4, sft_epochs=2.0, sft_batch_size=64, sft_learning_rate=1e-4,
        sft_warmup_steps=20, eval_problems=1319, save_steps=50, controls="base_answers,random_answers",
    ),
    # A real pretrained model, on two CPU cores for some hours. It knows nothing of the asked-for form at first, so RL
    # from the base has nothing to reward, and the controls that begin with it are left out.
    "smollm2-135m": from_main("smollm2-135m")
    | dict(
        cold_start_examples=1024, cold_start_batch_size=16, cold_start_learning_rate=5e-5, rl_steps=24,
        train_problems=4096, samples_per_problem=1, sft_epochs=1.0, sft_batch_size=16, sft_learning_rate=5e-5,
        eval_problems=256, eval_samples=2, save_steps=8, controls="shuffled,random_answers",
    ),
}  # fmt: skip


def parse_config(arguments: list[str]) -> PipelineConfig:
    """pipeline.py's settings; the first word may be the stage. Raises ValueError, one line, on a bad argument."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--stage", *arguments]
    description = "Cold start, RL, rejection sampling, RL again: R1's pipeline."
    return run_config.parse(
        arguments, PipelineConfig, SECTIONS, PRESETS, "qwen2.5-1.5b-base", "pipeline.py", description
    )
