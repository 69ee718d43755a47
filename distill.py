"""R1's second half: the RL-trained teacher's verified answers train a smaller student.

    generate   the teacher answers training problems, with the decode loop that trained it
    filter     keeps answers that are right, well-formed and ended by themselves; every other one is counted by reason
    train      the student learns to write them, and a twin of it learns to write the data set's own solutions
    report     teacher, untrained student, distilled student and twin, measured on the test split
    sweep      several students of different sizes from the same answers

    python distill.py                                   # generate to report; without a teacher, GRPO makes one first
    python distill.py train --epochs 2                  # a stage by itself, and whatever it needs that is not there yet
    python distill.py --preset tiny --loss rkl --on_policy_fraction 1 --data_dir runs/distill-tiny --output_dir runs/rkl
    python distill.py sweep --sweep_students "tiny_student;layers=2,width=64;layers=2,init=teacher_layers"
    torchrun --nproc_per_node 4 distill.py              # several GPUs: see processes.py
    python distill.py --help

Each stage leaves a folder of its name with its settings, goes on in it where it was stopped, and on a CPU ends where it
would have ended uninterrupted. Read `divergence` and `token_losses` first (what is learned), then `train_student`.
Left out on purpose: evaluation while a student trains (the report measures), temperatures on teacher logits, losses on
hidden states or attention maps, teachers behind an API.
"""

import copy
import dataclasses
import functools
import json
import math
import multiprocessing
import re
import resource
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import evaluator
import llms
import main as grpo_main
import rldatasets
from engine import distributed
from rollout import Rollout, generate
from tracking import checkpoints, plotter, run_config, run_folder, training_run
from tracking.run_config import GRPOConfig, ModelAndData, Sampling, setting

# ---------------------------------------------------------------- what the student minimises

LOSSES = ("sft", "fkl", "rkl", "jsd")


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(P || Q) = sum over v of P(v) (log P(v) - log Q(v)), in nats. p, q: log-probs (N, V) -> (N,)."""
    return (p.exp() * (p - q)).sum(dim=-1)


def divergence(student: torch.Tensor, teacher: torch.Tensor, loss: str, beta: float = 0.5) -> torch.Tensor:
    """How far the student is from the teacher at each position. Log-probs (N, V) of each -> (N,) nats, 0 when equal.

    fkl  KL(T || S): the student must cover all that the teacher might say (soft targets, Hinton et al. 2015)
    rkl  KL(S || T): the student must not say what the teacher would not (MiniLLM, Gu et al. 2023)
    jsd  beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S: between the two, bounded, and
         symmetric at beta = 1/2 (generalised Jensen-Shannon; GKD, Agarwal et al. 2023, eq. 1)
    """
    if loss == "fkl":
        return kl(teacher, student)
    if loss == "rkl":
        return kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def token_losses(policy, teacher, rollout: Rollout, rows: list[int], loss: str, beta: float = 0.5) -> torch.Tensor:
    """The loss of every completion token of `rows`, the stop token included, prompts left out: (N,) float32.

    sft is -log S(token): what the teacher wrote, made likelier (sequence-level distillation, Kim and Rush 2016; R1's
    own). The others compare whole distributions after the same text, whoever wrote it, and need a `teacher`. Where the
    student wrote it itself, no gradient goes through the sampling (as in GKD).
    """
    if loss == "sft":
        logprobs = llms.completion_logprobs(policy, rollout, rows=rows).squeeze(-1)  # (b, T): one draw a position
        return -logprobs[rollout.completion_mask[rows]]
    rows = torch.as_tensor(rows, device=rollout.draws.device)
    student_hidden = llms.completion_hidden(policy, rollout, rows)[0]  # (N, H)
    with torch.no_grad():
        teacher_hidden = llms.completion_hidden(teacher, rollout, rows)[0]  # (N, the teacher's H)
    # Heads may be padded to different widths (Qwen2.5: 151,936 up to 3B, 152,064 from 7B). No text has the tokens of
    # the padding, so both distributions are taken over the width that both have, renormalised there.
    width = min(policy.config.vocab_size, teacher.config.vocab_size)

    def one_chunk(student_hidden, teacher_hidden):
        heads = (policy, student_hidden), (teacher, teacher_hidden)
        logits = [model.get_output_embeddings()(hidden)[:, :width].float() for model, hidden in heads]
        return divergence(*(x.log_softmax(dim=-1) for x in logits), loss, beta)

    # As in llms.draw_logprobs: the logits of no more than one chunk exist at any time; they are computed once more in
    # the backward pass if there are several. Here autograd keeps about four numbers for every logit of the two models.
    size = max(1, llms.MAX_LOGITS // (4 * width))
    if len(student_hidden) <= size:
        return one_chunk(student_hidden, teacher_hidden)
    chunks = zip(student_hidden.split(size), teacher_hidden.split(size), strict=True)
    return torch.cat([checkpoint(one_chunk, s, t, use_reentrant=False) for s, t in chunks])


# ---------------------------------------------------------------- settings


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
    loss: str = setting("sft", "explained in distill.token_losses", LOSSES)
    jsd_beta: float = setting(0.5, "weight of the teacher in jsd's mixture")
    on_policy_fraction: float = setting(0.0, "share of batches that the student writes now and the teacher scores")
    control: str = setting("gold", "also train a twin on the data set's own solutions", ("gold", "none"))
    sweep_students: str = setting("tiny_student", "names and student_configs, separated by semicolons")


@dataclass
class Optimization:
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
class Output:
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
    report_to: str = setting("none", "a tracker, through accelerate", ("none", "tensorboard", "wandb", "trackio"))


SECTIONS = (Teacher, ModelAndData, Sampling, Student, Optimization, Output)
MAY_BE_ZERO = ("on_policy_fraction", "warmup_steps", "final_lr_fraction", "seed")


@dataclass
class DistillConfig(*reversed(SECTIONS)):
    """All settings. model_name is the student. Refuses impossible values with a ValueError of one line."""

    preset: str = "tiny"

    # Problems are asked, and answers sampled and graded, as in main.py.
    prompting, answering, stop_tag = GRPOConfig.prompting, GRPOConfig.answering, GRPOConfig.stop_tag

    def __post_init__(self):
        run_config.check_values(self, MAY_BE_ZERO)
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
        if width % (2 * heads):  # rotary positions turn pairs of a head's numbers
            raise ValueError(
                f"student width={width}: must be a multiple of {2 * heads}, for {heads} heads of even width"
            )
        if self.init == "teacher_layers" and (width != config.hidden_size or self.layers > depth):
            raise ValueError(
                f"student layers={self.layers},width={width}: copied from a teacher with {depth} layers of width "
                f"{config.hidden_size}; it can have fewer layers, but not another width"
            )
        config.intermediate_size = config.intermediate_size * width // config.hidden_size
        config.num_hidden_layers, config.hidden_size = self.layers, width
        if hasattr(config, "head_dim"):
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
}  # fmt: skip


def parse_config(arguments: list[str]) -> DistillConfig:
    """distill.py's settings; the first word may be the stage. Raises ValueError, one line, on a bad argument."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--stage", *arguments]
    has_gpu = torch.cuda.is_available()
    default = ("qwen2.5-0.5b", "a CUDA device is here") if has_gpu else ("tiny", "no CUDA device here")
    description = "Distil an RL-trained teacher into a smaller student."
    return run_config.parse(arguments, DistillConfig, SECTIONS, PRESETS, default, "distill.py", description)


# ---------------------------------------------------------------- the stages


def names_of(*sections) -> set[str]:
    return {f.name for section in sections for f in dataclasses.fields(section)}


# Which settings each stage's results come from: to go on with other ones would mix two runs.
TRAINING = names_of(Optimization) - {"tokens_per_micro_batch", "gradient_checkpointing", "fsdp"}
TRAINING |= {"loss", "jsd_beta", "on_policy_fraction", "data_dir"}
DEPENDS_ON = {
    "generate": names_of(ModelAndData, Sampling) - {"model_name"}
    | {"teacher_preset", "teacher_steps", "train_problems", "seed"},
    "filter": {"keep_per_problem"},
    "train": TRAINING | {"model_name", "student_config"},
    "report": {"eval_problems"},
    "sweep": TRAINING | {"eval_problems"},
}
PIPELINE = ("generate", "filter", "train", "report")
SAMPLED = ("generate", "filter")  # the stages that --data_dir stands in for
# What --overwrite_output_dir removes: the stage, and those that use what it leaves.
BUILT_ON = {
    "generate": ("teacher", *PIPELINE, "sweep"),
    "filter": ("filter", "train", "report", "sweep"),
    "train": ("train", "report"),
    "report": ("report",),
    "sweep": ("sweep",),
}
BUILT_ON["all"] = BUILT_ON["generate"]


def run(config: DistillConfig) -> Path:
    """Runs the asked stage after those it needs; returns the folder. What is finished is found, not made again."""
    folder = Path(config.output_dir or f"runs/distill-{config.preset}")
    data = Path(config.data_dir or folder)  # where generate and filter are
    check(config, data)
    asked = PIPELINE[-1] if config.stage == "all" else config.stage
    stages = (*SAMPLED, "sweep") if asked == "sweep" else PIPELINE[: PIPELINE.index(asked) + 1]
    places = {stage: (data if stage in SAMPLED else folder) / stage for stage in stages}
    if config.data_dir:
        stages = [stage for stage in stages if stage not in SAMPLED]
    if config.overwrite_output_dir:  # only now, when nothing is left that could be refused
        for stage in BUILT_ON[config.stage]:
            distributed.run_on_main(shutil.rmtree, folder / stage, True)

    record = dataclasses.asdict(config)
    for stage in stages:
        if (places[stage] / "args.json").exists():
            depends = {name: record[name] for name in sorted(DEPENDS_ON[stage])}
            run_folder.check_same_config(places[stage], depends, may_differ=())
    for stage in stages:
        if not distributed.run_on_main((places[stage] / "args.json").exists):
            distributed.run_on_main(make_folder, places[stage])
            run_folder.write_args(places[stage], record, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        STAGES[stage](dataclasses.replace(config, teacher_name=find_teacher(config, data)), places)
    return folder


def check(config: DistillConfig, data: Path) -> None:
    """Refuses what can be known before hours of sampling: models, their positions and tokenizers, the data."""
    if config.batch_size % distributed.world_size():
        raise ValueError(
            f"--batch_size {config.batch_size}: must be a multiple of {distributed.world_size()} processes"
        )
    distributed.check_fsdp_world_size(config.fsdp)
    if config.data_dir:
        if not (data / "filter" / "distill.jsonl").exists():
            raise ValueError(f"--data_dir {config.data_dir}: there is no filter/distill.jsonl in it")
        if config.stage in SAMPLED:
            raise ValueError(
                f"--data_dir {config.data_dir}: it is what {config.stage} would make; leave out one of them"
            )
        asked = {name: getattr(config, name) for name in names_of(ModelAndData) - {"model_name", "trust_remote_code"}}
        run_folder.check_same_config(data / "generate", asked, may_differ=())
    teacher_name = config.teacher_name or newest_run(config.teacher_preset)
    teacher_name = teacher_name or run_config.PRESETS[config.teacher_preset]["model_name"]  # what will be trained
    if not (config.overwrite_output_dir and config.stage in ("all", "generate")):
        decided = decided_teacher(data)
        if decided and config.teacher_name not in (None, decided):
            raise ValueError(
                f"--teacher_name {config.teacher_name}: the answers in '{data}/generate' are those of {decided}; keep "
                "them, give another --output_dir, or replace them with --overwrite_output_dir"
            )
        teacher_name = decided or teacher_name
    teacher_config = llms.load_config(teacher_name, config.trust_remote_code)
    students = config.sweep_list() if config.stage == "sweep" else [config.student_config or config.model_name]
    for student in students:
        if "=" in student:
            student_name, student_config = teacher_name, StudentConfig.parse(student).model_config(teacher_config)
        else:
            student_name, student_config = student, llms.load_config(student, config.trust_remote_code)
        needed = config.max_prompt_length + config.max_completion_length
        positions = min(llms.max_positions(teacher_config), llms.max_positions(student_config))
        if needed > positions:
            raise ValueError(f"{needed} tokens of prompt and completion exceed the models' {positions} positions")
        if config.loss != "sft":
            refuse_other_tokens(config, teacher_name, student_name)


def refuse_other_tokens(config: DistillConfig, teacher_name: str, student_name: str) -> None:
    if not same_tokens(load_tokenizer(teacher_name, config), load_tokenizer(student_name, config)):
        raise ValueError(
            f"--loss {config.loss}: compares distributions token by token, but {teacher_name!r} and {student_name!r} "
            "have different tokenizers; choose --loss sft"
        )


def decided_teacher(data: Path) -> str | None:
    """Whose answers are in data/generate."""
    file = data / "generate" / "teacher.json"
    return json.loads(file.read_text(encoding="utf-8"))["teacher_name"] if file.exists() else None


def find_teacher(config: DistillConfig, data: Path) -> str:
    """The teacher's name or folder: decided once, for all stages, and written beside its answers."""
    name = decided_teacher(data)
    if name is None:
        name = config.teacher_name or newest_run(config.teacher_preset) or train_teacher(config, data / "teacher")
        write_json(data / "generate" / "teacher.json", {"teacher_name": name})
    return name


def newest_run(preset: str) -> str | None:
    """The last checkpoint of the newest finished run of main.py in its default folders."""
    found = []
    for args in Path("runs").glob(f"{preset}*/args.json"):
        made_with = json.loads(args.read_text(encoding="utf-8"))["config"]
        last = args.parent / "checkpoints" / f"step-{made_with.get('max_steps')}"
        if made_with.get("preset") == preset and made_with.get("control") == "none" and last.is_dir():
            found.append((last.stat().st_mtime, str(last)))
    return max(found)[1] if found else None


def train_teacher(config: DistillConfig, folder: Path) -> str:
    """GRPO as in main.py, with teacher_preset, on the same task; goes on where it was stopped."""
    asking = names_of(ModelAndData, Sampling) - {"model_name", "problems_per_step", "group_size"}
    every = max(1, config.teacher_steps // 3)
    grpo_config = GRPOConfig(
        **run_config.PRESETS[config.teacher_preset]
        | {name: getattr(config, name) for name in asking}
        | dict(
            preset=config.teacher_preset,
            max_steps=config.teacher_steps,
            seed=config.seed,
            save_steps=every,
            eval_steps=every,
            eval_problems=min(256, config.eval_problems),  # to watch it; the report measures on all of them
            output_dir=str(folder),
        )
    )
    last = folder / "checkpoints" / f"step-{config.teacher_steps}"
    if not last.is_dir():
        started = (folder / "checkpoints" / "latest").exists()
        print(f"no teacher is given: training one by GRPO, {config.teacher_steps} steps (main.py)")
        how = dict(resume_from_checkpoint="latest") if started else dict(overwrite_output_dir=True)
        grpo_main.train(dataclasses.replace(grpo_config, **how))
    return str(last)


def generate_stage(config: DistillConfig, places: dict[str, Path]) -> None:
    """teacher.jsonl: group_size answers of the teacher to each training problem, graded."""
    log = run_folder.JsonLines(places["generate"] / "teacher.jsonl")
    problems = rldatasets.load_problems(config.dataset_name, "train", config.train_problems, config.dataset_path)
    tokenizer = load_tokenizer(config.teacher_name, config)
    problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, **config.prompting())
    batches = [problems[i : i + config.problems_per_step] for i in range(0, len(problems), config.problems_per_step)]
    rows = distributed.run_on_main(log.read)
    if len(rows) == len(problems) * config.group_size:
        return
    done = len(rows) // (config.problems_per_step * config.group_size)
    log.replace(rows[: done * config.problems_per_step * config.group_size])  # a batch is there whole or not at all

    teacher = llms.load(config.teacher_name, dtype=sampling_dtype(), trust_remote_code=config.trust_remote_code)[0]
    progress = tqdm(
        range(done, len(batches)), "generate", initial=done, total=len(batches), unit="batch",
        disable=not distributed.is_main_process(),
    )  # fmt: skip
    for number in progress:
        part, own = distributed.shard_range(len(batches[number])), []
        if part:
            batch = [batches[number][i] for i in part]
            rollout = sample(teacher, tokenizer, batch, config, config.seed * 1_000_003 + number, part)
            own = answer_records(batch, rollout, config)
        log.append(*distributed.all_gather(own))


def sample(model, tokenizer, problems, config, seed: int, places=None) -> Rollout:
    """group_size answers to each problem (anything with a question), sampled as in main.py. places: see `generate`."""
    return generate(
        model,
        tokenizer,
        [rldatasets.build_prompt(tokenizer, problem.question, **config.prompting()) for problem in problems],
        group_size=config.group_size,
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        stop_tag=config.stop_tag(),
        seed=seed,
        places=places,
    )


def answer_records(problems, rollout: Rollout, config) -> list[dict]:
    """What teacher.jsonl says about each row. The ids are kept: decoded and encoded again they could be others."""
    records = []
    for row, text in enumerate(rollout.texts):
        problem = problems[row // config.group_size]
        completion = rldatasets.prefilled(config.tags) * config.prefill + text
        scores = evaluator.score(completion, problem.answer, {"accuracy": 1, "format": 1}, config.tags)
        records.append({
            **dataclasses.asdict(problem),
            "completion": completion,
            "ids": rollout.trace_ids[row][rollout.completion_mask[row]].tolist(),
            "finish": rollout.finish[row],
            "length": int(rollout.lengths[row]),
            **{f"reward/{name}": score for name, score in scores.items()},
        })  # fmt: skip
    return records


def filter_stage(config: DistillConfig, places: dict[str, Path]) -> None:
    """distill.jsonl: the answers to learn from; counts.json: how many were kept, and why the others were not."""
    kept_log = run_folder.JsonLines(places["filter"] / "distill.jsonl")
    if kept_log.file.exists():
        return
    rows = run_folder.JsonLines(places["generate"] / "teacher.jsonl").read()
    test_problems = rldatasets.load_problems(config.dataset_name, "test", path=config.dataset_path)
    kept, counts = filter_rows(rows, config.keep_per_problem, {problem.question for problem in test_problems})
    print(f"generated {len(rows)}: " + ", ".join(f"{reason} {count}" for reason, count in counts.items()))
    if not kept:
        raise ValueError(f"--train_problems {config.train_problems}: not one of {len(rows)} answers passed the filter")
    write_json(places["filter"] / "counts.json", {"generated": len(rows), **counts})
    kept_log.replace(kept)


def filter_rows(rows: list[dict], keep_per_problem: int, test_questions: set[str]) -> tuple[list[dict], dict[str, int]]:
    """(the rows to learn from, {"kept" or the first reason against a row: how many}). The counts add up to all rows."""
    counts = dict.fromkeys(("kept", "test problem", "truncated", "badly formed", "wrong", "duplicate", "surplus"), 0)
    kept: list[dict] = []
    seen: dict[str, set[str]] = {}  # the kept completions of each question, white space aside
    for row in rows:
        texts, text = seen.setdefault(row["question"], set()), " ".join(row["completion"].split())
        reasons = {
            "test problem": row["question"] in test_questions,
            "truncated": row["finish"] != "stop",
            "badly formed": row["reward/format"] != 1,
            "wrong": row["reward/accuracy"] != 1,
            "duplicate": text in texts,
            "surplus": len(texts) >= keep_per_problem,
        }
        verdict = next((reason for reason, holds in reasons.items() if holds), "kept")
        counts[verdict] += 1
        if verdict == "kept":
            kept.append(row)
            texts.add(text)
    return kept, counts


def train_stage(config: DistillConfig, places: dict[str, Path]) -> None:
    """distilled/ and gold/: the student after each of its two lessons, from the same start and problem by problem."""
    rows = run_folder.JsonLines(places["filter"] / "distill.jsonl").read()
    start = distributed.run_on_main(untrained_student, config, places["train"])
    train_student(config, start, rows, places["train"] / "distilled")
    if config.control == "gold":
        plain = dataclasses.replace(config, loss="sft", on_policy_fraction=0.0)
        train_student(plain, start, gold_rows(rows, config), places["train"] / "gold")


def report_stage(config: DistillConfig, places: dict[str, Path]) -> None:
    """distill.json, distill.png and a table: what each model can do, and what it costs."""
    models = {
        "teacher": config.teacher_name,
        "untrained student": untrained_student(config, places["train"]),
        "distilled student": str(places["train"] / "distilled" / "checkpoints" / "latest"),
        "gold-solution control": str(places["train"] / "gold" / "checkpoints" / "latest"),
    }
    if config.control != "gold":
        del models["gold-solution control"]
    table = measure_all(models, config, places["report"])
    counts = json.loads((places["filter"] / "counts.json").read_text(encoding="utf-8"))
    kept = run_folder.JsonLines(places["filter"] / "distill.jsonl").read()
    counts["kept, the data set's own solution"] = sum(row["completion"] == gold_completion(row, config) for row in kept)
    write_json(places["report"] / "distill.json", {"answers": counts, "models": table})
    plotter.save({"distill.png": report_figure(table)}, places["report"])
    print_table(table)
    print(", ".join(f"{what} {count}" for what, count in counts.items()))
    print(f"In {places['report']}: distill.json, distill.png. The student: {models['distilled student']}")


def sweep_stage(config: DistillConfig, places: dict[str, Path]) -> None:
    """sweep.json, sweep.png and a table: students of several sizes, each trained as `train` would."""
    rows = run_folder.JsonLines(places["filter"] / "distill.jsonl").read()
    models = {"teacher": config.teacher_name}
    for text in config.sweep_list():
        student = dict(student_config=text) if "=" in text else dict(model_name=text, student_config=None)
        folder = places["sweep"] / text.replace("/", "--")
        one = dataclasses.replace(config, **student)
        train_student(one, distributed.run_on_main(untrained_student, one, folder), rows, folder)
        models[text] = str(folder / "checkpoints" / "latest")
    if not distributed.is_main_process():
        return
    table = measure_all(models, config, places["sweep"])
    write_json(places["sweep"] / "sweep.json", table)
    plotter.save({"sweep.png": sweep_figure(table)}, places["sweep"])
    print_table(table)
    print(f"In {places['sweep']}: sweep.json, sweep.png, and a folder for every student")


STAGES = {
    "generate": generate_stage,
    "filter": functools.partial(distributed.run_on_main, filter_stage),
    "train": train_stage,
    "report": functools.partial(distributed.run_on_main, report_stage),
    "sweep": sweep_stage,
}

# ---------------------------------------------------------------- the student


def untrained_student(config: DistillConfig, folder: Path) -> str:
    """The name of the model that training starts from; a new one is made once and kept in folder/untrained."""
    if config.student_config is None:
        return config.model_name
    target = folder / "untrained"
    if not target.exists():
        teacher, tokenizer = llms.load(config.teacher_name, "cpu", trust_remote_code=config.trust_remote_code)
        unfinished = folder / ".untrained"
        new_student(StudentConfig.parse(config.student_config), teacher, config.seed).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.replace(target)
    return str(target)


def new_student(student: StudentConfig, teacher, seed: int):
    """The model of that configuration, with random weights or copies of the teacher's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(teacher)(student.model_config(teacher.config)).float()
    model.generation_config = copy.deepcopy(teacher.generation_config)
    if student.init == "teacher_layers":
        layers = student.teacher_layers(teacher.config.num_hidden_layers)
        weights = teacher.state_dict()
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[re.sub(r"(?<=\blayers\.)\d+", lambda match: str(layers[int(match[0])]), name)])
    return model


def train_student(config: DistillConfig, start: str, rows: list[dict], folder: Path) -> None:
    """Trains the student of that name on `rows`; leaves metrics.jsonl, plots and checkpoints in the folder.

    rows: dicts with question, completion and ids (None: encode the completion). What a step does depends on the seed
    and its number alone, so a stopped training ends as it would have. Raises TrainingStopped, with a checkpoint, when a
    signal came or updates stay non-finite.
    """
    num_steps = max(1, round(config.epochs * len(rows) / config.batch_size))
    if (folder / "checkpoints" / f"step-{num_steps}").exists():
        return
    distributed.run_on_main(make_folder, folder / "checkpoints")
    policy, tokenizer, state = load_student(config, start, folder)
    teacher, keep_ids = load_teacher(config, policy, tokenizer)
    actor = llms.make_actor(policy, sampling_dtype(), always_copy=config.fsdp)
    if config.fsdp:
        distributed.shard_model(policy, token_losses)
    optimizer, last_step = llms.make_optimizer(policy, config.learning_rate), state["step"]
    if last_step:
        distributed.load_optimizer_state(optimizer, state["optimizer"])
    stops = llms.stop_ids(policy, tokenizer)
    lessons = [SFTExample(row["question"], completion_ids(row, tokenizer, stops, keep_ids, config)) for row in rows]
    one_each, share = dataclasses.replace(config, group_size=1), config.on_policy_fraction

    log = run_folder.JsonLines(folder / "metrics.jsonl")
    log.truncate_after(last_step)
    tracker = Accelerator(log_with=None if config.report_to == "none" else config.report_to, project_dir=folder)
    tracker.init_trackers("distill")
    bad_updates = 0  # in a row
    steps = range(last_step + 1, num_steps + 1)
    own = distributed.shard_indices(config.batch_size, 1)  # of this process's answers in a batch
    progress = tqdm(
        steps, folder.name, initial=last_step, total=num_steps, unit="step", disable=not distributed.is_main_process()
    )
    with training_run.SignalHandler() as interrupt:
        for step in progress:
            batch = rldatasets.problems_of_step(lessons, step, config.batch_size, config.seed)
            batch = [batch[i] for i in own]
            on_policy = math.floor(step * share) > math.floor((step - 1) * share)  # evenly spread
            with run_folder.stopwatch(policy.device) as rollout_time:
                if on_policy:
                    rollout = sample(actor, tokenizer, batch, one_each, config.seed * 1_000_003 + step, own)
                else:
                    rollout = as_rollout(batch, tokenizer, config, policy.device)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * lr_factor(step, num_steps, config)
            with run_folder.stopwatch(policy.device) as train_time:
                stats = update(policy, teacher, optimizer, rollout, config)
                llms.sync_actor(actor, policy)

            row = {"step": step, **stats, "on_policy": int(on_policy)}
            num_tokens = distributed.all_reduce_sum({"tokens": rollout.lengths.sum().item()})["tokens"]
            row["completion_length"] = num_tokens / config.batch_size
            row |= {"time/rollout": rollout_time(), "time/train": train_time()}
            row["tokens_per_second"] = num_tokens / (rollout_time() + train_time())
            log.append(row)
            tracker.log(row, step=step)
            progress.set_postfix_str(f"loss {stats['loss']:.4f}", refresh=False)
            bad_updates = bad_updates + 1 if stats["skipped_updates"] else 0
            signal = distributed.all_reduce_max(interrupt.signal or 0)
            stopped = signal or bad_updates >= grpo_main.MAX_BAD_UPDATES
            if stopped or step == num_steps or step % config.save_steps == 0:
                state = dict(step=step, optimizer=distributed.gather_optimizer_state(optimizer))
                kept, weights = config.save_total_limit, distributed.gather_state_dict(policy)
                if distributed.is_main_process():
                    checkpoints.save_checkpoint(folder, step, policy, tokenizer, state, kept, False, weights)
                distributed.barrier()  # whoever goes on finds it
            if stopped and step < num_steps:
                why = "go on with the same command"
                if not signal:
                    why = f"{bad_updates} updates in a row were not finite: try a lower --learning_rate"
                raise training_run.TrainingStopped(signal, f"{folder}: step {step} is saved; {why}")
    training_run.finish(tracker)
    if distributed.is_main_process():
        plotter.plot_run(folder)


def load_student(config: DistillConfig, start: str, folder: Path):
    """(policy, tokenizer, trainer state with "step"): from the folder's newest checkpoint, else from the start."""
    name, state = start, {"step": 0}
    if (folder / "checkpoints" / "latest").exists():
        name = str(checkpoints.find_checkpoint(str(folder), "latest")[1])
        state = torch.load(Path(name, "trainer_state.pt"), weights_only=True, map_location="cpu", mmap=True)
    policy, tokenizer = llms.load(name, trust_remote_code=config.trust_remote_code)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy, tokenizer, state


def load_teacher(config: DistillConfig, policy, tokenizer):
    """(the teacher, or None where what it wrote is all that is needed of it; whether the student has its token ids)."""
    teacher, its_tokenizer = llms.load(
        config.teacher_name, dtype=sampling_dtype(), trust_remote_code=config.trust_remote_code
    )
    same = same_tokens(tokenizer, its_tokenizer)
    if same:  # answers end as the teacher's do, also where the student's checkpoint names another stop token
        stops = {*llms.stop_ids(policy, tokenizer), *llms.stop_ids(teacher, its_tokenizer)}
        policy.generation_config.eos_token_id = sorted(stops)
    return (None if config.loss == "sft" else teacher), same


class SFTExample(NamedTuple):
    question: str
    completion: list[int]  # ids, the stop token last


def completion_ids(row: dict, tokenizer, stops: list[int], keep_ids: bool, config) -> list[int]:
    """What the student is to write after the prompt, a stop token last (with stop_at_answer the teacher needed none).
    The teacher's own ids where the student knows them: a text that is decoded and encoded again can have others."""
    ids = row["ids"] if keep_ids else None
    if ids is None:
        text = row["completion"].removeprefix(rldatasets.prefilled(config.tags) * config.prefill)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids and ids[-1] in stops:
        return ids
    return [*ids, stops[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id]


def gold_rows(rows: list[dict], config) -> list[dict]:
    """The same problems as often, answered by the data set's own solutions in the asked-for form."""
    return [row | {"completion": gold_completion(row, config), "ids": None} for row in rows]


def gold_completion(row: dict, config) -> str:
    steps = re.sub(r"<<.*?>>", "", row["solution"].rpartition("####")[0]).strip()  # GSM8K's notes for a calculator
    opening = rldatasets.prefilled(config.tags) if config.prefill else f"<{config.tags}>"
    return f"{opening}{steps}</{config.tags}>\n<answer>{row['answer']}</answer>"


def as_rollout(lessons: list[SFTExample], tokenizer, config, device: torch.device) -> Rollout:
    """Lessons as the Rollout that would have sampled them (one draw a position), so that the training pass is that of
    main.py. Log-probs and entropies at sampling time are not known; nothing here reads them."""
    prompts = [rldatasets.build_prompt(tokenizer, lesson.question, **config.prompting()) for lesson in lessons]
    prompt_ids = [torch.tensor(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    completions = [torch.tensor(lesson.completion) for lesson in lessons]
    lengths = torch.tensor([len(ids) for ids in completions])
    ids = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True).to(device)  # (B, T)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)  # (B, T)
    unknown = torch.zeros(ids.shape, device=device)
    return Rollout(
        prompt_ids=prompt_ids,
        draws=ids[..., None],
        weights=mask[..., None].float(),
        draw_mask=mask[..., None],
        logprobs=unknown[..., None],
        trace_ids=ids,
        completion_mask=mask,
        is_soft=torch.zeros_like(mask),
        entropy=unknown,
        finish=["stop"] * len(lessons),
        texts=tokenizer.batch_decode(completions, skip_special_tokens=True),
    )


def update(policy, teacher, optimizer, rollout: Rollout, config) -> dict[str, float]:
    """One optimizer step on the mean over all tokens of the batch, of which every process has its own rows. Returns
    what the optimizer really used."""
    num_tokens = distributed.all_reduce_sum({"tokens": rollout.completion_mask.sum().item()})["tokens"]
    autocast = torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=policy.device.type == "cuda")
    losses_of = distributed.bind_forward(policy, token_losses)
    total = 0.0
    policy.train()
    for micro in grpo_main.own_micro_batches(policy, rollout, range(len(rollout.texts)), config.tokens_per_micro_batch):
        with autocast:  # an empty micro-batch only joins in: it reads a row that does not count
            losses = losses_of(teacher, rollout, micro or [0], config.loss, config.jsd_beta)
        loss = losses.sum() * bool(micro) / num_tokens
        loss.backward()
        total += loss.item()
    grad_norm = distributed.sum_and_clip_gradients(policy, config.max_grad_norm)
    finite = math.isfinite(grad_norm)
    if finite:  # one step that is not would ruin every weight
        optimizer.step()
    optimizer.zero_grad()
    policy.eval()
    used = {"lr": optimizer.param_groups[0]["lr"], "skipped_updates": int(not finite)}
    return {**distributed.all_reduce_sum({"loss": total}), "grad_norm": grad_norm, **used}


def lr_factor(step: int, num_steps: int, config) -> float:
    """Linear warm-up to 1 at the step after the warm-up, then half a cosine to final_lr_fraction at the last step."""
    if step <= config.warmup_steps:
        return step / (config.warmup_steps + 1)
    done = (step - config.warmup_steps - 1) / max(1, num_steps - config.warmup_steps - 1)
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * (1 + math.cos(math.pi * min(1.0, done))) / 2


# ---------------------------------------------------------------- measuring


def measure_all(models: dict[str, str], config: DistillConfig, folder: Path) -> dict[str, dict]:
    """{label: what `measure` says}. Each is written to measured.jsonl when it is known, and not measured again."""
    log = run_folder.JsonLines(folder / "measured.jsonl")
    known = {row["model"]: row for row in log.read()}
    log.replace(list(known.values()))
    # A process for each model, forked from a server that has loaded the code and nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill"])
    for label, name in models.items():
        if label not in known:
            print(f"measuring: {label}", flush=True)
            with ProcessPoolExecutor(1, mp_context=context) as process:
                known[label] = {"model": label, **process.submit(measure, name, config).result()}
            log.append(known[label])
    return {label: known[label] for label in models}


def measure(model_name: str, config: DistillConfig) -> dict[str, float]:
    """Accuracy on the test split, sampled and greedy, with intervals; and what the model costs.

    Runs in a process of its own, so that the memory is this model's alone.

    parameters         tied embeddings once
    tokens_per_second  of sampling and grading, problems_per_step x group_size rows at a time, on torch's threads
    peak_memory        MiB: weights, and by how much the process grew while it answered; on a GPU, torch's peak there
    """
    model, tokenizer = llms.load(model_name, dtype=sampling_dtype(), trust_remote_code=config.trust_remote_code)
    problems = rldatasets.load_problems(config.dataset_name, "test", config.eval_problems, config.dataset_path)
    problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, **config.prompting())

    def evaluate(problems, temperature):
        return evaluator.evaluate(model, tokenizer, problems, temperature=temperature, **config.answering())

    evaluate(problems[:8], config.temperature)  # what is done once, such as paging in the code, is not the model's cost
    before = peak_of_process()
    with run_folder.stopwatch(model.device) as seconds:
        sampled = evaluate(problems, config.temperature)
    greedy = evaluate(problems, 0.0)
    memory = sum(p.numel() * p.element_size() for p in model.parameters()) + peak_of_process() - before
    if model.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    kept = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_flexible", "format_rate", "length", "truncated_rate")
    return {
        **{name: sampled[name] for name in kept},
        **{f"greedy/{name}": greedy[name] for name in kept},
        "n": sampled["n"],
        "parameters": model.num_parameters(),
        "tokens_per_second": sampled["length"] * sampled["n"] / seconds(),
        "peak_memory": memory / 2**20,
    }


def peak_of_process() -> int:
    """Bytes of memory that this process has had at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_table(table: dict[str, dict]) -> None:
    width = max(map(len, table))
    n = next(iter(table.values()))["n"]
    print(f"\n{n:,} test problems, % with 95 % Wilson intervals:")
    print(
        f"{'':{width}} {'sampled':>18} {'greedy':>18} {'format':>6} {'tokens':>6} {'size':>8} {'tok/s':>8} {'MiB':>6}"
    )
    for label, row in table.items():
        shares = [
            f"{100 * row[k]:5.1f} [{100 * row[k + '_low']:4.1f}, {100 * row[k + '_high']:4.1f}]"
            for k in ("accuracy", "greedy/accuracy")
        ]
        print(
            f"{label:{width}} {shares[0]:>18} {shares[1]:>18} {100 * row['format_rate']:6.1f} {row['length']:6.1f} "
            f"{row['parameters'] / 1e6:7.2f}M {row['tokens_per_second']:8,.0f} {row['peak_memory']:6,.0f}"
        )


SHOWN = (("accuracy", "sampled", plotter.BLUE, "o"), ("greedy/accuracy", "greedy", plotter.VERMILLION, "D"))


def with_interval(row: dict, key: str) -> tuple[float, list[list[float]]]:
    """A share in %, and the lengths of its interval's two arms as matplotlib takes them."""
    value, low, high = (100 * row[key + end] for end in ("", "_low", "_high"))
    return value, [[value - low], [high - value]]


@rc_context(plotter.STYLE)
def report_figure(table: dict[str, dict]) -> Figure:
    """Accuracy of each model with its interval, and how long its answers are. The figures beside are the legend."""
    figure = Figure(figsize=(plotter.WIDTH, 0.9 + 0.42 * len(table)), layout="constrained")
    accuracy, length = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    rows = list(table.values())
    for column, (key, label, color, marker) in enumerate(SHOWN):
        beside = dict(xycoords=("axes fraction", "data"), color=color, ha="right", va="center", annotation_clip=False)
        accuracy.annotate(label, (1.13 + 0.13 * column, -0.85), **beside)
        for place, row in enumerate(rows):
            value, arms = with_interval(row, key)
            accuracy.errorbar(value, place, xerr=arms, fmt=marker, color=color, markersize=5, capsize=3)
            accuracy.annotate(f"{value:.1f}", (1.13 + 0.13 * column, place), **beside)
    accuracy.set(title=f"Test accuracy, n = {rows[0]['n']:,}", xlabel="% (95 % Wilson interval)", xlim=(-2, 102))
    accuracy.set_yticks(range(len(rows)), [f"{name}, {row['parameters'] / 1e6:.2f}M" for name, row in table.items()])
    accuracy.set_ylim(len(rows) - 0.5, -0.5)
    length.barh(range(len(rows)), [row["length"] for row in rows], height=0.5, color=plotter.GREY)
    length.set(title="Length of sampled answers", xlabel="tokens")
    return figure


@rc_context(plotter.STYLE)
def sweep_figure(table: dict[str, dict]) -> Figure:
    """Accuracy, speed and memory against the number of parameters."""
    figure = Figure(figsize=(plotter.WIDTH, 3.2), layout="constrained")
    accuracy, speed, memory = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    teacher, students = table["teacher"], [row for name, row in table.items() if name != "teacher"]
    sizes = [row["parameters"] / 1e6 for row in students]
    for key, label, color, marker in SHOWN:
        accuracy.axhline(100 * teacher[key], color=color, linestyle=":", linewidth=1)
        for row in students:
            value, arms = with_interval(row, key)
            looks = dict(fmt=marker, color=color, markersize=5, capsize=3)
            accuracy.errorbar(row["parameters"] / 1e6, value, yerr=arms, label=label, **looks)
            label = None
    accuracy.set(title=f"Test accuracy, n = {teacher['n']:,}", ylabel="% (95 % Wilson interval)", ylim=(-2, 102))
    accuracy.legend(frameon=False, title="dotted: teacher")
    for axes, key, title in ((speed, "tokens_per_second", "Tokens per second"), (memory, "peak_memory", "Peak MiB")):
        for row in students:
            axes.plot(row["parameters"] / 1e6, row[key], "o", color=plotter.BLACK)
        axes.set(title=title, ylim=(0, 1.1 * max(row[key] for row in students)))
    for axes in (accuracy, speed, memory):
        axes.set(xscale="log", xlabel="parameters", xlim=(min(sizes) / 1.3, max(sizes) * 1.3))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}M")
        axes.xaxis.set_minor_locator(NullLocator())
    return figure


# ---------------------------------------------------------------- small things


def load_tokenizer(model_name: str, config):
    return llms._from_pretrained(llms.AutoTokenizer, model_name, trust_remote_code=config.trust_remote_code)


def same_tokens(a, b) -> bool:
    """Whether two tokenizers name the same ids the same way; the width of a model's head says nothing about that."""
    return a.get_vocab() == b.get_vocab()


def sampling_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}") from error


def write_json(file: Path, content: dict) -> None:
    """Whole or not at all."""
    if not distributed.is_main_process():
        return
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def main() -> None:
    distributed.init_distributed()
    try:
        run(parse_config(sys.argv[1:]))
    except ValueError as error:
        sys.exit(complain(error, 2))
    except training_run.TrainingStopped as stopped:
        sys.exit(complain(stopped, 1 if stopped.signal is None else 128 + stopped.signal))
    except KeyboardInterrupt:
        sys.exit(complain("interrupted; go on with the same command", 130))


def complain(message, exit_code: int) -> int:
    print(f"distill.py: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    main()
