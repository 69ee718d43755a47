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
    torchrun --nproc_per_node 4 distill.py              # several GPUs: see docs/gpu.md
    python distill.py --help

Each stage leaves a folder of its name with its settings, goes on in it where it was stopped, and on a CPU ends where it
would have ended uninterrupted. Read distillation/losses.py first (what is learned), then `train_student`; the other
files of distillation/ have the details.
Left out on purpose: evaluation while a student trains (the report measures), temperatures on teacher logits, losses on
hidden states or attention maps, teachers behind an API.
"""

from distillation.config import (
    DistillConfig,
    StudentConfig,
    StudentOptimization,
    parse_config,
)
from tracking import command_line

if __name__ == "__main__":  # --help and refused flags are answered before torch is imported, which takes seconds
    CONFIG = command_line.parse_or_exit(parse_config)

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

import llms
import main as grpo_main
import rldatasets
from distillation.examples import (
    SFTExample,
    answer_records,
    as_rollout,
    completion_ids,
    filter_rows,
    gold_completion,
    gold_rows,
    sample,
    unchecked_rows,
)
from distillation.losses import token_losses
from distillation.measurement import measure_all, print_table, report_figure, sweep_figure
from distillation.students import untrained_student
from engine import distributed
from engine.device import default_device
from rollout import Rollout
from tracking import checkpoints, plotter, run_config, run_folder
from tracking.run_config import GRPOConfig, ModelAndData, Sampling
from tracking.training_run import SignalHandler, TrainingRun
from update import make_trainable, optimizer_step, own_micro_batches, set_learning_rate

# ---------------------------------------------------------------- the stages


def names_of(*sections) -> set[str]:
    return {f.name for section in sections for f in dataclasses.fields(section)}


# Which settings each stage's results come from: to go on with other ones would mix two runs.
TRAINING = names_of(StudentOptimization) - {"tokens_per_micro_batch", "gradient_checkpointing", "fsdp"}
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
    folder = Path(config.output_dir or f"runs/distill-{config.preset}").expanduser()
    data = Path(config.data_dir or folder).expanduser()  # where generate and filter are
    config = run_folder.fix_prompt_date(config, data / "generate", *(folder / stage for stage in STAGES))
    check(config, data)
    asked = PIPELINE[-1] if config.stage == "all" else config.stage
    stages = (*SAMPLED, "sweep") if asked == "sweep" else PIPELINE[: PIPELINE.index(asked) + 1]
    folders = {stage: (data if stage in SAMPLED else folder) / stage for stage in stages}
    if config.data_dir:
        stages = [stage for stage in stages if stage not in SAMPLED]
    if config.overwrite_output_dir:  # only now, when nothing is left that could be refused
        for stage in BUILT_ON[config.stage]:
            distributed.run_on_main(shutil.rmtree, folder / stage, True)

    record = dataclasses.asdict(config)
    for stage in stages:
        if (folders[stage] / "args.json").exists():
            depends = {name: record[name] for name in sorted(DEPENDS_ON[stage])}
            run_folder.check_same_config(folders[stage], depends, may_differ=())
    for stage in stages:
        if not distributed.run_on_main((folders[stage] / "args.json").exists):
            distributed.run_on_main(make_folder, folders[stage])
            run_folder.write_args(folders[stage], record, default_device())
        STAGES[stage](dataclasses.replace(config, teacher_name=find_teacher(config, data)), folders)
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
    teacher_config = llms.load_config(checkpoints.resolve_model_name(teacher_name), config.trust_remote_code)
    students = config.sweep_list() if config.stage == "sweep" else [config.student_config or config.model_name]
    for student in students:
        if "=" in student:
            student_name, student_config = teacher_name, StudentConfig.parse(student).model_config(teacher_config)
        else:
            student_name = checkpoints.resolve_model_name(student)
            student_config = llms.load_config(student_name, config.trust_remote_code)
        needed = config.max_prompt_length + config.max_completion_length
        positions = min(llms.max_positions(teacher_config), llms.max_positions(student_config))
        if needed > positions:
            raise ValueError(f"{needed} tokens of prompt and completion exceed the models' {positions} positions")
        if config.loss != "sft":
            refuse_other_tokens(config, teacher_name, student_name)


def refuse_other_tokens(config: DistillConfig, teacher_name: str, student_name: str) -> None:
    names = map(checkpoints.resolve_model_name, (teacher_name, student_name))
    tokenizers = (llms.load_tokenizer(name, config.trust_remote_code) for name in names)
    if not same_tokens(*tokenizers):
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
        learned = made_with.get("preset") == preset and made_with.get("control") == "none"
        if learned and (last / "config.json").is_file():  # a run of adapters may hold no model
            found.append((last.stat().st_mtime, str(last)))
    return max(found)[1] if found else None


def train_teacher(config: DistillConfig, folder: Path) -> str:
    """GRPO as in main.py, with teacher_preset, on the same task."""
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
    return train_or_resume(grpo_config, f"no teacher is given: training one by GRPO, {config.teacher_steps} steps")


def train_or_resume(config: GRPOConfig, announcement: str) -> str:
    """GRPO as in main.py, in config.output_dir. Goes on where it was stopped; what is finished is not done again.
    Returns the last checkpoint. announcement: printed if there is anything to do."""
    folder = Path(config.output_dir)
    last = folder / "checkpoints" / f"step-{config.max_steps}"
    if not last.is_dir():
        started = (folder / "checkpoints" / "latest").exists()
        if distributed.is_main_process():
            print(announcement)
        how = dict(resume_from_checkpoint="latest") if started else dict(overwrite_output_dir=True)
        grpo_main.train(dataclasses.replace(config, **how), how_to_resume="go on with the same command")
    return str(last)


def generate_stage(config: DistillConfig, folders: dict[str, Path]) -> None:
    """teacher.jsonl: group_size answers of the teacher to each training problem, graded; metrics.jsonl: what the
    sampling of each batch took."""
    times = run_folder.JsonLines(folders["generate"] / "metrics.jsonl")
    log = run_folder.JsonLines(folders["generate"] / "teacher.jsonl")
    problems = rldatasets.load_problems(config.dataset_name, "train", config.train_problems, config.dataset_path)
    teacher_name = checkpoints.resolve_model_name(config.teacher_name)
    tokenizer = llms.load_tokenizer(teacher_name, config.trust_remote_code)
    problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, config.prompt_format())
    batches = [problems[i : i + config.problems_per_step] for i in range(0, len(problems), config.problems_per_step)]
    rows = distributed.run_on_main(log.read)
    if len(rows) == len(problems) * config.group_size:
        return
    done = len(rows) // (config.problems_per_step * config.group_size)
    log.replace(rows[: done * config.problems_per_step * config.group_size])  # a batch is there whole or not at all
    times.truncate_after(done)

    teacher = llms.load(teacher_name, dtype=llms.sampling_dtype(), trust_remote_code=config.trust_remote_code)[0]
    progress = tqdm(
        range(done, len(batches)), "generate", initial=done, total=len(batches), unit="batch",
        disable=not distributed.is_main_process(),
    )  # fmt: skip
    for number in progress:
        part, own = distributed.shard_range(len(batches[number])), []
        with run_folder.stopwatch(teacher.device) as seconds:
            if part:
                batch = [batches[number][i] for i in part]
                rollout = sample(teacher, tokenizer, batch, config, config.seed * 1_000_003 + number, part)
        if part:
            own = answer_records(batch, rollout, config, tokenizer)
        answers = distributed.all_gather(own)
        tokens_per_second = sum(row["length"] for row in answers) / seconds()
        times.append({"step": number + 1, "time/rollout": seconds(), "tokens_per_second": tokens_per_second})
        log.append(*answers)


def filter_stage(config: DistillConfig, folders: dict[str, Path]) -> None:
    """distill.jsonl: the answers to learn from; counts.json: how many were kept, and why the others were not."""
    kept_log = run_folder.JsonLines(folders["filter"] / "distill.jsonl")
    if kept_log.file.exists():
        return
    rows = run_folder.JsonLines(folders["generate"] / "teacher.jsonl").read()
    kept, counts = filter_rows(rows, config.keep_per_problem, test_questions(config))
    print(f"generated {len(rows)}: " + ", ".join(f"{reason} {count}" for reason, count in counts.items()))
    if not kept:
        raise ValueError(f"--train_problems {config.train_problems}: not one of {len(rows)} answers passed the filter")
    write_json(folders["filter"] / "counts.json", {"generated": len(rows), **counts})
    kept_log.replace(kept)


def test_questions(config: DistillConfig) -> set[str]:
    """The questions that no student may learn, without their white space."""
    problems = rldatasets.load_problems(config.dataset_name, "test", path=config.dataset_path)
    return {rldatasets.bare_question(problem.question) for problem in problems}


def train_stage(config: DistillConfig, folders: dict[str, Path]) -> None:
    """distilled/: the student after its lesson. gold/, unfiltered/: its twins, from the same start, after theirs."""
    rows = run_folder.JsonLines(folders["filter"] / "distill.jsonl").read()
    start = distributed.run_on_main(untrained_student, config, folders["train"])
    train_student(config, start, rows, folders["train"] / "distilled")
    if "unfiltered" in config.controls():
        answers = run_folder.JsonLines(folders["generate"] / "teacher.jsonl").read()
        unchecked = unchecked_rows(answers, len(rows), config.seed, test_questions(config))
        train_student(config, start, unchecked, folders["train"] / "unfiltered")
    if "gold" in config.controls():
        plain = dataclasses.replace(config, loss="sft", on_policy_fraction=0.0)
        train_student(plain, start, gold_rows(rows, config), folders["train"] / "gold")


def report_stage(config: DistillConfig, folders: dict[str, Path]) -> None:
    """distill.json, distill.png and a table: what each model can do, and what it costs."""
    models = {
        "teacher": config.teacher_name,
        "untrained student": untrained_student(config, folders["train"]),
        "distilled student": str(folders["train"] / "distilled" / "checkpoints" / "latest"),
    }
    titles = {"unfiltered": "unfiltered control", "gold": "gold-solution control"}
    models |= {titles[name]: str(folders["train"] / name / "checkpoints" / "latest") for name in config.controls()}
    table = measure_all(models, config, folders["report"])
    counts = json.loads((folders["filter"] / "counts.json").read_text(encoding="utf-8"))
    kept = run_folder.JsonLines(folders["filter"] / "distill.jsonl").read()
    counts["kept, the data set's own solution"] = sum(row["completion"] == gold_completion(row, config) for row in kept)
    write_json(folders["report"] / "distill.json", {"answers": counts, "models": table})
    plotter.save({"distill.png": report_figure(table)}, folders["report"])
    print_table(table)
    print(", ".join(f"{what} {count}" for what, count in counts.items()))
    print(f"In {folders['report']}: distill.json, distill.png. The student: {models['distilled student']}")


def sweep_stage(config: DistillConfig, folders: dict[str, Path]) -> None:
    """sweep.json, sweep.png and a table: students of several sizes, each trained as `train` would."""
    rows = run_folder.JsonLines(folders["filter"] / "distill.jsonl").read()
    models = {"teacher": config.teacher_name}
    for text in config.sweep_list():
        student = dict(student_config=text) if "=" in text else dict(model_name=text, student_config=None)
        folder = folders["sweep"] / text.replace("/", "--")
        one = dataclasses.replace(config, **student)
        train_student(one, distributed.run_on_main(untrained_student, one, folder), rows, folder)
        models[text] = str(folder / "checkpoints" / "latest")
    if not distributed.is_main_process():
        return
    table = measure_all(models, config, folders["sweep"])
    write_json(folders["sweep"] / "sweep.json", table)
    plotter.save({"sweep.png": sweep_figure(table)}, folders["sweep"])
    print_table(table)
    print(f"In {folders['sweep']}: sweep.json, sweep.png, and a folder for every student")


STAGES = {
    "generate": generate_stage,
    "filter": functools.partial(distributed.run_on_main, filter_stage),
    "train": train_stage,
    "report": functools.partial(distributed.run_on_main, report_stage),
    "sweep": sweep_stage,
}


# ---------------------------------------------------------------- training a student


def train_student(
    config: DistillConfig, start: str, rows: list[dict], folder: Path, signals: SignalHandler | None = None
) -> None:
    """Trains the model of that name on `rows`; leaves a run's files (tracking/run_folder.py) in the folder.

    rows: dicts with question, completion and ids (None: encode the completion). A step depends on the seed and its
    number alone, so a training that was stopped ends as it would have. Raises TrainingStopped, with a checkpoint, when
    a signal came or updates stay non-finite.
    """
    num_steps = max(1, round(config.epochs * len(rows) / config.batch_size))
    if (folder / "checkpoints" / f"step-{num_steps}").exists():
        return
    distributed.run_on_main(make_folder, folder / "checkpoints")
    name, state = start, {"step": 0, "optimizer": None}
    if (folder / "checkpoints" / "latest").exists():
        name = checkpoints.find_checkpoint(str(folder), "latest")[1]
        state = checkpoints.load_trainer_state(name)
    policy, tokenizer = llms.load(checkpoints.resolve_model_name(str(name)), trust_remote_code=config.trust_remote_code)
    teacher, keep_ids = load_teacher(config, policy, tokenizer)
    actor = None  # samples for the student, where it writes answers itself
    if config.on_policy_fraction > 0:
        actor = llms.make_actor(policy, llms.sampling_dtype(), always_copy=config.fsdp)
    optimizer = make_trainable(policy, config, token_losses, state["optimizer"])
    stops = llms.stop_ids(policy, tokenizer)
    examples = [SFTExample(row["question"], completion_ids(row, tokenizer, stops, keep_ids, config)) for row in rows]
    one_each, share = dataclasses.replace(config, group_size=1), config.on_policy_fraction
    indices = distributed.shard_indices(config.batch_size, 1)  # of this process's examples in a batch

    run = TrainingRun(
        folder, config, policy=policy, tokenizer=tokenizer, optimizer=optimizer, max_steps=num_steps,
        last_step=state["step"], signals=signals, title=folder.name,
    )  # fmt: skip
    with run:
        for step in run.steps():
            batch = rldatasets.problems_of_step(examples, step, config.batch_size, config.seed)
            batch = [batch[i] for i in indices]
            on_policy = math.floor(step * share) > math.floor((step - 1) * share)  # evenly spread
            with run.timer("rollout"):
                if on_policy:
                    rollout = sample(actor, tokenizer, batch, one_each, config.seed * 1_000_003 + step, indices)
                else:
                    rollout = as_rollout(batch, tokenizer, config, policy.device)
            set_learning_rate(optimizer, config, step, num_steps, decay="cosine")
            with run.timer("train"):
                stats = update(policy, teacher, optimizer, rollout, config)
                if actor is not None:
                    llms.sync_actor(actor, policy)
            num_tokens = distributed.all_reduce_sum({"tokens": rollout.lengths.sum().item()})["tokens"]
            metrics = stats | {"on_policy": int(on_policy), "completion_length": num_tokens / config.batch_size}
            run.finish_step(metrics | run.times(num_tokens), note=f"loss {stats['loss']:.4f}")


def load_teacher(config: DistillConfig, policy, tokenizer):
    """(the teacher, or None where its written answers are enough; whether the student has its token ids)."""
    teacher, its_tokenizer = llms.load(
        checkpoints.resolve_model_name(config.teacher_name),
        dtype=llms.sampling_dtype(),
        trust_remote_code=config.trust_remote_code,
    )
    openings = {config.prompt_format(one).opening for one in (tokenizer, its_tokenizer)}
    same = same_tokens(tokenizer, its_tokenizer) and len(openings) == 1
    if same:  # answers end as the teacher's do, also where the student's checkpoint names another stop token
        stops = {*llms.stop_ids(policy, tokenizer), *llms.stop_ids(teacher, its_tokenizer)}
        policy.generation_config.eos_token_id = sorted(stops)
    return (None if config.loss == "sft" else teacher), same


def update(policy, teacher, optimizer, rollout: Rollout, config) -> dict[str, float]:
    """One optimizer step on the mean over all tokens of the batch, of which every process has its own rows. Returns
    what to log, with the learning rate that was really used."""
    num_tokens = distributed.all_reduce_sum({"tokens": rollout.completion_mask.sum().item()})["tokens"]
    autocast = torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=config.uses_bf16(policy.device))
    losses_of = distributed.bind_forward(policy, token_losses)
    loss_sum = 0.0
    policy.train()
    for micro in own_micro_batches(policy, rollout, range(len(rollout.texts)), config.tokens_per_micro_batch):
        with autocast:  # an empty micro-batch reads one row, which does not count
            losses = losses_of(teacher, rollout, micro or [0], config.loss, config.jsd_beta)
        loss = losses.sum() * bool(micro) / num_tokens
        loss.backward()
        loss_sum += loss.item()
    grad_norm = optimizer_step(policy, optimizer, config.max_grad_norm)
    policy.eval()
    used = {"lr": optimizer.param_groups[0]["lr"], "skipped_updates": int(not math.isfinite(grad_norm))}
    return {**distributed.all_reduce_sum({"loss": loss_sum}), "grad_norm": grad_norm, **used}


# ---------------------------------------------------------------- small things


def same_tokens(a, b) -> bool:
    """Whether two tokenizers name the same ids the same way; the width of a model's head says nothing about that."""
    return a.get_vocab() == b.get_vocab()


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


def main(config: DistillConfig) -> None:
    distributed.init_distributed()
    run(config)


if __name__ == "__main__":
    command_line.run_script(main, CONFIG)
