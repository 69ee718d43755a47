"""Tic-tac-toe, 3 x 3. Perfect play by both sides is a draw.

The squares are numbered row by row. The prompt lists the seat's own squares after an X, the other's after an O, then
the free ones: both seats read the same kind of text, and every legal move is a digit of its last part. The board row by
row, with the numbers of its free squares, is harder for a small model, which has to count to know where an X stands.
"""

import random

from games.game import Game

EMPTY = "." * 9
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


def has_line(state: str, seat: str) -> bool:
    return any(all(state[i] == seat for i in line) for line in LINES)


class TicTacToe(Game):
    """A state is a text of nine characters: "0" and "1" where the seats have played, "." where nobody has."""

    name = "tictactoe"
    max_plies = 9
    rules = (
        "Tic-tac-toe. The squares are numbered row by row. You see your squares after an X, your opponent's after an "
        "O, then the free ones. Three in a row, column or diagonal win. Answer with the number of the square that you "
        "take, and nothing else."
    )

    def start(self, seed):
        return EMPTY

    def training_start(self, seed):
        """Up to six random moves after the empty board (exploring starts, Sutton and Barto 2018, section 5.3): a group
        of games compares what can be done there, and positions are learned that the policy would avoid or never see."""
        rng, state = random.Random(f"tictactoe-{seed}"), EMPTY
        for _ in range(rng.randint(0, 6)):
            state = self.play(state, rng.choice(self.legal(state)))
            if not self.legal(state):
                return self.training_start(f"{seed}-again")
        return state

    def seat(self, state):
        return int(state.count("0") > state.count("1"))

    def prompt(self, state, seat):
        squares = {mark: "".join(str(i + 1) for i in range(9) if state[i] == mark) for mark in "01."}
        return f"X{squares[str(seat)]}/O{squares[str(1 - seat)]}/{squares['.']}"

    def legal(self, state):
        if has_line(state, "0") or has_line(state, "1"):
            return []
        return [str(i + 1) for i, mark in enumerate(state) if mark == "."]

    def play(self, state, move):
        square = int(move) - 1
        return state[:square] + str(self.seat(state)) + state[square + 1 :]

    def score(self, state):
        lead = float(has_line(state, "0") - has_line(state, "1"))
        return lead, 0.0 - lead

    def board(self, state):
        marks = state.replace("0", "X").replace("1", "O")  # seat 0 begins and has X
        return "\n".join(" ".join(marks[row : row + 3]) for row in (0, 3, 6))
