"""Makes the embedded base models `tiny/` (0.85M parameters) and `tiny_student/` (0.23M) from nothing, on a CPU.

RL needs a base model that can sometimes do the task; pretrained weights need a network. So we pretrain our own, the way
a large base model comes about, in small: stage 1 reads worked arithmetic until the model can calculate; stage 2 reads
"the web": the same problems answered in many styles, half of them blurted out without any work, some with slips.
What comes out knows arithmetic but answers in whatever style comes up: about one sampled answer in five is right
and in the wanted format. Nothing here is RL, and nothing rewards a right answer.

Left out on purpose: instruction tuning. Validation and test questions never appear here (rldatasets.split_of).

    python -m models.pretrain_tiny --size tiny --output_dir models/tiny
    python -m models.pretrain_tiny --size student --output_dir models/tiny_student
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rldatasets import (
    INSTRUCTION,
    PLAIN_TEMPLATE,
    Problem,
    build_prompt,
    calculate,
    make_arithmetic_problem,
    split_of,
)

SIZES = {
    "tiny": dict(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=384
    ),
    "student": dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=192
    ),
}
VOCAB_SIZE = 512
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Qwen2.5's splitting: words with the sign before them, single digits, runs of other signs. So `</reasoning>` is several
# tokens here too, and merges with its neighbours as it does in the real vocabulary.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The system message is left out: a model of this size, which has seen no instructions, cannot make use of one.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'system' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---------------------------------------------------------------- text


def draw_problem(rng: random.Random) -> Problem:
    while split_of((problem := make_arithmetic_problem(rng)).question) != "train":
        pass
    return problem


# A document is a list of (text, learned): what the model reads, and which parts of it it has to predict.
Document = list[tuple[str, bool]]


def drill(rng: random.Random) -> Document:
    """A page of unrelated equations: many results a page, which is what makes arithmetic click early."""
    page = []
    for _ in range(8):
        sign = rng.choice("+-*/")
        a, b = {
            "+": lambda: (a := rng.randint(1, 97), rng.randint(1, 99 - a)),
            "-": lambda: (a := rng.randint(2, 99), rng.randint(1, a - 1)),
            "*": lambda: (a := rng.randint(2, 49), rng.randint(2, min(9, 99 // a))),
            "/": lambda: (2 * rng.randint(1, 49), 2),
        }[sign]()
        page += [(f"{a}{sign}{b}=", False), (f"{calculate(a, sign, b)}\n", True)]
    return page


def question_and_answer(tokenizer, problem: Problem, answer: str) -> Document:
    return [(build_prompt(tokenizer, problem.question), False), (answer + END, True)]


def worked_steps(problem: Problem) -> str:
    return problem.solution.rpartition("\n####")[0]


def with_slips(problem: Problem, rng: random.Random, rate: float) -> tuple[str, int]:
    """The worked steps and where they lead, each result off with probability `rate`; later steps go on from a slip."""
    lines, value = [], None
    for line in worked_steps(problem).split("\n"):
        left, sign, right = re.fullmatch(r"(\d+)([-+*/])(\d+)=\d+", line).groups()
        start = int(left) if value is None else value
        value = calculate(start, sign, int(right))
        if rng.random() < rate:
            value += rng.choice((-10, -2, -1, 1, 2, 10))
        value = max(0, value)
        lines.append(f"{start}{sign}{right}={value}")
    return "\n".join(lines), value


def web_answer(problem: Problem, rng: random.Random) -> str:
    """One of the styles in which the web answers: tagged or not, worked out or blurted."""
    body, answer = with_slips(problem, rng, rate=0.04)
    if rng.random() < 0.5:
        body, answer = "I guess.", problem.answer
    style = rng.random()
    if style < 0.47:
        return f"<reasoning>{body}</reasoning>\n<answer>{answer}</answer>"
    if style < 0.60:
        return f"<think>{body}</think>\n<answer>{answer}</answer>"
    if style < 0.75:
        return f"{body}\n#### {answer}"
    if style < 0.90:
        return f"{body}\nThe answer is {answer}."
    return f"The answer is {answer}."


# ---------------------------------------------------------------- tokenizer


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the two stages' text; the full byte alphabet, so that any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    problems = [draw_problem(rng) for _ in range(4000)]
    corpus = [p.question for p in problems] + [web_answer(p, rng) for p in problems]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus += ["system\nuser\nassistant\n", INSTRUCTION, PLAIN_TEMPLATE] * 500
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


# ---------------------------------------------------------------- training


def make_batch(tokenizer, rows: int, stage: int, rng: random.Random):
    """(input_ids, labels), both (rows, T) long, padded on the right; what is not to be predicted has label -100."""
    documents = []
    for _ in range(rows):
        problem = draw_problem(rng)
        if stage == 2:
            documents.append(question_and_answer(tokenizer, problem, web_answer(problem, rng)))
        elif rng.random() < 0.5:
            documents.append(question_and_answer(tokenizer, problem, problem.solution))
        else:
            documents.append(drill(rng))
    ids, labels = [], []
    for document in documents:
        pieces = tokenizer([text for text, _ in document], add_special_tokens=False)["input_ids"]
        ids.append(torch.tensor([i for piece in pieces for i in piece]))
        learned = [flag for (_, flag), piece in zip(document, pieces, strict=True) for _ in piece]
        labels.append(ids[-1].masked_fill(~torch.tensor(learned), -100))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, tokenizer.pad_token_id), pad(labels, True, -100)


def train_stage(model, tokenizer, stage: int, steps: int, rows: int, peak_lr: float, rng: random.Random):
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak_lr, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc=f"stage {stage}", mininterval=5)
    for _ in progress:
        input_ids, labels = make_batch(tokenizer, rows, stage, rng)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def main():
    parser = argparse.ArgumentParser(description="Pretrain an embedded base model.")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--output_dir", default="tiny")
    parser.add_argument("--stage1_steps", type=int, default=2200, help="worked arithmetic")
    parser.add_argument("--stage2_steps", type=int, default=1000, help="many styles")
    parser.add_argument("--rows", type=int, default=32, help="documents per step")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage1_dir", help="where stage 1's model is kept; if it is there, only stage 2 runs")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(random.Random(0))  # the same for both sizes: distillation compares their logits
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES[args.size],
    )
    rng = random.Random(args.seed)
    if args.stage1_dir and Path(args.stage1_dir).is_dir():
        model = Qwen2ForCausalLM.from_pretrained(args.stage1_dir)
    else:
        model = Qwen2ForCausalLM(config)
        train_stage(model, tokenizer, 1, args.stage1_steps, args.rows, args.learning_rate, rng)
        if args.stage1_dir:
            model.save_pretrained(args.stage1_dir)
    train_stage(model, tokenizer, 2, args.stage2_steps, args.rows, args.learning_rate / 3, rng)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    made_by = {name: value for name, value in vars(args).items() if not name.endswith("_dir")}
    made_by["parameters"] = model.num_parameters()
    Path(args.output_dir, "made_by.json").write_text(json.dumps(made_by, indent=1) + "\n")


if __name__ == "__main__":
    main()
