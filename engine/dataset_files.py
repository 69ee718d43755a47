"""The rows of a dataset on disk, one by one: JSON lines, a JSON array, CSV, Parquet, and folders of them.

JSON is read here, so that a line that cannot be used costs one row and is named by its number. Everything else is read
by the `datasets` library, which is imported only then and reads without its cache.
Left out on purpose: names on the hub (rldatasets.py has the one that is used).
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}  # of the `datasets` library
SAVED = ("dataset_dict.json", "state.json")  # what Dataset.save_to_disk leaves


def read_rows(path: str, split: str) -> Iterator[tuple[int, object]]:
    """Yields (number from 1, the row, or a ValueError with the reason why there is none).

    path: a file, which is read for every split; or a folder, with a file for each split or as `datasets` saves it.
    Raises ValueError, one line, if there is no such file or it cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        yield from _read_file(path)
        return
    for suffix in (*JSON, *BUILDERS):
        if (path / f"{split}{suffix}").is_file():
            yield from _read_file(path / f"{split}{suffix}")
            return
    if any((path / name).is_file() for name in SAVED):
        yield from _read_by_datasets(path, split, lambda datasets: _saved_split(datasets, path, split))
        return
    parts = [file.relative_to(path) for file in path.rglob("*") if file.name.endswith((*JSON, *BUILDERS))]
    if not any(split in str(part) for part in parts):  # `datasets` would look elsewhere
        found = ", ".join(sorted(map(str, parts))[:5]) or "no data"
        raise ValueError(
            f"no dataset file {path / split}.jsonl: expected JSON lines with question and answer, or {split}.json, "
            f".csv or .parquet; the folder has {found}"
        )
    yield from _read_by_datasets(path, split, lambda datasets: datasets.load_dataset(str(path), **_streamed(split)))


def _streamed(split: str) -> dict:
    return dict(split=split, streaming=True)


def _saved_split(datasets, folder: Path, split: str):
    saved = datasets.load_from_disk(str(folder))
    return saved[split] if isinstance(saved, dict) else saved


def _read_file(file: Path):
    if not file.is_file():
        raise ValueError(f"no dataset file {file}: expected JSON lines with question and answer")
    builder = BUILDERS.get(file.suffix)
    if builder:
        options = {"sep": "\t"} if file.suffix == ".tsv" else {}
        options |= dict(data_files=str(file)) | _streamed("train")  # the library's name for a file without a split
        yield from _read_by_datasets(file, "train", lambda datasets: datasets.load_dataset(builder, **options))
    else:
        try:
            yield from _read_json(file)
        except (OSError, EOFError) as error:  # EOFError: a cut gzip file
            raise ValueError(f"cannot read {file}: {error}") from error


def _read_by_datasets(path: Path, split: str, load):
    """load(the library) -> something that yields rows."""
    import datasets  # slow to import, and not needed for JSON

    try:
        yield from enumerate(load(datasets), start=1)
    except Exception as error:  # its readers raise many kinds; the reader needs one way out
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(f"cannot read {path} ({split}): {type(error).__name__} {reason}".rstrip()) from error


def _read_json(file: Path):
    with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as lines:
        if lines.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":  # an array, perhaps
            lines.seek(0)
            rows = _parse(lines.read())
            if isinstance(rows, list) and rows and isinstance(rows[0], dict):
                yield from enumerate(rows, start=1)
                return
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse(line)


def _parse(text: bytes):
    """What JSON the text holds, or a ValueError with the reason why it holds none."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return ValueError("not UTF-8")
    except (ValueError, RecursionError):
        return ValueError("not JSON")
