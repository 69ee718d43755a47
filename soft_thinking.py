"""Soft thinking: the next input is a mixture of token embeddings instead of one token's, until the reasoning ends.

A step draws K tokens independently and feeds sum_k weights_k E[draws_k] (llms.embed_mixture). Normal sampling is K = 1,
weight 1, so one decode loop (rollout.py), one log-prob function (llms.py) and one loss (grpo.py) serve both. Here is
what is special: how draws are weighted, and when a row thinks softly.

Why K independent draws, and not the K likeliest tokens as in the paper (Zhang et al. 2025, "Soft Thinking")?
Reinforcement needs actions with a likelihood. Taking the K likeliest is deterministic: all answers of a group would be
the same. Independent draws have an exact likelihood, the product of theirs. With "count" weights, 1/K each, the weights
are constants, and the gradient of the draws' log-probs is the whole policy gradient. With "prob" weights a part of it
runs through the weights and is lost (a test measures how much).

The other exact kind of noise is "gumbel": the K tokens of largest log-prob after Gumbel noise, mixed by the softmax of
these. The weights are then part of the action, and the likelihood is the density of both (engine/sampling.py).

Text decides when a row is soft, never ids: `</reasoning>` is several tokens, and its ends merge with their neighbours
(`.</`, `>\\n`). If the likeliest next token would begin or continue the tag, the step is hard.

Left out on purpose: noise on the mixed embedding, learned mixing, soft answers.

    python soft_thinking.py                                  # the embedded model, one answer in both modes, a summary
    python soft_thinking.py --model_name runs/tiny/checkpoints/latest --soft_thinking_k 3
"""

import argparse
import collections
import functools
import sys

import torch

from engine.sampling_params import SAMPLINGS, STARTS, WEIGHTINGS, SoftThinking


def mixture_weights(draw_logprobs: torch.Tensor, is_soft: torch.Tensor, settings: SoftThinking) -> torch.Tensor:
    """Weights of K draws, summing to 1; 1, 0, 0... in hard rows. draw_logprobs: (n, K), with Gumbel noise the perturbed
    ones (up to a constant); is_soft: (n,) -> (n, K)."""
    n, K = draw_logprobs.shape
    if settings.weighting == "count" and settings.sampling != "gumbel":
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


# ---------------------------------------------------------------- tags in text that arrives token by token


class TagMatcher:
    """Recognises a tag in texts that grow token by token, for many rows at once.

    A tag is several tokens, and its ends merge with their neighbours (`.</`, `>\\n`), so ids cannot be compared. The
    state of a row is how many characters of the tag its text ends with; len(tag) means that the newest token completed
    the tag (characters after the tag in that token are ignored). `next_state` (V, len(tag) + 1) holds the state after
    every token from every state. It is computed once; then a step is one look-up for all rows, on any device.
    """

    def __init__(self, tokenizer, vocab_size: int, tag: str, device: torch.device):
        self.found = len(tag)
        self.next_state = _transitions(tokenizer, vocab_size, tag).to(device)

    def step(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """tokens, states: (n,) long -> (n,) long, the states after the tokens."""
        return self.next_state[tokens, states].long()


@functools.lru_cache(maxsize=16)
def _transitions(tokenizer, vocab_size: int, tag: str) -> torch.Tensor:
    """The automaton of Knuth, Morris and Pratt over tokens: (V, len(tag) + 1) int8. Only the tag's first character is a
    "<", so after a mismatch the tag can only begin again within the newest token."""
    assert tag.rfind("<") == 0
    pieces = _pieces(tokenizer, vocab_size)
    table = torch.zeros(vocab_size, len(tag) + 1, dtype=torch.int8)
    for token, piece in enumerate(pieces):
        if "<" in piece:  # from any state: the token holds the tag, or ends in the beginning of one
            begun = max(n for n in range(len(tag)) if piece.endswith(tag[:n]))
            table[token] = len(tag) if tag in piece else begun
    by_first_character = collections.defaultdict(list)
    for token, piece in enumerate(pieces):
        by_first_character[piece[:1]].append(token)
    for state in range(1, len(tag)):
        rest = tag[state:]
        for token in by_first_character[rest[0]]:
            if pieces[token].startswith(rest):
                table[token, state] = len(tag)
            elif rest.startswith(pieces[token]):
                table[token, state] = state + len(pieces[token])
        table[by_first_character[""], state] = state  # ids without text, as those that only pad the logits
    return table


@functools.lru_cache(maxsize=4)
def _pieces(tokenizer, vocab_size: int) -> list[str]:
    return tokenizer.batch_decode([[token] for token in range(vocab_size)], clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------- which rows are soft, and until when

WAITING, THINKING, CLOSED = range(3)  # before the reasoning, in it, past it


class SoftThinkingController:
    """Decides at every step which rows are soft, and which rows are forced to close the reasoning.

    All state is in tensors with one entry per row, (B,). Call `reset` first.
    """

    def __init__(self, settings, tokenizer, vocab_size, stop_ids: torch.Tensor, num_rows: int, max_new_tokens: int):
        self.settings, self.stop_ids, self.max_new_tokens = settings, stop_ids, max_new_tokens
        # With one draw a position and nothing to force there is nothing to decide, and no text needs watching.
        self.idle = settings.k == 1 and settings.answer_reserve == 0 and settings.cold_stop_entropy == 0
        if self.idle:
            return
        device, close_tag = stop_ids.device, f"</{settings.tags}>"
        self.open_tag = f"<{settings.tags}>"
        tags = (self.open_tag, close_tag, "<answer>")
        self.matchers = [TagMatcher(tokenizer, vocab_size, tag, device) for tag in tags]
        self.states = torch.zeros(num_rows, 3, dtype=torch.long, device=device)  # of the three matchers
        self.phase = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.cold_steps = torch.zeros_like(self.phase)  # soft steps in a row at low entropy
        # The ids that close the reasoning: the rest of the closing tag, which may be half-written, and the answer's
        # opening tag. `closing` has one row for each number of characters that are written already; -1 ends a row.
        closing = [tokenizer(settings.closing_text()[n:], add_special_tokens=False) for n in range(len(close_tag))]
        lines = [torch.tensor(encoded["input_ids"]) for encoded in closing]
        self.closing = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=-1).to(device)
        self.closing = torch.nn.functional.pad(self.closing, (0, 1), value=-1)
        self.closing_row = torch.zeros_like(self.phase)  # which of these texts a row is fed
        self.closing_pos = torch.full_like(self.phase, -1)  # the next id of that text; -1: nothing is fed by force

    def reset(self, prompts: list[str]) -> None:
        """New rows, one for each prompt (B or fewer)."""
        if self.idle:
            return
        at_once = self.settings.start == "immediately"
        phases = [THINKING if at_once or prompt.rstrip().endswith(self.open_tag) else WAITING for prompt in prompts]
        self.phase[: len(phases)] = torch.tensor(phases).to(self.phase.device)
        for state in (self.states, self.cold_steps, self.closing_row):
            state.zero_()
        self.closing_pos.fill_(-1)

    def decide(self, rows: torch.Tensor, probs: torch.Tensor, entropy: torch.Tensor, step: int | torch.Tensor):
        """-> is_soft (n,) bool, and forced (n,) long, an id to feed or -1.

        rows: (n,) indices of the live rows; probs: (n, V) of their next tokens; entropy: (n,) nats; step: of the
        completion, from 0.
        """
        if self.idle:
            return torch.zeros_like(rows, dtype=torch.bool), torch.full_like(rows, -1)
        settings, phase = self.settings, self.phase[rows]
        begun, likeliest = self.states[rows, 1], probs.argmax(dim=-1)
        # A step is hard where the likeliest token would stop the row, or begin, continue or complete the closing tag.
        stops = (likeliest[:, None] == self.stop_ids).any(dim=-1)
        may_end = stops | (self.matchers[1].step(likeliest, begun) >= 2)
        soft = (phase == THINKING) & ~may_end if settings.k > 1 else torch.zeros_like(may_end)
        cold_steps = torch.where(soft & (entropy < settings.cold_stop_entropy), self.cold_steps[rows] + 1, 0)
        out_of_tokens = self.max_new_tokens - step <= settings.answer_reserve
        must_close = (phase != CLOSED) & ((cold_steps >= settings.cold_stop_steps) | out_of_tokens)
        closing_row = torch.where(must_close, begun, self.closing_row[rows])
        closing_pos = torch.where(must_close, 0, self.closing_pos[rows])
        forced = self.closing[closing_row, closing_pos]  # (n,)
        self.cold_steps[rows], self.closing_row[rows] = cold_steps, closing_row
        self.phase[rows] = torch.where(must_close, CLOSED, phase)
        self.closing_pos[rows] = torch.where(forced >= 0, closing_pos + 1, -1)
        return soft & (forced < 0), forced

    def observe(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Reads the token that each live row has written."""
        if self.idle:
            return
        states = [matcher.step(tokens, self.states[rows, i]) for i, matcher in enumerate(self.matchers)]
        opened, closed, answered = (
            state == matcher.found for state, matcher in zip(states, self.matchers, strict=True)
        )
        phase = self.phase[rows]
        phase = torch.where(opened & (phase == WAITING), THINKING, phase)
        self.phase[rows] = torch.where(closed | answered, CLOSED, phase)
        self.states[rows] = torch.stack(states, dim=-1)


# ---------------------------------------------------------------- both modes side by side


def main():
    """Shows one problem's answer in both modes, step by step, then accuracy on many problems."""
    import evaluator
    import llms
    import rldatasets
    from rollout import generate
    from tracking import checkpoints

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
        args.model_name = checkpoints.resolve_model_name(args.model_name)
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
        model, tokenizer = llms.load(args.model_name, dtype=llms.sampling_dtype())
        soft.check_reserve(tokenizer)
        problems = rldatasets.load_problems("arithmetic", "test", max(1, args.num_problems))
        common = dict(max_new_tokens=args.max_new_tokens, seed=args.seed)
        prompt_format = rldatasets.PromptFormat().resolve(tokenizer)
        for question in args.prompt or [problems[0].question]:
            print(question)
            for name, mode in (("normal", None), ("soft", soft)):
                prompt = prompt_format.prompt(tokenizer, question)
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
                r = evaluator.evaluate(model, tokenizer, problems, prompt_format=prompt_format, **options, **common)
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
