"""Nim with one heap: take 1, 2 or 3; whoever takes the last one wins.

A heap that is a multiple of 4 is lost for the seat to move: whatever it takes, the other one restores a multiple of 4.
From every other heap exactly one move wins.
"""

import random
from typing import NamedTuple

from games.game import Game

SMALLEST, LARGEST, MOST = 5, 20, 3  # heaps at the start; taken at once


class State(NamedTuple):
    left: int
    to_move: int  # seat


class Nim(Game):
    name = "nim"
    max_plies = LARGEST
    rules = (
        "Two players take 1, 2 or 3 stones in turn from one heap. Whoever takes the last stone wins. You are told how "
        "many stones are left. Answer with the number that you take, and nothing else."
    )

    def start(self, seed):
        return State(random.Random(f"nim-{seed}").randint(SMALLEST, LARGEST), 0)

    def seat(self, state):
        return state.to_move

    def prompt(self, state, seat):
        return f"{state.left} left"

    def legal(self, state):
        return [str(n) for n in range(1, min(MOST, state.left) + 1)]

    def play(self, state, move):
        return State(state.left - int(move), 1 - state.to_move)

    def score(self, state):
        return (1.0, -1.0) if state.to_move == 1 else (-1.0, 1.0)  # the seat that cannot move has lost

    def board(self, state):
        return f"{'o' * state.left} ({state.left})"

    def positions(self):
        """The seats are alike, and a prompt does not name its seat: each heap once."""
        return [state for state in super().positions() if state.to_move == 0]
