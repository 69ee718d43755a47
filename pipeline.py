"""R1's whole pipeline in one folder: cold start, RL, rejection sampling, RL again; controls beside; one table.

    1 cold_start   the base learns a few worked solutions in the asked-for form (R1-Zero leaves this out)
    2 rl           GRPO on that model, as in main.py
    3 rejection    the RL model answers training problems; *the base*, not the RL model, is fine-tuned on the answers
                   that are right and well-formed
    4 rl_again     GRPO on that model

    zero            RL from the base: what does the cold start add?
    shuffled        stage 2 with its advantages dealt out at random: is it the reward that teaches?
    base_answers    stage 3 on the base's own right answers, in as many optimizer steps: did RL have to come before?
    random_answers  stage 3 on as many answers of the RL model, whatever they say: does the check matter?
    longer_rl       stage 2 goes on for the time that stages 3 and 4 took: are they worth it?

    python pipeline.py                                   # all stages, all controls, the table
    python pipeline.py rejection --output_dir runs/p     # one, after those it is built on; the same command goes on
    python pipeline.py --controls zero,longer_rl
    python pipeline.py --help

Every stage leaves a run's folder of its name and starts from a model that another one left, or from the base: STAGES
has it all. A stage that was stopped goes on at its last checkpoint, and what is finished is not done again.
Read `STAGES` first, then the three functions that train; distill.py and main.py hold the loops.
Left out on purpose: R1's second data source (writing, factual questions, translation), its preference rewards in the
last stage, and its reward for one language.
"""

from distillation.pipeline_config import PipelineConfig, parse_config
from tracking import command_line

if __name__ == "__main__":  # --help and refused flags are answered before torch is imported, which takes seconds
    CONFIG = command_line.parse_or_exit(parse_config)

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import distill
import evaluator
import llms
import rldatasets
from distillation import pipeline_config, pipeline_report
from distillation.config import DistillConfig
from distillation.examples import filter_rows, gold_rows, unchecked_rows
from distillation.measurement import measure_all
from engine import distributed
from engine.device import default_device
from tracking import checkpoints, run_config, run_folder
from tracking.run_config import GRPOConfig, ModelAndData, Sampling

OWN_FILES = ("args.json", "data", "report", "answers-base", "answers-rl")  # beside a folder for every stage
MAY_DIFFER = (
    "stage", "controls", "output_dir", "overwrite_output_dir", "save_steps", "report_to", "tokens_per_micro_batch",
    "fsdp", "gradient_checkpointing",
)  # fmt: skip
SHARED = distill.names_of(ModelAndData, Sampling) - {"model_name"}
SHARED |= {"preset", "save_steps", "report_to", "tokens_per_micro_batch", "fsdp", "gradient_checkpointing"}


def run(config: PipelineConfig) -> Path:
    """Runs the asked stages, and the report where all are asked for; returns the folder."""
    folder = Path(config.output_dir or f"runs/pipeline-{config.preset}").expanduser().resolve()
    fresh = config.overwrite_output_dir or not distributed.run_on_main((folder / "args.json").exists)
    config = run_folder.fix_prompt_date(config, *([] if fresh else [folder]))
    check(config, folder)
    if fresh:
        distributed.run_on_main(begin, config, folder)
    run_folder.check_same_config(folder, dataclasses.asdict(config), MAY_DIFFER)

    config = dataclasses.replace(config, dataset_path=str(folder / "data"))
    names = wanted(config)
    for name in names:
        if distributed.is_main_process():
            print(f"\n=== {STAGES[name].title}")
        STAGES[name].train(config, name, folder)
    if config.stage == "all":
        distributed.run_on_main(report, config, names, folder)
    return folder


# ---------------------------------------------------------------- the three ways to train


def learn_gold(config: PipelineConfig, name: str, folder: Path) -> None:
    """Supervised fine-tuning on the data set's own solutions, in the asked-for form."""
    sft = sft_config(
        config, teacher_name=config.model_name, epochs=config.cold_start_epochs,
        batch_size=config.cold_start_batch_size, learning_rate=config.cold_start_learning_rate,
    )  # fmt: skip
    problems = rldatasets.load_problems(config.dataset_name, "train", path=config.dataset_path)
    tokenizer = llms.load_tokenizer(checkpoints.resolve_model_name(config.model_name), config.trust_remote_code)
    problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, config.prompt_format())
    rows = gold_rows([dataclasses.asdict(problem) for problem in problems], sft)
    rows = [row for row in rows if evaluator.format_reward(row["completion"], config.tags)]
    if not rows:
        raise ValueError(f"--dataset_path {config.dataset_path}: no problem has a worked solution to begin with")
    distill.train_student(sft, model_of(STAGES[name].start, config, folder), rows[: config.cold_start_examples],
                          folder / name)  # fmt: skip


def grpo(config: PipelineConfig, name: str, folder: Path) -> None:
    """RL as in main.py."""
    steps, control = config.rl_steps, "none"
    if name == "shuffled":
        control = "shuffled_advantages"
    if name == "longer_rl":  # as many steps as stage 4, and those that fit into the time of stage 3
        seconds = {one: pipeline_report.logged(stage_folders(one, folder))["seconds"] for one in ("rl", *LONGER_FOR)}
        steps += round(seconds["rejection"] * 2 * config.rl_steps / (seconds["rl"] + seconds["rl_again"]))
    # A second RL stage goes on with other problems than the first.
    rounds = sum(STAGES[other].train is grpo for other in built_on(name)) - 1
    settings = run_config.PRESETS[config.preset] | shared_settings(config) | dict(
        model_name=model_of(STAGES[name].start, config, folder), seed=config.seed + 1000 * rounds, max_steps=steps,
        learning_rate=config.rl_learning_rate, control=control, output_dir=str(folder / name),
        eval_steps=config.save_steps, eval_problems=min(128, config.eval_problems), save_total_limit=1,
    )  # fmt: skip
    distill.train_or_resume(GRPOConfig(**settings), f"GRPO, {steps} steps")


def learn_answers(config: PipelineConfig, name: str, folder: Path) -> None:
    """Supervised fine-tuning on answers that are right and well-formed, or on as many others (random_answers)."""
    writer = STAGES[name].answers_of
    answers = write_answers(config, writer, folder)
    kept = rows = right_answers(config, answers)
    if not kept and writer == "base":
        print(f"not one of {len(answers)} answers of the base is right and well-formed: nothing to learn from")
        return
    if not kept:
        raise ValueError(
            f"--train_problems {config.train_problems}: not one of {len(answers)} answers of the RL model is right and "
            "well-formed; give more --rl_steps or --cold_start_examples"
        )
    if name == "random_answers":
        rows = unchecked_rows(answers, len(kept), config.seed, set())  # begin has left out test problems
    if writer == "base":  # fewer answers, seen more often: as many optimizer steps as stage 3 takes
        kept = right_answers(config, write_answers(config, "rl", folder))
    sft = sft_config(
        config, teacher_name=model_of(writer, config, folder), epochs=config.sft_epochs * len(kept) / len(rows),
        batch_size=config.sft_batch_size, learning_rate=config.sft_learning_rate,
    )  # fmt: skip
    distill.train_student(sft, model_of(STAGES[name].start, config, folder), rows, folder / name)


class Stage(NamedTuple):
    title: str  # its row in the table
    train: Callable  # (config, name, folder): leaves a trained model in folder/name
    start: str  # whose weights it begins with: "base" or a stage
    answers_of: str | None = None  # who wrote the answers that it learns
    after: tuple[str, ...] = ()  # other stages that have to be finished


LONGER_FOR = ("rejection", "rl_again")  # whose time longer_rl gets
STAGES = {
    "cold_start": Stage("1 cold start", learn_gold, start="base"),
    "rl": Stage("2 RL", grpo, start="cold_start"),
    "rejection": Stage("3 rejection sampling", learn_answers, start="base", answers_of="rl"),
    "rl_again": Stage("4 RL again", grpo, start="rejection"),
    "zero": Stage("Zero, RL from the base", grpo, start="base"),
    "shuffled": Stage("stage 2, shuffled advantages", grpo, start="cold_start"),
    "base_answers": Stage("stage 3, the base's answers", learn_answers, "base", answers_of="base", after=("rl",)),
    "random_answers": Stage("stage 3, random answers", learn_answers, start="base", answers_of="rl"),
    "longer_rl": Stage("RL for the same time", grpo, start="rl", after=LONGER_FOR),
}
# What the table says of gains: the first minus the second, each with the question that the difference answers.
COMPARISONS = {
    ("cold_start", "base"): "the cold start",
    ("rl", "cold_start"): "RL",
    ("rejection", "rl"): "the fine-tuned base, against the writer of its answers",
    ("rl_again", "rejection"): "RL again",
    ("rl_again", "rl"): "stages 3 and 4 together",
    ("rl", "zero"): "a cold start before RL",
    ("rl", "shuffled"): "the learning signal of RL",
    ("rejection", "base_answers"): "answers of the RL model, not of the base",
    ("rejection", "random_answers"): "the check of answers",
    ("rl_again", "longer_rl"): "stages 3 and 4 in place of more RL",
}


# ---------------------------------------------------------------- answers, settings, folders


def write_answers(config: PipelineConfig, writer: str, folder: Path) -> list[dict]:
    """The writer's answers to training problems, sampled where they are not there yet: rows of teacher.jsonl."""
    answers = folder / f"answers-{writer}"
    distributed.run_on_main(distill.make_folder, answers)
    rows_per_batch = config.problems_per_step * config.group_size
    sampling = sft_config(
        config, teacher_name=model_of(writer, config, folder), train_problems=config.train_problems,
        group_size=config.samples_per_problem, problems_per_step=max(1, rows_per_batch // config.samples_per_problem),
    )  # fmt: skip
    distill.generate_stage(sampling, {"generate": answers})
    return distributed.run_on_main(run_folder.JsonLines(answers / "teacher.jsonl").read)


def right_answers(config: PipelineConfig, answers: list[dict]) -> list[dict]:
    """Those that are right, well-formed, ended by themselves, and no copies."""
    return filter_rows(answers, config.keep_per_problem, set())[0]


def shared_settings(config: PipelineConfig) -> dict:
    return {name: getattr(config, name) for name in SHARED}


def sft_config(config: PipelineConfig, **settings) -> DistillConfig:
    """Settings of distill.py's functions. The student is the base."""
    always = dict(model_name=config.model_name, seed=config.seed, warmup_steps=config.sft_warmup_steps)
    return DistillConfig(**shared_settings(config) | always | dict(save_total_limit=1) | settings)


def model_of(name: str, config: PipelineConfig, folder: Path) -> str:
    """The base's name, or the folder of the model that a stage has left."""
    return config.model_name if name == "base" else str(folder / name / "checkpoints" / "latest")


def built_on(name: str) -> set[str]:
    """The stages that a model comes from, its own included: those whose cost it has."""
    if name in ("base", None):
        return set()
    return {name} | built_on(STAGES[name].start) | built_on(STAGES[name].answers_of)


def wanted(config: PipelineConfig) -> list[str]:
    """The stages to run, in the order of STAGES."""
    asked = {*pipeline_config.STAGES, *config.control_list()} if config.stage == "all" else {config.stage}
    while needed := {other for name in asked for other in built_on(name).union(STAGES[name].after)} - asked:
        asked |= needed
    return [name for name in STAGES if name in asked]


def stage_folders(name: str, folder: Path) -> list[Path]:
    """Where a stage has logged what it cost: its training, and the sampling of the answers that it learned."""
    writer = STAGES[name].answers_of if name in STAGES else None
    return [folder / name] + ([folder / f"answers-{writer}"] if writer else [])


# ---------------------------------------------------------------- before and after


def check(config: PipelineConfig, folder: Path) -> None:
    """Refuses what can be known before hours of training."""
    for name in ("cold_start_batch_size", "sft_batch_size"):
        if getattr(config, name) % distributed.world_size():
            value, processes = getattr(config, name), distributed.world_size()
            raise ValueError(f"--{name} {value}: must be a multiple of {processes} processes")
    distill.check(sft_config(config, teacher_name=config.model_name), folder)
    minibatches = run_config.PRESETS[config.preset].get("minibatches", 1)
    if config.problems_per_step % (minibatches * distributed.world_size()):
        raise ValueError(
            f"--problems_per_step {config.problems_per_step}: must be a multiple of the {minibatches} minibatches of "
            f"preset {config.preset} times {distributed.world_size()} processes"
        )
    GRPOConfig(**run_config.PRESETS[config.preset] | shared_settings(config))


def begin(config: PipelineConfig, folder: Path) -> None:
    """args.json, and the problems of all stages in data/: training problems that are in the test split are left out
    here, so that none of them can reach a stage. Replaces an older pipeline, when nothing is left to refuse."""
    generated = config.dataset_path is None and config.dataset_name in rldatasets.GENERATED
    limits = {"train": max(rldatasets.NUM_GENERATED, config.train_problems) if generated else None, "test": None}
    splits = {s: rldatasets.load_problems(config.dataset_name, s, n, config.dataset_path) for s, n in limits.items()}
    test = {rldatasets.bare_question(problem.question) for problem in splits["test"]}
    train = [problem for problem in splits["train"] if rldatasets.bare_question(problem.question) not in test]
    if not train:
        raise ValueError(f"--dataset_path {config.dataset_path}: every training problem is a test problem too")
    if len(train) < len(splits["train"]):
        print(f"left out {len(splits['train']) - len(train)} training problems that are test problems too")
    if len(train) < config.train_problems:
        print(f"{len(train):,} training problems in all, fewer than --train_problems {config.train_problems}")
    for name in (*OWN_FILES, *STAGES):
        if (folder / name).is_dir():
            run_folder.remove_folder(folder / name)
    (folder / "args.json").unlink(missing_ok=True)
    distill.make_folder(folder / "data")
    for split, problems in (splits | {"train": train}).items():
        rows = ({"question": problem.question, "answer": problem.solution} for problem in problems)
        run_folder.JsonLines(folder / "data" / f"{split}.jsonl").replace(list(rows))
    # Last: a folder without it is begun again.
    run_folder.write_args(folder, dataclasses.asdict(config), default_device())


def report(config: PipelineConfig, names: list[str], folder: Path) -> None:
    """report/: pipeline.json, pipeline.md, pipeline.png."""
    distill.make_folder(folder / "report")
    names = ["base", *(name for name in names if (folder / name / "checkpoints").is_dir())]
    models = {name: model_of(name, config, folder) for name in names}
    table = measure_all(models, config, folder / "report", measuring=pipeline_report.measure)
    for name, row in table.items():
        own = stage_folders(name, folder)
        whole = {place for stage in built_on(name) for place in stage_folders(stage, folder)}
        title = STAGES[name].title if name in STAGES else "the base"
        row |= {"title": title, "control": name in pipeline_config.CONTROLS, **pipeline_report.cost(own, whole)}
    answers = {}
    for writer in ("rl", "base"):
        rows = run_folder.JsonLines(folder / f"answers-{writer}" / "teacher.jsonl").read()
        if rows:
            answers[writer] = {"sampled": len(rows), **filter_rows(rows, config.keep_per_problem, set())[1]}
    pipeline_report.write(folder / "report", table, COMPARISONS, answers)


def main(config: PipelineConfig) -> None:
    distributed.init_distributed()
    run(config)


if __name__ == "__main__":
    command_line.run_script(main, CONFIG)
