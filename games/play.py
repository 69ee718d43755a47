"""Playing: all games that wait for the same player move side by side, in one call of rollout.generate.

A player answers for many games at once. What a model answers is text; what stands after its reasoning, where it writes
any, is the move.
"""

import random
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from games.game import Game
from rollout import Rollout, generate


class Ply(NamedTuple):
    """One answer in a game."""

    seat: int
    player: str
    state: Any  # before the answer
    prompt: str  # "" for a player that reads none
    text: str
    row: int | None  # in the player's rollout; None for a player without one


@dataclass
class Match:
    """One game between two players."""

    index: int  # among all games that are played together, by all processes; the sampling depends on it
    state: Any
    players: tuple  # of seat 0 and of seat 1; the same one twice in self-play
    plies: list[Ply] = field(default_factory=list)
    outcome: tuple[float, float] | None = None

    def seats_of(self, name: str) -> tuple[bool, bool]:
        """Which seats a player of that name has."""
        return tuple(player.name == name for player in self.players)


def play(game: Game, matches: list[Match], seed: str, max_plies: int) -> None:
    """Plays the games to their end, at most max_plies answers each; fills in `plies`, `state` and `outcome`.

    The same seed gives the same games, and a game does not depend on which others are played with it.
    """
    for ply in range(max_plies):
        turns: dict[Any, list[Match]] = {}
        for match in matches:
            if not game.is_over(match.state):
                turns.setdefault(match.players[game.seat(match.state)], []).append(match)
        for player, waiting in turns.items():
            for match, answer in zip(waiting, player.answers(game, waiting, f"{seed}-{ply}"), strict=True):
                seat = game.seat(match.state)
                match.plies.append(Ply(seat, player.name, match.state, *answer))
                match.state = game.move(match.state, seat, answer[1])
    for match, outcome in zip(matches, game.outcomes([match.state for match in matches]), strict=True):
        match.outcome = outcome


class RandomPlayer:
    """Any legal move, each with the same chance."""

    name = "random"

    def answers(self, game: Game, waiting: list[Match], seed: str) -> list[tuple[str, str, None]]:
        """(prompt, answer, row) for each game."""
        return [("", random.Random(f"{seed}-{m.index}").choice(self.moves(game, m.state)), None) for m in waiting]

    def moves(self, game: Game, state) -> list[str]:
        return game.legal(state)


class PerfectPlayer(RandomPlayer):
    """A best move by minimax; where several are, any of them."""

    name = "perfect"

    def moves(self, game, state):
        return game.best_moves(state)


class ModelPlayer:
    """A language model. `rollout` returns all that it has sampled since the last `reset`, one row an answer."""

    def __init__(self, name: str, model, tokenizer, config):
        """config: games.config.SelfPlayConfig."""
        self.name, self.model, self.tokenizer, self.config = name, model, tokenizer, config
        self.reset()

    def reset(self) -> None:
        self.rollouts: list[Rollout] = []
        self.num_rows = 0

    def answers(self, game, waiting, seed):
        """(prompt, answer, row) for each game."""
        prompt_format = self.config.prompt_format()
        prompts = [
            prompt_format.prompt(self.tokenizer, game.prompt(match.state, game.seat(match.state))) for match in waiting
        ]
        rollout = generate(
            self.model, self.tokenizer, prompts, max_new_tokens=self.config.max_completion_length,
            temperature=self.config.temperature, seed=random.Random(seed).getrandbits(48),
            prompt_indices=[match.index for match in waiting],
        )  # fmt: skip
        self.rollouts.append(rollout)
        rows = range(self.num_rows, self.num_rows + len(prompts))
        self.num_rows += len(prompts)
        return [
            (prompt, read_move(text, self.config.tags), row)
            for prompt, text, row in zip(prompts, rollout.texts, rows, strict=True)
        ]

    def rollout(self) -> Rollout:
        return Rollout.concatenate(self.rollouts)


def read_move(text: str, tags: str) -> str:
    """What stands after the reasoning, if there is any, without an answer's tags and the white space around it."""
    move = text.rpartition(f"</{tags}>")[2].strip()
    inside = re.fullmatch("<answer>(.*)</answer>", move, re.DOTALL)
    return inside[1].strip() if inside else move
