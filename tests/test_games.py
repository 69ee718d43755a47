"""The games: rules, best moves, prompts; and the loop that plays them, with players that misbehave."""

import itertools
import random
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from games import GAMES
from games.config import GamePrompt
from games.debate import DIGITS, Debate, State, bayes_verdict, evidence
from games.game import Game, Illegal
from games.nim import Nim
from games.nim import State as Heap
from games.play import Match, PerfectPlayer, RandomPlayer, play, read_move
from games.tictactoe import EMPTY, TicTacToe

# ---------------------------------------------------------------- what holds for every game


@pytest.mark.parametrize("name", GAMES)
def test_random_games_end_in_time_and_sum_to_zero(name):
    game = GAMES[name]()
    lengths = set()
    for seed in range(60):
        match = Match(0, game.start(seed), (RandomPlayer(), RandomPlayer()))
        play(game, [match], f"{seed}", game.max_plies)
        assert game.is_over(match.state) and len(match.plies) <= game.max_plies
        assert sum(match.outcome) == 0 and abs(match.outcome[0]) in (0, 1)
        lengths.add(len(match.plies))
        for ply in match.plies:
            assert ply.text in game.legal(ply.state) and game.seat(ply.state) == ply.seat
            assert game.prompt(ply.state, ply.seat) and game.board(ply.state)
    assert max(lengths) <= game.max_plies


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("text", ["", "0", "10", "-1", "x", "1 2", "take 1", "a1", "٣", "1" * 10_000, "None"])
def test_an_answer_that_is_no_move_loses(name, text):
    game = GAMES[name]()
    state = next(start for start in map(game.start, range(100)) if text not in game.legal(start))
    for seat in (0, 1):
        ended = game.move(state, seat, text)
        assert ended == Illegal(state, seat) and game.is_over(ended)
        rewards = game.outcome(ended)
        assert rewards[seat] == -1.5 and rewards[1 - seat] == 0.5, "less than for a victory"
        assert game.outcomes([ended]) == [rewards]
    assert game.outcome(state) is None and not game.is_over(state)


@pytest.mark.parametrize("name", GAMES)
def test_a_start_is_a_function_of_the_seed(name):
    game = GAMES[name]()
    assert [game.start(seed) for seed in range(20)] == [game.start(seed) for seed in range(20)]


def naive_value(game: Game, state) -> float:
    """What seat 0 gets under perfect play, by trying everything."""
    if game.outcome(state):
        return game.outcome(state)[0]
    values = [naive_value(game, game.play(state, move)) for move in game.legal(state)]
    return max(values) if game.seat(state) == 0 else min(values)


# ---------------------------------------------------------------- nim


def test_nim_is_won_by_leaving_a_multiple_of_four():
    game = Nim()
    assert [state.left for state in game.positions()] == list(range(1, 21))
    for left in range(1, 21):
        for seat in (0, 1):
            state = Heap(left, seat)
            wins = left % 4 != 0
            assert (game.value(state) == (1 if seat == 0 else -1)) == wins
            assert game.best_moves(state) == ([str(left % 4)] if wins else game.legal(state))
    assert [state.left for state in game.decisive_positions()] == [n for n in range(2, 20) if n % 4]
    assert {game.start(seed).left for seed in range(1000)} == set(range(5, 21))


def test_nim_by_hand():
    game = Nim()
    assert game.prompt(Heap(7, 1), 1) == "7 left" and game.legal(Heap(2, 0)) == ["1", "2"]
    assert game.play(Heap(3, 1), "3") == Heap(0, 0)
    assert game.outcome(Heap(0, 0)) == (-1, 1) and game.outcome(Heap(0, 1)) == (1, -1)


# ---------------------------------------------------------------- tic-tac-toe


def test_tictactoe_values_equal_the_naive_ones():
    game, rng = TicTacToe(), random.Random(0)
    assert game.value(EMPTY) == 0 and len(game.positions()) == 4520
    for state in rng.sample(game.positions(), 60):
        if state.count(".") <= 6:
            assert game.value(state) == naive_value(game, state)
            best = [m for m in game.legal(state) if naive_value(game, game.play(state, m)) == game.value(state)]
            assert game.best_moves(state) == best


def test_tictactoe_by_hand():
    game = TicTacToe()
    state = "0...1...."
    assert game.seat(state) == 0 and game.prompt(state, 0) == "X1/O5/2346789" and game.legal(state) == list("2346789")
    state = game.play(state, "2")
    assert game.seat(state) == 1 and game.prompt(state, 1) == "X5/O12/346789", "each seat is X to itself"
    assert game.best_moves(state) == ["3"], "the only defence"
    assert game.board(state) == "X X .\n. O .\n. . ."
    won = "00011...."
    assert game.legal(won) == []
    assert game.outcome(won) == (1, -1) and game.outcome("010011" + "10.") is None
    assert game.outcome("111" + "00.00.") == (-1, 1) and game.outcome("010011100") == (0, 0)


# ---------------------------------------------------------------- debate


def test_claims_are_right_half_of_the_time_in_all_four_kinds():
    starts = [Debate().start(seed) for seed in range(4000)]
    for kind in itertools.product((True, False), repeat=2):
        share = sum((s.claims_nine, s.claim_is_right) == kind for s in starts) / len(starts)
        assert 0.22 < share < 0.28
    assert 0.47 < sum(start.order == (0, 1, 0, 1) for start in starts) / len(starts) < 0.53
    assert all((9 in s.digits) == (s.claims_nine == s.claim_is_right) for s in starts)


def test_the_rule_judge_is_bayes():
    """Against the posterior by counting, over random digits and random reveals."""
    rng, counts = random.Random(0), {}
    for seed in range(40_000):
        state = Debate().start(seed)
        shown = tuple(rng.sample(range(DIGITS), rng.randint(1, 4)))
        state = state._replace(shown=shown)
        seen = (len(shown), any(state.digits[i] == 9 for i in shown))
        right, total = counts.get(seen, (0, 0))
        counts[seen] = right + (9 in state.digits), total + 1
    for (number, nine_seen), (nines, total) in counts.items():
        digits = (9 if nine_seen else 1, *[2] * (DIGITS - 1))
        for claims_nine in (True, False):
            state = State(digits, claims_nine, (0, 1, 0, 1), tuple(range(number)))
            assert bayes_verdict(state) == ((nines / total > 0.5) == claims_nine)


def test_debate_by_hand():
    game = Debate()
    state = State((3, 9, 1, 7, 0, 2, 9, 4), True, (1, 0, 1, 0))
    assert state.claim == "max>8" and state.claim_is_right and game.seat(state) == 1
    assert game.prompt(state, 1) == "39170294 max<9 " and game.legal(state).count("9") == 2
    state = game.play(state, "0")
    assert game.prompt(state, 0) == "3917294 max>8 0" and "0" not in game.legal(state)
    for digit in "939":
        assert game.outcome(state) is None
        state = game.move(state, game.seat(state), digit)
    assert evidence(state) == "0939" and game.outcome(state) == (1, -1)
    assert game.outcome(state._replace(shown=(0, 2, 3, 4))) == (-1, 1), "nobody showed a nine"
    assert isinstance(game.move(game.play(game.start(0), game.legal(game.start(0))[0]), 1, "a"), Illegal)


def test_a_judge_is_asked_once_for_all_and_may_give_a_tie():
    calls = []

    def judge(states):
        calls.append(len(states))
        return [None, True, False][: len(states)]

    game = Debate(judge)
    ended = [game.start(seed)._replace(shown=(0, 1, 2, 3)) for seed in range(3)]
    open_state, illegal = game.start(5), Illegal(game.start(6), 1)
    outcomes = game.outcomes([ended[0], open_state, ended[1], illegal, ended[2]])
    assert outcomes == [(0, 0), (0, 0), (1, -1), (0.5, -1.5), (-1, 1)] and calls == [3]


# ---------------------------------------------------------------- playing


class Endless(Game):
    """Nobody ever wins."""

    name, max_plies, solvable = "endless", 50, False

    def start(self, seed):
        return 0

    def seat(self, state):
        return state % 2

    def prompt(self, state, seat):
        return str(state)

    def legal(self, state):
        return ["on"]

    def play(self, state, move):
        return state + 1

    def board(self, state):
        return str(state)


def test_a_game_that_never_ends_is_a_draw_after_max_plies():
    match = Match(0, 0, (RandomPlayer(), RandomPlayer()))
    play(Endless(), [match], "seed", 7)
    assert len(match.plies) == 7 and match.outcome == (0.0, 0.0)


class Scripted(NamedTuple):
    name: str
    text: str

    def answers(self, game, waiting, seed):
        return [("", self.text, None) for _ in waiting]


def test_games_that_wait_for_the_same_player_move_in_one_call():
    calls = []

    class Counting(RandomPlayer):
        def answers(self, game, waiting, seed):
            calls.append(len(waiting))
            return super().answers(game, waiting, seed)

    player = Counting()
    matches = [Match(i, Heap(6, 0), (player, player)) for i in range(5)]
    play(Nim(), matches, "seed", 20)
    assert calls[0] == 5 and sum(calls) == sum(len(match.plies) for match in matches)
    assert len(calls) == max(len(match.plies) for match in matches)


def test_a_game_does_not_depend_on_the_others():
    def moves(indices):
        matches = [Match(i, Heap(20, 0), (RandomPlayer(), RandomPlayer())) for i in indices]
        play(Nim(), matches, "seed", 20)
        return {match.index: [ply.text for ply in match.plies] for match in matches}

    everything = moves(range(6))
    assert everything[4] == moves([4, 1])[4] and len({tuple(texts) for texts in everything.values()}) > 1


def test_a_seat_that_always_answers_nonsense_ends_its_games_and_no_others():
    nonsense = Scripted("nonsense", "?")
    matches = [Match(0, Heap(9, 0), (nonsense, RandomPlayer())), Match(1, Heap(9, 0), (RandomPlayer(), RandomPlayer()))]
    play(Nim(), matches, "seed", 20)
    assert matches[0].outcome == (-1.5, 0.5) and len(matches[0].plies) == 1
    assert abs(matches[1].outcome[0]) == 1 and len(matches[1].plies) > 2


@pytest.mark.parametrize("game, draws", [(Nim(), False), (TicTacToe(), True)])
def test_perfect_play_keeps_the_value_of_the_start(game, draws):
    matches = [Match(i, game.start(i), (PerfectPlayer(), PerfectPlayer())) for i in range(20)]
    play(game, matches, "seed", game.max_plies)
    for match in matches:
        assert match.outcome[0] == game.value(match.plies[0].state) and (match.outcome[0] == 0) == draws


def test_the_move_is_the_answer_block_or_the_whole_text():
    assert read_move(" 3\n", "reasoning") == "3"
    assert read_move("<reasoning>13 - 1 = 12</reasoning>\n<answer>1</answer>", "reasoning") == "1"
    assert read_move("I take 3", "reasoning") == "I take 3"
    # A chat template may have opened the reasoning, and a model may not know of answer tags.
    assert read_move("13 - 1 = 12</think>\n<answer> 1 </answer>", "think") == "1"
    assert read_move("<think>12 or 4?</think>\n\n3\n", "think") == "3"
    assert read_move("<think>12 or 4", "think") == "<think>12 or 4"


def test_a_plain_prompt_begins_as_the_model_begins_its_texts():
    plain = SimpleNamespace(chat_template=None, bos_token="<s>")
    assert GamePrompt("Rules.", "think", None).prompt(plain, "7 left") == "<s>Rules.\n\n7 left\n"
    plain.bos_token = None
    assert GamePrompt("Rules.", "think", None).prompt(plain, "7 left") == "Rules.\n\n7 left\n"
