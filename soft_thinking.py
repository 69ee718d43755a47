"""Soft thinking: the next input is a mixture of token embeddings instead of one token's, until the reasoning ends.

A step draws K tokens independently and feeds sum_k weights_k E[draws_k]. Normal sampling is K = 1, weight 1, so one
decode loop (rollout.py), one log-prob function (llms.py) and one loss (grpo.py) serve both. Here is what is special:
how draws are weighted, and when a row thinks softly.

Why K independent draws, and not the K likeliest tokens as in the paper (Zhang et al. 2025, "Soft Thinking")?
Reinforcement needs actions with a likelihood. The K likeliest are no choice: every answer of a group would be the
same. Independent draws have an exact likelihood, the product of theirs. With "count" weights, 1/K each, the weights
are constants, and the gradient of the draws' log-probs is the whole policy gradient. With "prob" weights a part of it
runs through the weights and is lost (a test measures how much).

When a row is soft is decided by text, never by ids: `</reasoning>` is several tokens, and its ends merge with their
neighbours (`.</`, `>\\n`). If the likeliest next token would begin or continue the tag, the step is hard.

Left out on purpose: noise on the mixture, learned mixing, soft answers.

    python soft_thinking.py                                  # the embedded model, one answer in both modes, a summary
    python soft_thinking.py --model_name runs/tiny/checkpoints/latest --soft_thinking_k 3
"""

import argparse
import sys
from dataclasses import dataclass, field

import torch

SAMPLINGS = ("sample", "topk")
WEIGHTINGS = ("count", "prob")
STARTS = ("tag", "immediately")


@dataclass(frozen=True)
class SoftThinking:
    """Settings; the defaults are right for training. Raises ValueError, one line, on impossible values."""

    k: int = 2  # draws a position
    temperature: float = 1.0  # of the "prob" weights alone; sampling has its own
    sampling: str = "sample"  # K independent draws | "topk": the K likeliest, deterministic, for inference only
    weighting: str = "count"  # 1/K each, duplicates add up | "prob": softmax(log-probs of the draws / temperature)
    start: str = "tag"  # soft once the opening tag is written (or prefilled) | "immediately"
    answer_reserve: int = 0  # with this many tokens left, reasoning is closed by force; 0: never
    cold_stop_entropy: float = 0.0  # closed, too, at the cold_stop_steps-th soft step in a row under it (nats)
    cold_stop_steps: int = 256
    tags: str = "reasoning"  # name of the reasoning block

    def __post_init__(self):
        for name, choices in (("sampling", SAMPLINGS), ("weighting", WEIGHTINGS), ("start", STARTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"soft_thinking_{name} {getattr(self, name)!r}: choose from {', '.join(choices)}")
        if self.k < 1:
            raise ValueError(f"soft_thinking_k {self.k}: must be 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"soft_thinking_temperature {self.temperature}: must be a finite number, 0 or more")
        for name in ("answer_reserve", "cold_stop_entropy"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)}: must be a finite number, 0 or more")
        if self.cold_stop_steps < 1:
            raise ValueError(f"cold_stop_steps {self.cold_stop_steps}: must be 1 or more")

    def check_vocabulary(self, vocab_size: int) -> None:
        """This and the next two raise ValueError if the settings do not fit the model or the budget."""
        if self.k > vocab_size:
            raise ValueError(f"soft_thinking_k {self.k}: the vocabulary has {vocab_size} tokens")

    def closing_text(self) -> str:
        """What is fed by force to end the reasoning."""
        return f"</{self.tags}>\n<answer>"

    def check_reserve(self, tokenizer) -> None:
        closing = len(tokenizer(self.closing_text(), add_special_tokens=False)["input_ids"])
        if 0 < self.answer_reserve <= closing:
            raise ValueError(
                f"answer_reserve {self.answer_reserve}: closing the reasoning alone takes {closing} tokens"
            )

    def check_budget(self, max_new_tokens: int) -> None:
        if self.answer_reserve >= max_new_tokens:
            raise ValueError(f"answer_reserve {self.answer_reserve}: the whole answer has {max_new_tokens} tokens")


def mixture_weights(draw_logprobs: torch.Tensor, is_soft: torch.Tensor, settings: SoftThinking) -> torch.Tensor:
    """Weights of K draws, summing to 1; 1, 0, 0... in hard rows. draw_logprobs: (n, K), is_soft: (n,) -> (n, K)."""
    n, K = draw_logprobs.shape
    if settings.weighting == "count":
        soft = torch.full_like(draw_logprobs, 1 / K)
    else:  # a temperature of 0 leaves the most probable draw
        soft = torch.softmax(draw_logprobs / max(settings.temperature, 1e-6), dim=-1)
    hard = torch.zeros_like(draw_logprobs)
    hard[:, 0] = 1.0
    return torch.where(is_soft[:, None], soft, hard)


def heaviest_draw(draws: torch.Tensor, weights: torch.Tensor, draw_logprobs: torch.Tensor) -> torch.Tensor:
    """The token a reader sees, (n,): the one with the most weight, equal draws added up; of equals the likeliest."""
    same = draws[:, :, None] == draws[:, None, :]  # (n, K, K)
    total = (same * weights[:, None, :]).sum(dim=-1)  # (n, K)
    heaviest = total > total.amax(dim=1, keepdim=True) - 1e-6
    likeliest = draw_logprobs.masked_fill(~heaviest, -torch.inf).argmax(dim=1, keepdim=True)
    return draws.gather(1, likeliest).squeeze(1)


WAITING, THINKING, CLOSED = range(3)


@dataclass
class RowState:
    """Where a row stands: before its reasoning, in it, or past it."""

    phase: int
    tail: str = ""  # the end of the text written so far, long enough to hold any of the tags
    cold_steps: int = 0  # soft steps in a row at low entropy
    forced: list[int] = field(default_factory=list)  # ids still to be fed by force


class Director:
    """Decides, row by row and step by step, who thinks softly and who is made to close the reasoning."""

    def __init__(self, settings: SoftThinking, tokenizer, stop_ids: list[int], prompts: list[str], max_new_tokens: int):
        self.settings, self.tokenizer = settings, tokenizer
        self.stop_ids, self.max_new_tokens = set(stop_ids), max_new_tokens
        self.open, self.close, self.answer = f"<{settings.tags}>", f"</{settings.tags}>", "<answer>"
        self.prefixes = tuple(self.close[:n] for n in range(2, len(self.close) + 1))
        self.pieces: dict[int, str] = {}
        at_once = settings.start == "immediately"
        prefilled = [at_once or prompt.rstrip().endswith(self.open) for prompt in prompts]
        self.rows = [RowState(THINKING if begun else WAITING) for begun in prefilled]
        # With one draw a position and nothing to force there is nothing to decide, and no text needs watching.
        self.idle = settings.k == 1 and settings.answer_reserve == 0 and settings.cold_stop_entropy == 0

    def decide(self, rows: torch.Tensor, likeliest: torch.Tensor, entropy: torch.Tensor, step: int):
        """(is_soft (n,) bool, forced (n,) long: an id to feed, or -1) for this step.

        rows: (n,) indices of the live rows; likeliest: (n,) their most probable token; entropy: (n,) nats.
        """
        if self.idle:
            return torch.zeros_like(rows, dtype=torch.bool), torch.full_like(rows, -1)
        decisions = [
            self._decide(self.rows[row], token, nats, step)
            for row, token, nats in zip(rows.tolist(), likeliest.tolist(), entropy.tolist(), strict=True)
        ]
        is_soft, forced = (torch.tensor(column, device=rows.device) for column in zip(*decisions, strict=True))
        return is_soft, forced

    def _decide(self, row: RowState, likeliest: int, entropy: float, step: int) -> tuple[bool, int]:
        settings = self.settings
        soft = row.phase == THINKING and settings.k > 1 and not self._may_end(row, likeliest)
        row.cold_steps = row.cold_steps + 1 if soft and entropy < settings.cold_stop_entropy else 0
        out_of_tokens = self.max_new_tokens - step <= settings.answer_reserve
        if row.phase != CLOSED and (out_of_tokens or row.cold_steps >= settings.cold_stop_steps):
            row.forced, row.phase = self._closing_ids(row), CLOSED
        return (False, row.forced.pop(0)) if row.forced else (soft, -1)

    def _may_end(self, row: RowState, likeliest: int) -> bool:
        """Whether the likeliest token stops the row, or begins, continues or completes the closing tag."""
        text = row.tail + self._piece(likeliest)
        return likeliest in self.stop_ids or self.close in text or text.endswith(self.prefixes)

    def _closing_ids(self, row: RowState) -> list[int]:
        """The ids of what is missing of the closing tag, then the answer's opening tag."""
        begun = max((n for n in range(len(self.close)) if row.tail.endswith(self.close[:n])), default=0)
        return self.tokenizer(self.settings.closing_text()[begun:], add_special_tokens=False)["input_ids"]

    def observe(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Reads the token that each live row has written."""
        if self.idle:
            return
        for index, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            row = self.rows[index]
            text = row.tail + self._piece(token)
            if self.close in text or self.answer in text:
                row.phase = CLOSED
            elif row.phase == WAITING and self.open in text:
                row.phase, text = THINKING, text.partition(self.open)[2]
            row.tail = text[-2 * len(self.close) :]

    def _piece(self, token: int) -> str:
        if token not in self.pieces:
            self.pieces[token] = self.tokenizer.decode([token])
        return self.pieces[token]


# ---------------------------------------------------------------- both modes side by side


def main():
    """Shows one problem's answer in both modes, step by step, then accuracy on many problems."""
    import evaluator
    import llms
    import rldatasets
    from rollout import generate

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model_name", default="tiny", help="hub name, local folder, or an embedded model")
    parser.add_argument("--prompt", action="append", help="a question (repeatable); default: a test problem")
    parser.add_argument("--num_problems", type=int, default=256, help="test problems for the summary; 0: none")
    parser.add_argument("--max_new_tokens", type=int, default=72)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--soft_thinking_k", type=int, default=2)
    parser.add_argument("--soft_thinking_temperature", type=float, default=1.0)
    parser.add_argument("--soft_thinking_sampling", choices=SAMPLINGS, default="sample")
    parser.add_argument("--soft_thinking_weighting", choices=WEIGHTINGS, default="count")
    parser.add_argument("--soft_thinking_start", choices=STARTS, default="tag")
    parser.add_argument("--answer_reserve", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        soft = SoftThinking(
            k=args.soft_thinking_k,
            temperature=args.soft_thinking_temperature,
            sampling=args.soft_thinking_sampling,
            weighting=args.soft_thinking_weighting,
            start=args.soft_thinking_start,
            answer_reserve=args.answer_reserve,
        )
        soft.check_budget(args.max_new_tokens)
        soft.check_vocabulary(llms.load_config(args.model_name).vocab_size)
        model, tokenizer = llms.load(args.model_name)
        soft.check_reserve(tokenizer)
        problems = rldatasets.load_problems("arithmetic", "test", max(1, args.num_problems))
        common = dict(max_new_tokens=args.max_new_tokens, seed=args.seed)
        for question in args.prompt or [problems[0].question]:
            print(question)
            for name, mode in (("normal", None), ("soft", soft)):
                prompt = rldatasets.build_prompt(tokenizer, question)
                rollout = generate(model, tokenizer, [prompt], temperature=args.temperature, soft=mode, **common)
                print(f"\n{name}:\n{format_trace(rollout, tokenizer)}")
        if args.num_problems > 0:
            print(f"\n{args.num_problems} test problems (95 % Wilson intervals):")
            modes = [
                ("normal", dict(temperature=args.temperature)),
                ("normal, T = 0.5", dict(temperature=0.5)),
                ("normal, greedy", dict(temperature=0.0)),
                (f"soft, K = {soft.k}", dict(temperature=args.temperature, soft=soft)),
            ]
            for name, options in modes:
                r = evaluator.evaluate(model, tokenizer, problems, **options, **common)
                print(
                    f"{name:16} accuracy {r['accuracy']:6.1%} [{r['accuracy_low']:.1%}, {r['accuracy_high']:.1%}]"
                    f"  length {r['length']:5.1f}  soft steps {r['soft_share']:6.1%}  top weight {r['top_weight']:.3f}"
                )
    except ValueError as error:
        print(f"soft_thinking.py: {error}", file=sys.stderr)
        sys.exit(2)


def format_trace(rollout, tokenizer, row: int = 0) -> str:
    """One line a step: the readable token, entropy, and the draws with their weights where the step is soft."""
    lines = []
    for t in range(int(rollout.lengths[row])):
        mixture = ""
        if rollout.is_soft[row, t]:
            pairs = zip(rollout.draws[row, t].tolist(), rollout.weights[row, t].tolist(), strict=True)
            mixture = "  " + " + ".join(f"{weight:.2f} {tokenizer.decode([token])!r}" for token, weight in pairs)
        elif not rollout.draw_mask[row, t].any():
            mixture = "  forced"
        token = repr(tokenizer.decode([rollout.trace_ids[row, t].item()]))
        lines.append(f"  {t:3}  {token:14} H = {rollout.entropy[row, t].item():.3f}{mixture}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
