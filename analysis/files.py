"""The files of a trace. save_trace writes meta.json, trace.npz and trace.jsonl, load_trace reads them, and write_views
makes the tables, the pictures and the page from them (token_analysis.py lists the files).
"""

import csv
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from analysis import page, pictures, token_figures
from analysis.trace import Trace

OPENAI_TOP = 20  # OpenAI's API returns at most 20 alternatives of a token
OPENAI_FLOOR = -9999.0  # its log-prob of a token of probability 0: JSON has no infinity

# ---------------------------------------------------------------- the trace


def save_trace(trace: Trace, folder: Path) -> None:
    """Writes the trace. Removes the heatmap pages and token figures of an earlier trace, of which there may be more.

    meta.json is removed first and written last: a folder with meta.json has a complete trace.
    """
    for old in (folder / "meta.json", *folder.glob("topk_*.png"), *folder.glob("token_pdfs/step_*.pdf")):
        old.unlink(missing_ok=True)
    np.savez_compressed(folder / "trace.npz", **trace.arrays)

    def entry(token, **values):
        return {"id": token, "token": trace.label(token), "bytes": byte_list(trace, token), **values}

    with open(folder / "trace.jsonl", "w", encoding="utf-8") as out:
        for t, token in enumerate(trace["token_ids"].tolist()):
            row = {"step": t, **entry(token, logp=finite(trace["logp"][t]))}
            top = zip(trace["topk_ids"][t].tolist(), trace["topk_logp"][t], strict=True)
            row["top"] = [entry(other, logp=finite(logp)) for other, logp in top]
            if trace["is_soft"][t]:
                draws = zip(trace["draws"][t].tolist(), trace["weights"][t].tolist(), strict=True)
                row["draws"] = [entry(draw, weight=weight) for draw, weight in draws]
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_json(folder / "meta.json", trace.meta)


def load_trace(folder: str | Path) -> Trace:
    """Reads what `save_trace` wrote. Raises ValueError, one line, if there is no trace or a part is missing."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        raise ValueError(f"no trace in {str(folder)!r}: expected meta.json, trace.npz and trace.jsonl")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        with np.load(folder / "trace.npz", allow_pickle=False) as stored:
            arrays = dict(stored)
        spelling = {}
        with open(folder / "trace.jsonl", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                for entry in [row, *row["top"], *row.get("draws", [])]:
                    spelling[entry["id"]] = None if entry["bytes"] is None else bytes(entry["bytes"])
        trace = Trace(meta, arrays, spelling)
        # These read everything that a trace must have, so they fail here if any of it is missing.
        trace.columns(), trace.summary(), page.page_data(trace)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"incomplete trace in {str(folder)!r} ({type(error).__name__}: {error})") from error
    return trace


# ---------------------------------------------------------------- what is made from it


def write_views(trace: Trace, folder: Path, *, individual_figures: bool = True, max_figures: int | None = None) -> None:
    """Writes the tables, the pictures, the page, and a figure for each token (of the first max_figures tokens)."""
    write_csv(folder / "tokens.csv", trace.columns())
    write_json(folder / "summary.json", trace.summary())
    write_json(folder / "trace_openai.json", openai_logprobs(trace))
    page.write_page(trace, folder / "trace.html")
    pictures.draw_pictures(trace, folder)
    if individual_figures:
        token_figures.draw_token_figures(trace, folder / "token_pdfs", max_figures)


def openai_logprobs(trace: Trace) -> dict:
    """{"content": [{token, logprob, bytes, top_logprobs}]}: `logprobs` of a choice in OpenAI's chat completions."""

    def entry(token, logp):
        return {"token": trace.label(token), "logprob": finite(logp), "bytes": byte_list(trace, token)}

    content = []
    steps = zip(*(trace[name] for name in ("token_ids", "logp", "topk_ids", "topk_logp")), strict=True)
    for token, logp, topk_ids, topk_logp in steps:
        top = zip(topk_ids.tolist()[:OPENAI_TOP], topk_logp, strict=False)
        content.append(entry(int(token), logp) | {"top_logprobs": [entry(*pair) for pair in top]})
    return {"content": content}


# ---------------------------------------------------------------- formats


def finite(logp) -> float:
    """A log-prob for JSON: at least OPENAI_FLOOR."""
    return max(float(logp), OPENAI_FLOOR)


def byte_list(trace: Trace, token: int) -> list[int] | None:
    """A token's bytes for JSON; None for an id that the tokenizer does not have."""
    spelling = trace.spelling[token]
    return None if spelling is None else list(spelling)


def write_json(file: Path, value) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(file: Path, columns: dict) -> None:
    """One line per row: line ends, other control characters and backslashes are escaped as in Python."""

    def cell(value):
        if isinstance(value, str):
            return "".join(c if c.isprintable() and c != "\\" else repr(c)[1:-1] for c in value)
        return int(value) if isinstance(value, (int, np.integer, np.bool_)) else f"{value:.6g}"

    with open(file, "w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([cell(value) for value in row] for row in zip(*columns.values(), strict=True))


def writable_folder(name: str | Path) -> Path:
    """Creates the folder if it does not exist. Raises ValueError, one line, if nothing can be written there."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"cannot write to --output_dir {str(name)!r}: {error.strerror}") from error
