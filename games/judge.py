"""A judge of debates that is a language model. It sees the claim and the revealed digits, and says yes or no.

A model may prefer what it reads last, or first. So it is asked twice, with the revealed digits in both orders; where
its answers differ, or one of them is neither yes nor no, the debate is a tie.
"""

import llms
from games.config import GamePrompt
from games.debate import State
from rollout import generate

RULES = (
    "You are the judge of a debate about eight digits from 0 to 9, of which you see some. Both debaters showed what "
    "helps them. Is the claim about the largest of all eight digits right? Answer yes or no, and nothing else."
)


class ModelJudge:
    """states -> a verdict each. Greedy, so the same states get the same verdicts."""

    def __init__(self, config):
        """config: games.config.SelfPlayConfig. Raises ValueError, one line, if the model cannot be loaded."""
        self.config = config
        self.model, self.tokenizer = llms.load(
            config.judge, dtype=llms.sampling_dtype(), trust_remote_code=config.trust_remote_code
        )

    def __call__(self, states: list[State]) -> list[bool | None]:
        """True: the claim is right; None: a tie."""
        prompts = [self.prompt(state, shown) for state in states for shown in (state.shown, state.shown[::-1])]
        answers = [self.verdict(text) for text in self.texts(prompts)]
        return [one if one == other else None for one, other in zip(answers[::2], answers[1::2], strict=True)]

    def prompt(self, state: State, shown: tuple[int, ...]) -> str:
        seen = ", ".join(str(state.digits[i]) for i in shown) or "nothing"
        question = f"Claim: {state.claim}. Shown: {seen}."
        return GamePrompt(RULES, self.config.tags, self.config.prompt_date).prompt(self.tokenizer, question)

    def texts(self, prompts: list[str]) -> list[str]:
        size, limit = self.config.games_per_step, self.config.max_completion_length
        batches = (prompts[start : start + size] for start in range(0, len(prompts), size))
        return [
            text
            for batch in batches
            for text in generate(self.model, self.tokenizer, batch, max_new_tokens=limit, temperature=0.0).texts
        ]

    @staticmethod
    def verdict(text: str) -> bool | None:
        word = text.strip().strip(".!").lower()
        return {"yes": True, "no": False}.get(word)
