"""`python main.py --doctor` checks settings, model, data and machine before a run, and trains nothing.

It prints one line per finding: ok, warning or problem, what it is about, and what to do about it.

    memory                a table of what the run will hold (memory.py), compared with what is free
    model and tokenizer   family, positions, stop ids, chat template, tags as tokens, sampling defaults
    data                  number of problems, lengths of their prompts, number of prompts that are too long
    a first rollout       pass rate, format, truncation, groups of equal rewards; tokens per second, hours for the run

Left out on purpose: repairing anything. It names the flags; the user changes them.
"""

import os
import statistics
import time

import torch

import evaluator
import grpo
import llms
import rldatasets
from rollout import generate
from tracking.findings import Finding, judge
from tracking.memory import memory_table

GIB = 2**30


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
    try:  # memory first: loading a model that does not fit would end the process
        yield from examine_memory(config, llms.load_config(config.model_name, config.trust_remote_code))
        model, tokenizer = llms.load(config.model_name, trust_remote_code=config.trust_remote_code)
    except ValueError as error:
        yield Finding("problem", "model", str(error))
        return
    yield from examine_model(config, model, tokenizer)
    problems = []
    try:
        problems = rldatasets.load_problems(config.dataset_name, "train", path=config.dataset_path)
        rldatasets.load_problems(config.dataset_name, "test", config.eval_problems, config.dataset_path)
    except ValueError as error:
        yield Finding("problem", "data", str(error))
    if problems:
        yield from examine_prompts(config, tokenizer, problems)
        yield from examine_rollout(config, model, tokenizer, problems)


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
    prompt = config.prompt_format().prompt(tokenizer, "1 + 1?")
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
    on_gpu = torch.cuda.is_available()
    table = memory_table(config, model_config, on_gpu)
    for name, size in table.items():
        if name != "peak":
            yield Finding("ok", "memory", f"{size / GIB:8.2f} GiB  {name}")
    free = torch.cuda.mem_get_info()[0] if on_gpu else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{table['peak'] / GIB:8.2f} GiB  at the peak, {free / GIB:.1f} GiB free"
    if table["peak"] > free:
        advice = "lower --tokens_per_micro_batch, or --gradient_checkpointing, or a smaller model"
        yield Finding("problem", "memory", text, advice=advice)
    else:
        yield Finding("warning" if table["peak"] > 0.9 * free else "ok", "memory", text)


# ---------------------------------------------------------------- a first rollout


def examine_rollout(config, model, tokenizer, problems):
    """Yields Findings from a few groups that are sampled, graded and taken through the backward pass.

    Their rewards show whether training has a signal, and their times give an estimate for the whole run.
    """
    try:
        problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, config.prompt_format())
        mode = config.rollout_mode()
        mode.check_reserve(tokenizer)
    except ValueError as error:
        yield Finding("problem", "rollout", str(error))
        return
    device = model.device
    actor = llms.make_actor(model, torch.bfloat16 if config.uses_bf16(device) else torch.float32)
    count = min(4, config.problems_per_step)
    chosen = rldatasets.problems_of_step(problems, 1, count, config.seed)
    prompts = [config.prompt_format().prompt(tokenizer, p.question) for p in chosen]
    options = dict(temperature=config.temperature, stop_tag=config.stop_tag(), soft=mode, seed=config.seed)
    generate(actor, tokenizer, prompts[:1], max_new_tokens=2, seed=0)  # warm-up: the first call is slower
    started = time.perf_counter()
    rollout = generate(
        actor, tokenizer, prompts, group_size=config.group_size, max_new_tokens=config.max_completion_length, **options
    )
    wait_for(device)
    rollout_seconds = time.perf_counter() - started

    records = evaluator.grade(rollout, chosen, evaluator.parse_rewards(config.rewards), config.prompt_format())
    rewards = torch.tensor([record["reward"] for record in records])
    rows = len(records)
    passed = sum(record["correct"] for record in records) / rows
    formed = sum(record["format"] for record in records) / rows
    cut_off = rollout.finish.count("length") / rows
    advantages = grpo.compute_advantages(rewards, config.group_size, "none").view(-1, config.group_size)
    no_signal = (advantages == 0).all(dim=1)
    yield judge(
        passed > 0,
        "pass rate",
        f"{passed:.0%} of {rows} answers are right",
        advice="with none right there is nothing to reinforce: an easier dataset, or a stronger model",
    )
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
    yield from estimate_time(config, model, rollout, rollout_seconds, len(problems))


def estimate_time(config, model, rollout, rollout_seconds: float, num_problems: int):
    """Yields Findings about speed and about the hours of the whole run.

    The rollout and its update are scaled to the size of a step; evaluation answers min(eval_problems, num_problems)
    problems twice, sampled and greedy.
    """
    rows, tokens = len(rollout.texts), rollout.lengths.sum().item()
    scale = config.problems_per_step * config.group_size / rows
    rollout_of_step = scale * rollout_seconds
    step = rollout_of_step + scale * config.updates_per_rollout * seconds_of_update(config, model, rollout)
    evaluations = 2 + config.max_steps // config.eval_steps
    evaluation = 2 * min(config.eval_problems, num_problems) / rows * rollout_seconds
    minutes = (config.max_steps * step + evaluations * evaluation) / 60
    text = f"{tokens / rollout_seconds:,.0f} tokens/s; a step {step:.1f} s, {rollout_of_step:.1f} s of it rollout"
    yield Finding("ok", "speed", f"{text} (from {rows} rows: more at once are faster)")
    length = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.0f} minutes"
    text = f"about {length} for {config.max_steps} steps and {evaluations} evaluations, at answers of this length"
    yield Finding("ok", "time", text)


def seconds_of_update(config, model, rollout) -> float:
    """Time of the forward and backward pass of all rows of the rollout. Deletes the gradients afterwards."""
    started = time.perf_counter()
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.uses_bf16(model.device))
    for micro in llms.micro_batches(rollout, range(len(rollout.texts)), config.tokens_per_micro_batch):
        with autocast:
            logprobs = llms.completion_logprobs(model, rollout, config.temperature, micro)
        logprobs.sum().backward()
    model.zero_grad()
    wait_for(model.device)
    return time.perf_counter() - started


def wait_for(device):
    """Waits until the GPU has finished, so that a clock around the work measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
