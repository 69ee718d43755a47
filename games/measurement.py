"""What a policy can do: games against fixed opponents, optimal moves over all positions, snapshots against each other.

All rates are of independent games or positions, with 95 % Wilson intervals. Both seats are played equally often, from
the same start positions.
"""

import itertools

from engine import distributed
from engine.statistics import wilson_interval
from games import debate
from games.game import Game, Illegal
from games.play import Match, PerfectPlayer, RandomPlayer, play

ANSWERS = 512  # to all positions together, at least: where there are few positions, each is asked several times
LOGGED = 16  # positions of an evaluation that are in samples.jsonl


def rate(name: str, successes: int, n: int) -> dict[str, float]:
    """{name, name_low, name_high}; nothing without a trial."""
    if n == 0:
        return {}
    low, high = wilson_interval(successes, n)
    return {name: successes / n, f"{name}_low": low, f"{name}_high": high}


def evaluate(game: Game, player, frozen_start, config) -> tuple[dict[str, float], list[dict]]:
    """Collective. Metrics of the player, and positions with its answers. eval/accuracy is what picks the best
    checkpoint: the share of optimal moves, or in a debate the share of right verdicts."""
    metrics: dict[str, float] = {}
    for opponent in (RandomPlayer(), frozen_start):
        outcomes = contest(game, player, opponent, config)
        metrics |= rate(f"eval/win_{opponent.name}", sum(o > 0 for o in outcomes), len(outcomes))
        metrics |= rate(f"eval/draw_{opponent.name}", sum(o == 0 for o in outcomes), len(outcomes))
    if not game.solvable:
        accuracy, samples = debates(game, player, config)
        return metrics | accuracy, samples
    held = contest(game, player, PerfectPlayer(), config)
    metrics |= rate("eval/held_perfect", sum(held), len(held))
    accuracy, samples = optimal_moves(game, player, config)
    return metrics | accuracy, samples


# ---------------------------------------------------------------- games against an opponent


def contest(game: Game, player, opponent, config, seed: str = "contest") -> list:
    """Collective. eval_games games -> the player's outcome in each; against PerfectPlayer, whether it is at least the
    value of the start position. Those games begin where perfect play by the player does not lose."""
    perfect = isinstance(opponent, PerfectPlayer)
    pairs = ((seat, game.start(f"{seed}-{number}")) for number in itertools.count() for seat in (0, 1))
    if perfect:
        pairs = ((seat, start) for seat, start in pairs if value_for(game, start, seat) >= 0)
    pairs = list(itertools.islice(pairs, config.eval_games))
    matches = []
    for index in distributed.shard_range(len(pairs)):
        seat, start = pairs[index]
        matches.append(Match(index, start, (player, opponent) if seat == 0 else (opponent, player)))
    play_and_forget(game, matches, f"{config.seed}-{seed}-{opponent.name}", config)
    outcomes = [match.outcome[pairs[match.index][0]] for match in matches]
    if perfect:
        values = [value_for(game, pairs[match.index][1], pairs[match.index][0]) for match in matches]
        outcomes = [outcome >= value for outcome, value in zip(outcomes, values, strict=True)]
    return distributed.all_gather(outcomes)


def value_for(game: Game, state, seat: int) -> float:
    return game.value(state) if seat == 0 else -game.value(state)


def play_and_forget(game: Game, matches: list[Match], seed: str, config, max_plies: int | None = None) -> None:
    """Plays games_per_step matches at a time, and drops what models have sampled."""
    for start in range(0, len(matches), config.games_per_step):
        play(game, batch := matches[start : start + config.games_per_step], seed, max_plies or plies(game, config))
        for player in {player for match in batch for player in match.players if hasattr(player, "reset")}:
            player.reset()


def plies(game: Game, config) -> int:
    return config.max_plies or game.max_plies


# ---------------------------------------------------------------- single moves


def optimal_moves(game: Game, player, config) -> tuple[dict[str, float], list[dict]]:
    """Collective. Sampled answers to every position in which some legal move is a mistake, equally many to each: the
    share of optimal and of illegal ones."""
    positions = game.decisive_positions()
    num_positions = len(positions)
    positions = positions * -(-ANSWERS // num_positions)
    matches = [Match(i, positions[i], (player, player)) for i in distributed.shard_range(len(positions))]
    play_and_forget(game, matches, f"{config.seed}-positions", config, max_plies=1)
    rows = []
    for match in matches:
        ply, best = match.plies[0], game.best_moves(positions[match.index])
        rows.append({
            "question": game.board(ply.state), "completion": ply.text, "gold": " or ".join(best),
            "correct": ply.text in best, "illegal": isinstance(match.state, Illegal),
        })  # fmt: skip
    rows = distributed.all_gather(rows)
    metrics = rate("eval/accuracy", sum(row["correct"] for row in rows), len(rows))
    metrics |= rate("eval/illegal", sum(row["illegal"] for row in rows), len(rows)) | {"eval/n": len(rows)}
    spread = rows[:num_positions][:: -(-num_positions // LOGGED)]
    return metrics, [{"split": "test", **row} for row in spread]


# ---------------------------------------------------------------- debates


def debates(game: debate.Debate, player, config) -> tuple[dict[str, float], list[dict]]:
    """Collective. How often the judge is right, over eval_games claims: after a debate of the player with itself; by
    truth of the claim, and by who speaks first; after random reveals; after as many reveals by one side alone; and
    with everything shown (the ceiling). A tie is not right."""
    indices = distributed.shard_range(config.eval_games)

    def verdicts(speaker, name: str, order=None) -> list[dict]:
        starts = [game.start(f"{name}-{i}", order) for i in indices]
        matches = [Match(i, start, (speaker, speaker)) for i, start in zip(indices, starts, strict=True)]
        play_and_forget(game, matches, f"{config.seed}-{name}", config)
        illegal = [isinstance(match.state, Illegal) for match in matches]
        states = [match.state.state if bad else match.state for match, bad in zip(matches, illegal, strict=True)]
        return distributed.all_gather([
            {
                "question": game.board(start), "completion": debate.evidence(state), "gold": str(start.claim_is_right),
                "correct": verdict == start.claim_is_right, "illegal": bad, "right": start.claim_is_right,
                "right_first": start.order[0] == 1 - start.claim_is_right,
            }
            for start, state, verdict, bad in zip(starts, states, game.judge(states), illegal, strict=True)
        ])  # fmt: skip

    def right(name: str, rows: list[dict]) -> dict[str, float]:
        return rate(f"eval/{name}", sum(row["correct"] for row in rows), len(rows))

    rows = verdicts(player, "debate")
    metrics = right("accuracy", rows) | {"eval/n": len(rows)}
    metrics |= rate("eval/illegal", sum(row["illegal"] for row in rows), len(rows))
    for name, key, wanted in (
        ("judge_claim_right", "right", True), ("judge_claim_wrong", "right", False),
        ("judge_right_side_first", "right_first", True), ("judge_right_side_second", "right_first", False),
    ):  # fmt: skip
        metrics |= right(name, [row for row in rows if row[key] == wanted])
    metrics |= right("judge_random", verdicts(RandomPlayer(), "debate"))
    one_sided = [verdicts(player, "debate", (seat,) * debate.SPEECHES) for seat in (0, 1)]
    metrics |= right("judge_one_sided", one_sided[0] + one_sided[1])
    open_states = [game.start(f"debate-{i}")._replace(shown=tuple(range(debate.DIGITS))) for i in indices]
    seen = [v == state.claim_is_right for v, state in zip(game.judge(open_states), open_states, strict=True)]
    seen = distributed.all_gather(seen)
    metrics |= rate("eval/judge_ceiling", sum(seen), len(seen))
    return metrics, [{"split": "test", **row} for row in rows[:LOGGED]]


# ---------------------------------------------------------------- snapshots


def snapshot_matrix(game: Game, players: list, config) -> list[list[float | None]]:
    """Collective. Mean outcome of the row's player against the column's, both seats; None on the diagonal."""
    matrix: list[list[float | None]] = [[None] * len(players) for _ in players]
    for i, j in itertools.combinations(range(len(players)), 2):
        outcomes = contest(game, players[i], players[j], config, seed=f"matrix-{i}-{j}")
        # An illegal move is a defeat here, and no more than that.
        mean = sum((o > 0) - (o < 0) for o in outcomes) / len(outcomes)
        matrix[i][j], matrix[j][i] = mean, 0.0 - mean
    return matrix
