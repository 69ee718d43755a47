"""`python main.py --doctor` checks settings, model, data and machine before a run, and trains nothing.

It prints one line per finding: ok, warning or problem, what it is about, and what to do about it.

    machine               torch's version, the card, head sizes that its flash kernel takes, the disk (readiness.py)
    memory                a table of what the run will hold (memory.py), compared with what is free
    model and tokenizer   family, positions, stop ids, chat template, tags as tokens, sampling defaults
    data                  number of problems, lengths of their prompts, number of prompts that are too long
    a first rollout       format, truncation, groups of equal rewards; tokens per second, hours for the run
    pass rate             of one answer to each of 192 problems, with its interval

Left out on purpose: repairing anything. It names the flags; the user changes them.
"""

import statistics
import time
from dataclasses import dataclass

import torch

import evaluator
import grpo
import llms
import rldatasets
from engine import lora
from engine.device import default_device, missing_operator
from engine.statistics import wilson_interval
from rollout import Rollout, generate
from tracking import checkpoints, readiness, step_records
from tracking.findings import Finding, judge
from tracking.memory import empty_model, memory_table, num_parameters
from tracking.training_run import is_due

GIB = 2**30
FIRST_PROBLEMS = 4  # of a step, sampled first on a CPU
FULL_STEP_SECONDS = 20  # all rows of a step are timed on a CPU if they are expected to take no longer than this
RARE = 0.02  # a pass rate that training can start from; it has to be told from 0
PASS_RATE_PROBLEMS = 192  # with none of so many right, the 95 % interval ends below RARE


def run(config) -> int:
    """Prints each finding as soon as it is made. Returns the exit code: 1 if one of them is a problem, else 0."""
    levels = []
    for finding in examine(config):
        levels.append(finding.level)
        print(f"{finding.level:8} {finding.name:18} {finding.text}", flush=True)
    print(f"\n{levels.count('problem')} problems, {levels.count('warning')} warnings")
    return int("problem" in levels)


def examine(config):
    """Yields Findings. config: GRPOConfig. Continues after a problem with every check that is still possible."""
    yield from readiness.examine_torch()
    try:  # memory first: loading a model that does not fit would end the process
        model_config = llms.load_config(config.model_name, config.trust_remote_code)
        yield from readiness.examine_device(config, model_config, default_device())
        yield from examine_memory(config, model_config)
        yield from readiness.examine_disk(config, num_parameters(empty_model(model_config)))
        model, tokenizer = llms.load(config.model_name, trust_remote_code=config.trust_remote_code)
    except ValueError as error:
        yield Finding("problem", "model", str(error))
        return
    yield from examine_model(config, model, tokenizer)
    yield from examine_saving(model, tokenizer)
    problems, num_test_problems = [], config.eval_problems
    try:
        problems = rldatasets.load_problems(config.dataset_name, "train", path=config.dataset_path)
        test = rldatasets.load_problems(config.dataset_name, "test", config.eval_problems, config.dataset_path)
        num_test_problems = len(test)
        if note := rldatasets.overlap_note(problems, test):
            yield Finding("warning", "data", note)
    except ValueError as error:
        yield Finding("problem", "data", str(error))
    if not problems:
        return
    try:
        yield from examine_prompts(config, tokenizer, problems)
        yield from examine_rollout(config, model, tokenizer, problems, num_test_problems)
    except torch.OutOfMemoryError:
        advice = "lower --tokens_per_micro_batch, --problems_per_step or --max_completion_length"
        yield Finding("problem", "rollout", "out of memory in a first step", advice=advice)
    except NotImplementedError as error:
        if not (text := missing_operator(error)):
            raise
        yield Finding("problem", "rollout", text)
    except ValueError as error:  # such as a template that cannot be used
        yield Finding("problem", "rollout", str(error))


# ---------------------------------------------------------------- model and tokenizer


def examine_model(config, model, tokenizer):
    """Yields Findings about sizes, stop tokens, prompts, and sampling defaults that are not used."""
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    yield Finding("ok", "model", f"{config.model_name}: {c.model_type}, {parameters / 1e6:,.1f}M parameters")
    needed, positions = config.max_prompt_length + config.max_completion_length, llms.max_positions(c)
    if needed > positions:
        text = f"{needed} tokens of prompt and answer, {positions} positions"
        advice = "lower --max_prompt_length or --max_completion_length"
        yield Finding("problem", "positions", text, advice=advice)
    else:
        yield Finding("ok", "positions", f"{needed} of {positions} used at most")

    named = {
        "config": c.eos_token_id,
        "generation config": model.generation_config.eos_token_id,
        "tokenizer": tokenizer.eos_token_id,
    }
    stops = llms.stop_ids(model, tokenizer)
    shown = ", ".join(f"{stop} {tokenizer.decode([stop])!r}" for stop in stops)
    if not stops:
        level = "ok" if config.stop_at_answer else "problem"
        yield Finding(level, "stop ids", "none is named: answers end at </answer> alone (--stop_at_answer), or never")
    elif len({str(ids) for ids in named.values()}) > 1:
        sources = "; ".join(f"{where}: {ids}" for where, ids in named.items())
        yield Finding("ok", "stop ids", f"{shown}: all of them end an answer ({sources})")
    else:
        yield Finding("ok", "stop ids", shown)
    if tokenizer.pad_token_id is None:
        yield Finding("ok", "pad token", "none: not needed, rows are padded by their lengths")
    if len(tokenizer) > c.vocab_size:
        text = f"the tokenizer has {len(tokenizer)} tokens, the model only {c.vocab_size}"
        yield Finding("problem", "vocabulary", text, advice="these two do not belong together")

    yield from examine_prompt_style(config, tokenizer)
    ignored = sampling_defaults(model.generation_config)
    if ignored:
        text = ", ".join(f"{name} {value}" for name, value in ignored.items())
        yield Finding("ok", "sampling defaults", f"the checkpoint's own are not used: {text}")


SAMPLING_DEFAULTS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "num_beams", "max_length",
    "max_new_tokens", "min_length",
)  # fmt: skip


def sampling_defaults(generation_config) -> dict:
    """The sampling settings that a checkpoint recommends: {name: value}, those that are set."""
    values = {name: getattr(generation_config, name, None) for name in SAMPLING_DEFAULTS}
    return {name: value for name, value in values.items() if value is not None}


def examine_prompt_style(config, tokenizer):
    """Yields Findings about the template, about decoding a prompt again, and about the tags as tokens."""
    style = config.prompt_style
    if style == "chat" and not tokenizer.chat_template:
        text = "--prompt_style chat, but the tokenizer has no chat template"
        yield Finding("problem", "prompt", text, advice="use plain")
        return
    chat = style == "chat" or (style == "auto" and tokenizer.chat_template)
    yield Finding("ok", "prompt", "the tokenizer's chat template" if chat else "R1-Zero's plain template")
    try:
        prompt_format = config.prompt_format(tokenizer)
        prompt = prompt_format.prompt(tokenizer, "1 + 1?")
    except ValueError as error:
        yield Finding("problem", "prompt", str(error))
        return
    if prompt_format.opens_reasoning:
        text = f"the template begins the answer with {prompt_format.opens_reasoning!r}: graded as part of it"
        yield Finding("ok", "prompt", text)
    if chat and (note := rldatasets.layout_note(tokenizer, config.tags)):
        yield Finding("ok", "prompt", note)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != prompt:
        yield Finding("warning", "round trip", "the tokenizer does not give the prompt back as it was")
    tags = f"<{config.tags}>", f"</{config.tags}>", "<answer>", "</answer>"
    pieces = [tokenizer.convert_ids_to_tokens(tokenizer(tag, add_special_tokens=False)["input_ids"]) for tag in tags]
    special = [tag for tag in tags if tag in tokenizer.all_special_tokens]
    if special:
        text = f"{', '.join(special)}: special tokens here, so decoded answers lack them"
        yield Finding("problem", "tags", text, advice="choose other --tags")
    yield Finding("ok", "tags", "  ".join("|".join(piece) for piece in pieces))


# ---------------------------------------------------------------- data


def examine_saving(model, tokenizer):
    """Yields a Finding: whether a checkpoint of this model can be written at all."""
    try:
        checkpoints.try_saving(model, tokenizer)
    except ValueError as error:
        yield Finding("problem", "saving", str(error))
    else:
        yield Finding("ok", "saving", "configuration and tokenizer can be written")


def examine_prompts(config, tokenizer, problems):
    """Yields Findings about the lengths of the training prompts and about gold answers that cannot be graded."""
    prompts = [config.prompt_format().prompt(tokenizer, p.question) for p in problems]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]]
    limit, too_long = config.max_prompt_length, sum(n > config.max_prompt_length for n in lengths)
    text = f"{len(problems)} problems, prompts of {min(lengths)} to {max(lengths)} tokens"
    text += f" (median {statistics.median(lengths):.0f})"
    if too_long == len(lengths):
        yield Finding("problem", "data", f"{text}: all over --max_prompt_length {limit}")
    elif too_long:
        yield Finding("warning", "data", f"{text}: {too_long} over --max_prompt_length {limit} are dropped")
    else:
        yield Finding("ok", "data", text)
    bad = [p.answer for p in problems if evaluator.parse_number(p.answer) is None]
    if bad:
        text = f"{len(bad)} gold answers are not one number (as {bad[0]!r}): no answer to them is ever right"
        yield Finding("warning", "gold answers", text)


# ---------------------------------------------------------------- memory


def examine_memory(config, model_config):
    """Yields the rows of the memory table, and a Finding that compares the peak with the free memory."""
    device = default_device()
    judge_config = None
    if config.judge_model not in (None, "random"):
        judge_config = llms.load_config(config.judge_model, config.trust_remote_code)
    table = memory_table(config, model_config, device.type == "cuda", judge_config)
    for name, size in table.items():
        if name != "peak":
            yield Finding("ok", "memory", f"{size / GIB:8.2f} GiB  {name}")
    free = readiness.free_memory(device)
    peak = f"{table['peak'] / GIB:8.2f} GiB  at the peak"
    if free is None:
        advice = "compare it yourself, or pip install psutil"
        yield Finding("warning", "memory", f"{peak}; how much is free is unknown here", advice=advice)
        return
    text = f"{peak}, {free / GIB:.1f} GiB free"
    if table["peak"] > free:
        advice = "lower --tokens_per_micro_batch, or --gradient_checkpointing, --lora_rank 16, or a smaller model"
        yield Finding("problem", "memory", text, advice=advice)
    else:
        yield Finding("warning" if table["peak"] > 0.9 * free else "ok", "memory", text)


# ---------------------------------------------------------------- a first rollout


@dataclass
class FirstStep:
    """What a first step gave and took. The times are seconds, after a warm-up."""

    problems: list[rldatasets.Problem]
    rollout: Rollout
    sampling: float
    update: float  # forward and backward pass of all rows, once
    forward: float  # without gradient; 0 if the run never does that

    @property
    def num_rows(self) -> int:
        return len(self.rollout.texts)


def examine_rollout(config, model, tokenizer, problems, num_test_problems: int):
    """Yields Findings from answers that are sampled, graded and taken through the backward pass.

    Their rewards show whether training has a signal, and their times give an estimate for the whole run.
    """
    try:
        problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, config.prompt_format())
        config.rollout_mode().check_reserve(tokenizer)
    except ValueError as error:
        yield Finding("problem", "rollout", str(error))
        return
    bf16 = config.uses_bf16(model.device)
    separate = config.lora_rank > 0
    actor = llms.make_actor(model, torch.bfloat16 if bf16 else torch.float32, always_copy=separate)
    if config.lora_rank:
        lora.add_adapters(model, **config.adapters(), bf16=bf16)
    if config.gradient_checkpointing:
        llms.checkpoint_gradients(model)
    step = first_step(config, model, actor, tokenizer, problems)
    yield from examine_answers(config, step, config.prompt_format(tokenizer))
    yield examine_pass_rate(config, step, actor, tokenizer, problems)
    yield from estimate_time(config, step, separate_actor=actor is not model, num_test_problems=num_test_problems)


def first_step(config, policy, actor, tokenizer, problems) -> FirstStep:
    """Samples and differentiates a step's answers, without an optimizer.

    On a GPU: all rows, twice. The first time records graphs and makes kernels ready, the second is timed. On a CPU: a
    few problems first, and then all if they are expected to take FULL_STEP_SECONDS at most.
    """
    all_problems = rldatasets.problems_of_step(problems, 1, config.problems_per_step, config.seed)
    options = dict(
        group_size=config.group_size, temperature=config.temperature, stop_tag=config.stop_tag(),
        soft=config.rollout_mode(), seed=config.seed,
    )  # fmt: skip

    def take(problems) -> FirstStep:
        prompts = [config.prompt_format().prompt(tokenizer, p.question) for p in problems]
        started = time.perf_counter()
        rollout = generate(actor, tokenizer, prompts, max_new_tokens=config.max_completion_length, **options)
        wait_for(actor.device)
        sampling = time.perf_counter() - started
        update = seconds_of_pass(config, policy, rollout)
        needs_forward = num_forward_passes(config, separate_actor=actor is not policy) > 0
        forward = seconds_of_pass(config, policy, rollout, gradient=False) if needs_forward else 0.0
        return FirstStep(problems, rollout, sampling, update, forward)

    if policy.device.type == "cuda":
        take(all_problems)
        return take(all_problems)
    prompt = config.prompt_format().prompt(tokenizer, all_problems[0].question)
    generate(actor, tokenizer, [prompt], max_new_tokens=min(2, config.max_completion_length))  # warm-up
    step = take(all_problems[:FIRST_PROBLEMS])
    expected = len(all_problems) / len(step.problems) * (step.sampling + step.update + step.forward)
    return take(all_problems) if len(all_problems) > FIRST_PROBLEMS and expected <= FULL_STEP_SECONDS else step


def seconds_of_pass(config, model, rollout, gradient: bool = True) -> float:
    """Time of one pass over all rows of the rollout: forward and backward, or forward alone. Deletes the gradients."""
    started = time.perf_counter()
    model.train(gradient)  # only then is gradient checkpointing on
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.uses_bf16(model.device))
    for micro in llms.micro_batches(rollout, range(len(rollout.texts)), config.tokens_per_micro_batch):
        with autocast, torch.set_grad_enabled(gradient):
            logprobs = llms.completion_logprobs(model, rollout, config.temperature, micro)
        if gradient:
            logprobs.sum().backward()
    model.zero_grad()
    model.eval()
    wait_for(model.device)
    return time.perf_counter() - started


def wait_for(device):
    """Waits until the GPU has finished, so that a clock around the work measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def examine_answers(config, step: FirstStep, prompt_format):
    """Yields Findings about what the answers of a first step earn."""
    records = evaluator.grade(step.rollout, step.problems, step_records.run_rewards(config), prompt_format)
    rewards = torch.tensor([record["reward"] for record in records])
    rows, count = step.num_rows, len(step.problems)
    formed = sum(record["format"] for record in records) / rows
    cut_off = step.rollout.finish.count("length") / rows
    advantages = grpo.compute_advantages(rewards, config.group_size, "none").view(-1, config.group_size)
    no_signal = (advantages == 0).all(dim=1)
    yield judge(
        formed > 0,
        "format",
        f"{formed:.0%} have the asked-for form",
        advice="try --prefill, --prompt_style, --rewards accuracy:1,tag_count:0.5",
    )
    yield judge(
        cut_off < 0.3,
        "truncation",
        f"{cut_off:.0%} are cut off at {config.max_completion_length} tokens",
        advice="raise --max_completion_length, or try --stop_at_answer for a base model",
    )
    yield judge(
        not no_signal.all(),
        "groups",
        f"{no_signal.float().mean():.0%} of {count} groups have equal rewards",
        advice="such groups teach nothing: larger groups, or problems neither too easy nor too hard",
    )


def examine_pass_rate(config, step: FirstStep, actor, tokenizer, problems) -> Finding:
    """How many training problems one sampled answer solves.

    A group's answers to one problem are alike, so problems count, not answers: PASS_RATE_PROBLEMS of them, or on a CPU
    as many as FULL_STEP_SECONDS are expected to suffice for.
    """
    count = min(PASS_RATE_PROBLEMS, len(problems))
    if actor.device.type != "cuda":
        count = min(count, max(FIRST_PROBLEMS, int(FULL_STEP_SECONDS / step.sampling * step.num_rows)))
    some = rldatasets.problems_of_step(problems, 1, count, config.seed)
    options = config.answering(tokenizer) | dict(temperature=config.temperature, soft=config.rollout_mode())
    result = evaluator.evaluate(actor, tokenizer, some, **options)
    low, high = result["accuracy_low"], result["accuracy_high"]
    text = f"{result['accuracy']:.1%} of {count} problems are solved by one answer"
    text += f" (95 % interval: {low:.1%} to {high:.1%})"
    if wilson_interval(0, count)[1] > RARE:
        text += f"; so few problems cannot tell {RARE:.0%} from 0"
    return judge(
        result["accuracy"] > 0 and high > RARE,
        "pass rate",
        text,
        advice="with so little right there is nothing to reinforce: an easier dataset, a stronger model, larger groups",
    )


# ---------------------------------------------------------------- hours


def num_evaluations(config) -> int:
    """How many evaluations a run makes: before the first step, and after every step that is due."""
    return 1 + sum(is_due(config, step, config.max_steps) for step in range(1, config.max_steps + 1))


def passes_of_evaluation(config) -> int:
    """Every test problem is answered once sampled and once greedily, and once softly where that is trained."""
    return 2 + (config.rollout_mode().k > 1)


def num_forward_passes(config, separate_actor: bool) -> int:
    """Passes without gradient over the rows of a step: of the policy before its first update, if there are several
    updates and another model sampled (update.update), and of the reference."""
    several = config.updates_per_rollout * config.minibatches > 1
    return (several and separate_actor) + (config.beta > 0)


def rows_of_run(config, separate_actor: bool, num_test_problems: int) -> dict[str, int]:
    """How many rows a whole run of main.py samples for training, samples in evaluations, passes forward without
    gradient, and differentiates. A row that is passed twice counts twice.

    Of the differentiated ones an update leaves out those without an advantage, so that is the most there can be.
    """
    rows, evaluations = config.problems_per_step * config.group_size, num_evaluations(config)
    detailed = evaluations - 1 + (not is_due(config, 1, config.max_steps))
    return {
        "sampled": config.max_steps * rows,
        "evaluated": evaluations * passes_of_evaluation(config) * min(config.eval_problems, num_test_problems),
        # A group of the first step and of every evaluated one is passed again, for its token details.
        "forward": config.max_steps * num_forward_passes(config, separate_actor) * rows + detailed * config.group_size,
        "differentiated": config.max_steps * config.updates_per_rollout * rows,
    }


def estimate_time(config, step: FirstStep, separate_actor: bool, num_test_problems: int):
    """Yields Findings about speed and about the hours of the whole run.

    What was timed is scaled to the rows of a step and to those of an evaluation. Not counted: the optimizer (about ten
    milliseconds per billion parameters on a GPU), pictures, and what the finding names. Rows without an advantage are
    counted, although the update leaves them out.
    """
    all_rows = config.problems_per_step * config.group_size
    scale = all_rows / step.num_rows
    sampling, update = scale * step.sampling, scale * config.updates_per_rollout * step.update
    forward = scale * num_forward_passes(config, separate_actor) * step.forward
    seconds = sampling + update + forward
    tokens = step.rollout.lengths.sum().item()
    text = (
        f"{tokens / step.sampling:,.0f} tokens/s; a step {seconds:.1f} s: rollout {sampling:.1f}, update {update:.1f}"
    )
    text += f", other passes {forward:.1f}" if forward else ""
    text += f" (timed: {step.num_rows} of {all_rows} rows{'' if scale == 1 else '; more at once are faster'})"
    yield Finding("ok", "speed", text)
    total = rows_of_run(config, separate_actor, num_test_problems)
    row_seconds = step.sampling * (total["sampled"] + total["evaluated"])
    row_seconds += step.forward * total["forward"] + step.update * total["differentiated"]
    minutes = row_seconds / step.num_rows / 60
    problems, evaluations, passes = (
        min(config.eval_problems, num_test_problems), num_evaluations(config), passes_of_evaluation(config)
    )  # fmt: skip
    length = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.0f} minutes"
    text = f"about {length} for {config.max_steps} steps and {evaluations} evaluations ({passes} x {problems} answers "
    omitted = ["checkpoints"] + ["further rounds of --dynamic_sampling"] * (config.dynamic_sampling > 0)
    omitted += ["the judge"] * (evaluator.JUDGE in config.rewards)
    yield Finding("ok", "time", f"{text}each), at answers of this length; not counted: {', '.join(omitted)}")
