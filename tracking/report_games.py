"""The games of the report: some games of self_play.py, board by board. As report_samples.py, from samples.jsonl."""

from pathlib import Path

from tracking.report_curves import evenly_spaced
from tracking.report_samples import read_rows, shorten

MAX_STEPS = 12  # with games on the page


def read_games(file: Path) -> list[dict]:
    """[{"step", "games": [{"title", "start", "plies"}]}] for at most MAX_STEPS steps, evenly spaced.

    A ply has seat, player, move, after (the board, or "no move"), reward and advantage.
    """
    if not file.exists():
        return []
    steps = evenly_spaced(sorted({row["step"] for _, _, row in read_rows(file) if "game" in row}), MAX_STEPS)
    games: dict[tuple[int, int], list[dict]] = {}
    for _, _, row in read_rows(file):
        if "game" in row and row["step"] in steps:
            games.setdefault((row["step"], row["game"]), []).append(row)
    return [{"step": step, "games": [view(rows) for (of, _), rows in games.items() if of == step]} for step in steps]


def view(rows: list[dict]) -> dict:
    """One game as the page shows it. rows: of its answers, in order."""
    players = {row["seat"]: row["player"] for row in rows}
    names = " against ".join(f"{name} (seat {seat})" for seat, name in sorted(players.items()))
    result = ", ".join(f"seat {row['seat']} gets {row['reward']:+g}" for row in sorted(rows[-2:], key=seat_of))
    plies = [
        {name: row.get(name) for name in ("seat", "player", "after", "reward", "advantage")}
        | {"move": shorten(row["completion"])}
        for row in rows
    ]
    return {"title": f"game {rows[0]['game']}: {names}; {result}", "start": rows[0]["board"], "plies": plies}


def seat_of(row: dict) -> int:
    return row["seat"]
