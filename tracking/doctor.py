"""`python main.py --doctor`: is this run worth starting? Checks settings, model, data and machine; trains nothing.

Every line is ok, a warning, or a problem, with what to do about it:

    model and tokenizer   family, positions, dropout, stop ids, chat template, tags as tokens, sampling defaults
    data                  how many problems, how long their prompts are, how many are too long
    memory                a table of what the run will hold, against what is free
    a first rollout       pass rate, format, truncation, groups without signal; tokens a second, hours for the run

Left out on purpose: repairing anything. It says what is wrong; the flags to change are the user's.
"""

import copy
import os
import statistics
import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

import evaluator
import grpo
import llms
import rldatasets
from engine import head
from rollout import generate

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    level: str  # "ok" | "warning" | "problem"
    what: str
    text: str


def run(config) -> int:
    """Prints the findings as they are made. Returns 1 if one of them is a problem, else 0."""
    levels = []
    for finding in examine(config):
        levels.append(finding.level)
        print(f"{finding.level:8} {finding.what:18} {finding.text}", flush=True)
    print(f"\n{levels.count('problem')} problems, {levels.count('warning')} warnings")
    return int("problem" in levels)


def examine(config):
    """Yields Findings. config: settings.GRPOConfig. Goes on after a problem as far as it makes sense."""
    try:  # memory first: a model that does not fit would end the examination by its loading
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
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    yield Finding("ok", "model", f"{config.model_name}: {c.model_type}, {parameters / 1e6:,.1f}M parameters")
    needed, positions = config.max_prompt_length + config.max_completion_length, llms.max_positions(c)
    if needed > positions:
        advice = "lower --max_prompt_length or --max_completion_length"
        yield Finding("problem", "positions", f"{needed} tokens of prompt and answer, {positions} positions: {advice}")
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
        said = "; ".join(f"{where}: {ids}" for where, ids in named.items())
        yield Finding("ok", "stop ids", f"{shown}: all of them end an answer ({said})")
    else:
        yield Finding("ok", "stop ids", shown)
    if tokenizer.pad_token_id is None:
        yield Finding("ok", "pad token", "none: not needed, rows are padded by their lengths")
    if len(tokenizer) > c.vocab_size:
        text = f"the tokenizer has {len(tokenizer)} tokens, the model only {c.vocab_size}"
        yield Finding("problem", "vocabulary", f"{text}: these two do not belong together")

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
    """What a checkpoint asks for in sampling."""
    values = {name: getattr(generation_config, name, None) for name in SAMPLING_DEFAULTS}
    return {name: value for name, value in values.items() if value is not None}


def examine_prompt_style(config, tokenizer):
    style = config.prompt_style
    if style == "chat" and not tokenizer.chat_template:
        text = "--prompt_style chat, but the tokenizer has no chat template: use plain"
        yield Finding("problem", "prompt", text)
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
        text = f"{', '.join(special)}: special tokens here, so decoded answers lack them: choose other --tags"
        yield Finding("problem", "tags", text)
    yield Finding("ok", "tags", "  ".join("|".join(piece) for piece in pieces))


# ---------------------------------------------------------------- data


def examine_prompts(config, tokenizer, problems):
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
    on_gpu = torch.cuda.is_available()
    table = memory_table(config, model_config, on_gpu)
    for name, size in table.items():
        if name != "peak":
            yield Finding("ok", "memory", f"{size / GIB:8.2f} GiB  {name}")
    free = torch.cuda.mem_get_info()[0] if on_gpu else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{table['peak'] / GIB:8.2f} GiB  at the peak, {free / GIB:.1f} GiB free"
    if table["peak"] > free:
        advice = "lower --tokens_per_micro_batch, or --gradient_checkpointing, or a smaller model"
        yield Finding("problem", "memory", f"{text}: {advice}")
    else:
        yield Finding("warning" if table["peak"] > 0.9 * free else "ok", "memory", text)


def memory_table(config, model_config, on_gpu: bool) -> dict[str, float]:
    """What a run of these settings holds, in bytes: name -> size, and "peak".

    A rollout's work and an update's are never held together, so the peak is what stays plus the larger of the two. On
    a GPU the policy is fp32 under bf16 autocast, the actor is bf16, and the cache of keys and values stays for the next
    rollout, in rows of whole 256 tokens; on a CPU policy and actor are one fp32 model, and the cache is made anew.
    """
    c, low = model_config, 2 if on_gpu else 4  # bytes of a number in the lower precision
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(c)
    parameters = {id(p): p.numel() for p in model.parameters()}
    N, matrices = sum(parameters.values()), sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    V, H = c.vocab_size, c.hidden_size
    head_dim = getattr(c, "head_dim", None) or H // c.num_attention_heads
    kv_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * low  # of a token
    rows = config.problems_per_step * config.group_size
    width = config.max_prompt_length + config.max_completion_length
    tokens = max(width, min(config.tokens_per_micro_batch, rows * width))
    per_token, per_layer = activation_bytes(c, on_gpu)
    if config.gradient_checkpointing:  # the input of each layer, and one layer in full while it is recomputed
        per_token = c.num_hidden_layers * H * 4 + per_layer
    positions = min(tokens, max(1, head.MAX_LOGITS // V))  # of one chunk of the head

    cache = f"keys and values of {rows} rows"
    stays = {
        "policy, fp32": 4 * N,
        "gradients, fp32": 4 * N,
        "Adam's two moments, fp32": 8 * N,
        "actor, bf16": 2 * N if on_gpu else 0,
        "reference": (4 * N - 2 * (matrices - V * H * c.tie_word_embeddings) * on_gpu) if config.beta > 0 else 0,
        cache: rows * -(-width // 256) * 256 * kv_bytes if on_gpu else 0,
    }
    rollout = {
        f"rollout: {cache}": 0 if on_gpu else rows * width * kv_bytes,
        # logits in the lower precision, then fp32: logits, log-probs, probabilities, entropy terms, cumulative sum
        "rollout: one step's logits": rows * V * (low + 5 * 4),
    }
    update = {
        "update: bf16 casts of the matrices": 2 * matrices if on_gpu else 0,
        f"update: activations of {tokens} tokens": tokens * per_token,
        # a chunk's logits in fp32, and in bf16 as they are made and as their gradient is used
        "update: one chunk of the head": positions * V * (4 + low % 4),
        "update: the embedding's newest gradient": V * H * (low + 4),
    }
    table = {name: size for name, size in (stays | rollout | update).items() if size}
    return table | {"peak": sum(stays.values()) + max(sum(rollout.values()), sum(update.values()))}


def activation_bytes(model_config, autocast: bool) -> tuple[float, float]:
    """Bytes that autograd keeps per token for the backward pass: (all layers, one layer).

    Measured, not derived: models of one and two layers, otherwise as configured, read 32 and 64 tokens on the CPU, and
    the tensors they save are counted. What does not grow with the tokens (weights) cancels out.
    """

    def saved(num_layers, num_tokens):
        small = copy.deepcopy(model_config)
        small.num_hidden_layers, small.vocab_size, small.pad_token_id = num_layers, 8, None
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:num_layers]
        model = AutoModelForCausalLM.from_config(small)
        if autocast:  # as on a GPU, where the norm is one kernel that keeps nothing but its input
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.forward = lambda hidden, weight=module.weight: FusedNorm.apply(hidden, weight)
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that none is reused
            return tensor

        inputs = torch.randn(1, num_tokens, small.hidden_size)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model.base_model(inputs_embeds=inputs, use_cache=False)
        return sum(storage.nbytes() for storage in storages.values())

    class FusedNorm(torch.autograd.Function):
        @staticmethod
        def forward(context, hidden, weight):
            context.save_for_backward(hidden)
            return hidden * weight

    one, two = ((saved(layers, 64) - saved(layers, 32)) / 32 for layers in (1, 2))
    return one + (model_config.num_hidden_layers - 1) * (two - one), two - one


# ---------------------------------------------------------------- a first rollout


def examine_rollout(config, model, tokenizer, problems):
    """A few groups sampled, graded, and taken through the backward pass, so that the whole run's time can be told."""
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
    generate(actor, tokenizer, prompts[:1], max_new_tokens=2, seed=0)  # whatever is only slow the first time
    started = time.perf_counter()
    rollout = generate(
        actor, tokenizer, prompts, group_size=config.group_size, max_new_tokens=config.max_completion_length, **options
    )
    _wait_for(device)
    rollout_seconds = time.perf_counter() - started

    records = evaluator.grade(rollout, chosen, evaluator.parse_rewards(config.rewards), config.prompt_format())
    rewards = torch.tensor([record["reward"] for record in records])
    rows = len(records)
    passed = sum(record["correct"] for record in records) / rows
    formed = sum(record["format"] for record in records) / rows
    cut_off = rollout.finish.count("length") / rows
    silent = (grpo.compute_advantages(rewards, config.group_size, "none").view(-1, config.group_size) == 0).all(dim=1)
    yield _judge(passed > 0, "pass rate", f"{passed:.0%} of {rows} answers are right",
                 "with none right there is nothing to reinforce: an easier dataset, or a stronger model")  # fmt: skip
    yield _judge(formed > 0, "format", f"{formed:.0%} have the asked-for form",
                 "try --prefill, --prompt_style, --rewards accuracy:1,tag_count:0.5")  # fmt: skip
    yield _judge(cut_off < 0.3, "truncation", f"{cut_off:.0%} are cut off at {config.max_completion_length} tokens",
                 "raise --max_completion_length, or try --stop_at_answer for a base model")  # fmt: skip
    yield _judge(not silent.all(), "groups", f"{silent.float().mean():.0%} of {count} groups have equal rewards",
                 "such groups teach nothing: larger groups, or problems neither too easy nor too hard")  # fmt: skip

    update_seconds = _seconds_of_update(config, model, rollout)
    tokens = rollout.lengths.sum().item()
    share = config.problems_per_step / count
    evaluations = 2 + config.max_steps // config.eval_steps
    step = share * (rollout_seconds + config.updates_per_rollout * update_seconds)
    evaluation = 2 * min(config.eval_problems, len(problems)) / rows * rollout_seconds
    minutes = (config.max_steps * step + evaluations * evaluation) / 60
    text = (
        f"{tokens / rollout_seconds:,.0f} tokens/s; a step {step:.1f} s, {share * rollout_seconds:.1f} s of it rollout"
    )
    yield Finding("ok", "speed", f"{text} (from {rows} rows: more at once are faster)")
    length = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.0f} minutes"
    text = f"about {length} for {config.max_steps} steps and {evaluations} evaluations, at answers of this length"
    yield Finding("ok", "time", text)


def _judge(good: bool, what: str, text: str, advice: str) -> Finding:
    return Finding("ok", what, text) if good else Finding("warning", what, f"{text}: {advice}")


def _seconds_of_update(config, model, rollout) -> float:
    """Forward and backward of all the rollout's rows. Leaves no gradient behind."""
    started = time.perf_counter()
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.uses_bf16(model.device))
    for micro in llms.micro_batches(rollout, range(len(rollout.texts)), config.tokens_per_micro_batch):
        with autocast:
            logprobs = llms.completion_logprobs(model, rollout, config.temperature, micro)
        logprobs.sum().backward()
    model.zero_grad()
    _wait_for(model.device)
    return time.perf_counter() - started


def _wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
