"""What a game is: two seats, text in, text out. Shared by nim.py, tictactoe.py and debate.py.

A state is immutable and hashable. A game says who is to move, what that seat reads, which answers are moves, and what
the end is worth. To add one, write a subclass of `Game` and a line in games/__init__.py.

Left out on purpose: more than two seats, moves at the same time, hidden state that a seat has to remember: a prompt
holds all that its seat may know.
"""

import functools
from typing import Any, NamedTuple

ILLEGAL = (-1.5, 0.5)  # rewards of the seat whose answer is no move, and of the other one


class Illegal(NamedTuple):
    """The end of a game in which a seat gave an answer that is no move."""

    state: Any  # before the answer
    seat: int


class Game:
    """Rules of a game. Subclasses give the methods that raise NotImplementedError here."""

    name: str
    rules: str  # the system message; the embedded models, which have seen no instructions, do not get it
    max_plies: int  # of the longest game
    solvable = True  # every state can be enumerated, and both seats see all of it: `value` and `best_moves` hold

    def start(self, seed: int):
        """A start position; a function of the seed."""
        raise NotImplementedError

    def training_start(self, seed: int):
        """Where a game that is learned from begins. By default, as all games do."""
        return self.start(seed)

    def seat(self, state) -> int:
        """Whose turn it is, 0 or 1."""
        raise NotImplementedError

    def prompt(self, state, seat: int) -> str:
        """What the seat reads when it is to move. Says all that the seat may know."""
        raise NotImplementedError

    def legal(self, state) -> list[str]:
        """The answers that are moves; none when the game is over."""
        raise NotImplementedError

    def play(self, state, move: str):
        """The state after one of the legal moves."""
        raise NotImplementedError

    def score(self, state) -> tuple[float, float]:
        """(reward of seat 0, of seat 1) of a game that is over."""
        raise NotImplementedError

    def board(self, state) -> str:
        """The position as people see it, one or several lines."""
        raise NotImplementedError

    # ------------------------------------------------------------ the same for every game

    def move(self, state, seat: int, text: str):
        """The state after the seat's answer. An answer that is no move ends the game."""
        return self.play(state, text) if text in self.legal(state) else Illegal(state, seat)

    def is_over(self, state) -> bool:
        return isinstance(state, Illegal) or not self.legal(state)

    def outcome(self, state) -> tuple[float, float] | None:
        """(reward of seat 0, of seat 1), or None while the game goes on.

        An answer that is no move costs more than a defeat. The other side gets less than for a victory: it would
        otherwise learn to wait for mistakes.
        """
        if isinstance(state, Illegal):
            return ILLEGAL if state.seat == 0 else ILLEGAL[::-1]
        return None if self.legal(state) else self.score(state)

    def outcomes(self, states: list) -> list[tuple[float, float]]:
        """The outcomes of several games at once. A game that is not over, because it reached the limit of plies, is a
        draw."""
        return [self.outcome(state) or (0.0, 0.0) for state in states]

    @functools.cache  # noqa: B019 - a game lives as long as the program
    def value(self, state) -> float:
        """What seat 0 gets when both sides play perfectly (minimax over all that can follow)."""
        if self.is_over(state):
            return self.outcome(state)[0]
        values = [self.value(self.play(state, move)) for move in self.legal(state)]
        return max(values) if self.seat(state) == 0 else min(values)

    def best_moves(self, state) -> list[str]:
        """The legal moves that keep the value of the position."""
        return [move for move in self.legal(state) if self.value(self.play(state, move)) == self.value(state)]

    def positions(self) -> list:
        """All states in which a seat is to move, reachable from the start positions of 1,000 seeds."""
        seen = dict.fromkeys(self.start(seed) for seed in range(1000))
        waiting = list(seen)
        while waiting:
            state = waiting.pop()
            for move in self.legal(state):
                after = self.play(state, move)
                if after not in seen:
                    seen[after] = None
                    waiting.append(after)
        return sorted(state for state in seen if not self.is_over(state))

    def decisive_positions(self) -> list:
        """The positions in which some legal move is a mistake: only there does an optimal move show skill."""
        return [state for state in self.positions() if len(self.best_moves(state)) < len(self.legal(state))]
