"""What a step of self_play.py logs, and what a run prints at its end. docs/metrics.md explains the metrics."""

import json
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from engine import distributed
from games.game import Game, Illegal
from games.play import Match
from rollout import Rollout
from tracking import plotter
from tracking.summaries import describe_evaluation

LOGGED_GROUPS, LOGGED_GAMES = 4, 4  # of a step, and of each of those groups: their games are in samples.jsonl


def of_matches(game: Game, matches: list[Match], rollout: Rollout, advantages: torch.Tensor) -> list[dict]:
    """Collective. This process's games, with the answers of the policy in `rollout` -> the records of all processes'
    games, in the order of the step. advantages: (B,), of those answers."""
    lengths, entropy = rollout.lengths.tolist(), rollout.entropy.sum(dim=1).tolist()
    records = []
    for match in matches:
        states = [ply.state for ply in match.plies[1:]] + [match.state]
        plies = [
            {
                "seat": ply.seat,
                "player": ply.player,
                "prompt": ply.prompt,
                "completion": ply.text,
                "board": game.board(ply.state),
                "after": "no move" if isinstance(after, Illegal) else game.board(after),
                "reward": match.outcome[ply.seat],
                "advantage": 0.0 if ply.player != "policy" else round(advantages[ply.row].item(), 6),
                "length": 0 if ply.player != "policy" else lengths[ply.row],
                "entropy": 0.0 if ply.player != "policy" else entropy[ply.row],
                "finish": "stop" if ply.player != "policy" else rollout.finish[ply.row],
            }
            for ply, after in zip(match.plies, states, strict=True)
        ]
        illegal = match.state.seat if isinstance(match.state, Illegal) else None
        players = [player.name for player in match.players]
        records.append({"index": match.index, "players": players, "illegal": illegal, "plies": plies})
    return sorted(distributed.all_gather(records), key=lambda record: record["index"])


def metrics(records: list[dict], outcomes: torch.Tensor, group_size: int) -> dict[str, float]:
    """What to log about the games of a step. outcomes: (games, 2). Rewards, lengths and entropy are those of the policy
    alone, in its own seats."""
    own = [[record["index"], seat] for record in records for seat in (0, 1) if record["players"][seat] == "policy"]
    of_seat = [[outcomes[i, s].item() for i, s in own if s == seat] for seat in (0, 1)]
    others = [[i, s] for i, s in own if records[i]["players"][1 - s] != "policy"]
    plies = [ply for record in records for ply in record["plies"] if ply["player"] == "policy"]
    tokens = sum(ply["length"] for ply in plies)
    illegal = sum(r["illegal"] is not None and r["players"][r["illegal"]] == "policy" for r in records)
    equal = [len(set(outcomes[i : i + group_size, 0].tolist())) == 1 for i in range(0, len(records), group_size)]
    result = {
        "reward": mean([outcomes[i, s].item() for i, s in own]),
        **{f"reward/seat_{seat}": mean(values) for seat, values in enumerate(of_seat) if values},
        "illegal_rate": illegal / max(1, len(plies)),
        "plies": mean([len(record["plies"]) for record in records]),
        "completion_length": tokens / max(1, len(plies)),
        "entropy": sum(ply["entropy"] for ply in plies) / max(1, tokens),
        "truncated_rate": mean([ply["finish"] == "length" for ply in plies]),
        "zero_std_groups": mean(equal),
    }
    if others:
        result["win_rate"] = mean([outcomes[i, s].item() > 0 for i, s in others])
    return result


def mean(values: list) -> float:
    return sum(values) / max(1, len(values))


def samples(records: list[dict], group_size: int) -> list[dict]:
    """The rows of samples.jsonl: one for every answer in some games of the step's first groups."""
    groups = [record["index"] // group_size for record in records]
    places = [record["index"] % group_size for record in records]
    chosen = [r for r, g, i in zip(records, groups, places, strict=True) if g < LOGGED_GROUPS and i < LOGGED_GAMES]
    return [
        {"split": "train", "game": record["index"], "ply": number, **ply}
        for record in chosen
        for number, ply in enumerate(record["plies"])
    ]


def progress_note(metrics: dict[str, float]) -> str:
    against = f", wins {metrics['win_rate']:.0%} against others" if "win_rate" in metrics else ""
    return (
        f"reward {metrics['reward']:+.2f}, {metrics['plies']:.1f} plies, illegal {metrics['illegal_rate']:.1%}{against}"
    )


def save_matrix(folder: Path, steps: list[int], matrix: list[list[float | None]]) -> None:
    """matrix.json and plots/matrix.png: the mean outcome of the row's snapshot against the column's."""
    if distributed.is_main_process():
        content = json.dumps({"steps": steps, "mean_outcome": matrix}, indent=1)
        (folder / "matrix.json").write_text(content + "\n", encoding="utf-8")
        plotter.save({"matrix.png": matrix_figure(steps, matrix)}, folder / "plots")


@rc_context(plotter.STYLE)
def matrix_figure(steps: list[int], matrix: list[list[float | None]]) -> Figure:
    """Snapshots against each other: blue where the row's wins, orange where it loses."""
    figure = Figure(figsize=(1.5 + 0.7 * len(steps), 1.1 + 0.6 * len(steps)), layout="constrained")
    axes = figure.add_subplot()
    values = [[0.0 if value is None else value for value in row] for row in matrix]
    colors = LinearSegmentedColormap.from_list("outcomes", [plotter.VERMILLION, "white", plotter.BLUE])
    axes.imshow(values, cmap=colors, vmin=-1, vmax=1, aspect="auto")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.text(j, i, "" if value is None else f"{value:+.2f}", ha="center", va="center")
    axes.set(title="Mean outcome of the row's snapshot", xlabel="against the one after step", ylabel="after step")
    axes.set_xticks(range(len(steps)), steps)
    axes.set_yticks(range(len(steps)), steps)
    axes.grid(False)
    return figure


def print_summary(folder: Path, seconds: float) -> None:
    """The end of a run on one screen: what was measured before and after, and where things are."""
    evaluations = [row for row in plotter.read_metrics(folder) if "eval/accuracy" in row]
    for when, row in (("before", evaluations[0]), ("after", evaluations[-1])):
        print(describe_evaluation(when, row))
        for name in sorted(row):
            if name.startswith("eval/") and f"{name}_low" in row and name != "eval/accuracy":
                print(f"    {name:32} {row[name]:6.1%} [{row[name + '_low']:.1%}, {row[name + '_high']:.1%}]")
    print(f"{seconds:.0f} s. In {folder}: report.html, plots/, metrics.jsonl, samples.jsonl, matrix.json, checkpoints/")
