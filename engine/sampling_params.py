"""How tokens are sampled: the settings of one call of rollout.generate, and those of soft thinking.

This module imports nothing, so that a command line can be checked without loading torch. What the settings of soft
thinking do is in soft_thinking.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

SAMPLINGS = ("sample", "gumbel", "topk")
WEIGHTINGS = ("count", "prob")
STARTS = ("tag", "immediately")


@dataclass(frozen=True)
class SoftThinking:
    """Settings of soft thinking. The defaults are right for training. Raises ValueError, one line, on bad values."""

    k: int = 2  # draws per position; 1 is normal sampling
    temperature: float = 1.0  # of "prob" and Gumbel weights alone; sampling has its own temperature
    # K independent draws | "gumbel": the K largest log-probs after Gumbel noise, mixed by softmax(these / temperature)
    # | "topk": the K likeliest, deterministic, for inference only
    sampling: str = "sample"
    weighting: str = "count"  # 1/K each, duplicates add up | "prob": softmax(log-probs of the draws / temperature)
    start: str = "tag"  # soft once the opening tag is written (or prefilled) | "immediately"
    answer_reserve: int = 0  # with this many tokens left, the reasoning is closed by force; 0: never
    cold_stop_entropy: float = 0.0  # also closed at the cold_stop_steps-th soft step in a row under this entropy (nats)
    cold_stop_steps: int = 256
    tags: str = "reasoning"  # name of the reasoning block

    def __post_init__(self):
        for name, choices in (("sampling", SAMPLINGS), ("weighting", WEIGHTINGS), ("start", STARTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"soft_thinking_{name} {getattr(self, name)!r}: choose from {', '.join(choices)}")
        if self.sampling == "gumbel" and self.weighting != "count":
            raise ValueError(f"soft_thinking_weighting {self.weighting!r}: use count with gumbel: it makes the weights")
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
        """Raises ValueError if the model has fewer tokens than a position has draws."""
        if self.k > vocab_size:
            raise ValueError(f"soft_thinking_k {self.k}: the vocabulary has {vocab_size} tokens")

    def check_budget(self, max_new_tokens: int) -> None:
        """Raises ValueError if the reserve for the answer is the whole completion."""
        if self.answer_reserve >= max_new_tokens:
            raise ValueError(f"answer_reserve {self.answer_reserve}: the whole answer has {max_new_tokens} tokens")

    def check_reserve(self, tokenizer) -> None:
        """Raises ValueError if the reserve is too short for the text that closes the reasoning."""
        closing = len(tokenizer(self.closing_text(), add_special_tokens=False)["input_ids"])
        if 0 < self.answer_reserve <= closing:
            raise ValueError(
                f"answer_reserve {self.answer_reserve}: closing the reasoning alone takes {closing} tokens"
            )

    def closing_text(self) -> str:
        """The text that is fed by force to end the reasoning."""
        return f"</{self.tags}>\n<answer>"


class SamplingParams(NamedTuple):
    """Everything about one call of rollout.generate but the prompts and the seed."""

    soft: SoftThinking
    temperature: float
    stop_ids: tuple[int, ...]
    stop_tag: str | None
    max_new_tokens: int
