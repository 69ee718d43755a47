"""engine/dataset_files.py and the columns of rldatasets.py: every format gives the same problems, or one line."""

import csv
import gzip
import json
from pathlib import Path

import pytest

import rldatasets
from rldatasets import Problem, load_problems, overlap_note

ROWS = [{"question": f"What is {n}+1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(1, 9)]
PROBLEMS = [Problem(row["question"], str(n + 2), row["answer"]) for n, row in enumerate(ROWS)]


def lines_of(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_csv(file: Path, rows, separator=","):
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def write_table(file: Path, rows):
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(str(file))


WRITERS = {
    "a.jsonl": lambda file: file.write_text(lines_of(ROWS)),
    "array.json": lambda file: file.write_text(json.dumps(ROWS, indent=1)),
    "line.json": lambda file: file.write_text("\ufeff \n" + json.dumps(ROWS), encoding="utf-8"),
    "lines.json": lambda file: file.write_text(lines_of(ROWS)),
    "a.jsonl.gz": lambda file: file.write_bytes(gzip.compress(lines_of(ROWS).encode())),
    "a.csv": lambda file: write_csv(file, ROWS),
    "a.tsv": lambda file: write_csv(file, ROWS, "\t"),
    "a.parquet": lambda file: write_table(file, ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_problems(tmp_path, capsys, name):
    WRITERS[name](tmp_path / name)
    capsys.readouterr()  # writing a table shows its progress
    for split in ("train", "test"):
        assert load_problems("mine", split, path=str(tmp_path / name)) == PROBLEMS
    assert load_problems("mine", "train", 3, str(tmp_path / name)) == PROBLEMS[:3]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".csv", ".parquet"])
def test_a_folder_with_a_file_for_each_split(tmp_path, suffix):
    write = next(write for name, write in WRITERS.items() if name.endswith(suffix))
    for split in ("train", "test"):
        write(tmp_path / f"{split}{suffix}")
        assert load_problems("mine", split, path=str(tmp_path)) == PROBLEMS
    with pytest.raises(ValueError, match=rf"validation\.jsonl.*the folder has test{suffix}, train{suffix}"):
        load_problems("mine", "validation", path=str(tmp_path))


def test_folders_as_the_hub_and_the_datasets_library_have_them(tmp_path):
    import datasets

    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        write_table(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", ROWS)
    splits = datasets.DatasetDict({split: datasets.Dataset.from_list(ROWS) for split in ("train", "test")})
    splits.save_to_disk(str(tmp_path / "dictionary"))
    splits["train"].save_to_disk(str(tmp_path / "one"))
    for folder in ("hub", "dictionary", "one"):
        for split in ("train", "test"):
            assert load_problems("mine", split, path=str(tmp_path / folder)) == PROBLEMS
    with pytest.raises(ValueError, match=r"cannot read .*dictionary \(validation\): KeyError"):
        load_problems("mine", "validation", path=str(tmp_path / "dictionary"))


@pytest.mark.parametrize(
    "name, content", [("a.parquet", b"PAR1 no"), ("a.csv", b""), ("a.jsonl.gz", b"no"), ("a.arrow", b"x")]
)
def test_a_file_that_is_not_what_its_name_says_is_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read .*{name}") as refused:
        load_problems("mine", "train", path=str(tmp_path / name))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[", "[1, 2]", '["Q?", "#### 1"]', '[{"question": "Q?"', "[" * 100_000, "[]"])
def test_arrays_that_hold_no_rows(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="no usable problem.*not (JSON|a JSON object)"):
        load_problems("mine", "train", path=str(tmp_path / "a.json"))


def load_one(tmp_path, **row) -> Problem:
    (tmp_path / "a.jsonl").write_text(lines_of([row]))
    [problem] = load_problems("mine", "train", path=str(tmp_path / "a.jsonl"))
    return problem


@pytest.mark.parametrize("question", rldatasets.QUESTION)
@pytest.mark.parametrize("answer", rldatasets.ANSWER)
def test_columns_may_have_these_names(tmp_path, question, answer):
    assert load_one(tmp_path, **{question: "Q?", answer: "9*2=18\n#### 18"}) == Problem("Q?", "18", "9*2=18\n#### 18")


@pytest.mark.parametrize(
    "columns, gold, solution",
    [
        (dict(answer="18"), "18", "#### 18"),
        (dict(answer=18), "18", "#### 18"),
        (dict(answer=1.5), "1.5", "#### 1.5"),
        (dict(answer=" -1,234 "), "-1,234", "#### -1,234"),
        (dict(solution=r"9*2, so \boxed{18}."), "18", "9*2, so \\boxed{18}.\n#### 18"),
        (dict(solution=r"\boxed{1} then \boxed{\frac{1}{2}}"), r"\frac{1}{2}", None),
        (dict(solution=r"so \boxed{18}", answer="18"), "18", "so \\boxed{18}\n#### 18"),
        (dict(response="9*2 it is", answer="18"), "18", "9*2 it is\n#### 18"),
        (dict(answer=None, solution="#### 18"), "18", "#### 18"),
        (dict(answer=r"so \boxed{1} #### 18"), "18", r"so \boxed{1} #### 18"),
    ],
)
def test_where_the_gold_answer_is_found(tmp_path, columns, gold, solution):
    problem = load_one(tmp_path, question="Q?", **columns)
    assert problem.answer == gold
    assert solution is None or problem.solution == solution


def test_other_columns_are_named_with_the_wanted_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines_of([{"input": "Q?", "target": "#### 1"}]))
    with pytest.raises(ValueError, match="its columns are input, target; wanted are question or .*, and answer or "):
        load_problems("mine", "train", path=str(tmp_path / "a.jsonl"))
    write_csv(tmp_path / "a.csv", [{"question": "Q?", "answer": "#### 1"}], ";")
    with pytest.raises(ValueError, match="its columns are question;answer; wanted"):
        load_problems("mine", "train", path=str(tmp_path / "a.csv"))


def test_golds_that_are_no_number_are_counted_and_refused_when_all_are(tmp_path, capsys):
    rows = [
        {"question": f"{n}?", "answer": f"#### {gold}"} for n, gold in enumerate(("18", "Paris", "x+1", r"\frac12"))
    ]
    file = tmp_path / "a.jsonl"
    file.write_text(lines_of(rows[:3]))
    assert len(load_problems("mine", "train", path=str(file))) == 3
    assert (
        "2 of 3 gold answers are not one number (as 'Paris'): no answer to them is ever right"
        in capsys.readouterr().err
    )
    file.write_text(lines_of(rows[1:3]))
    with pytest.raises(
        ValueError, match="2 of 2 gold answers are not one number .as 'Paris'.: no answer would ever be"
    ):
        load_problems("mine", "train", path=str(file))


def test_questions_in_both_splits_are_counted():
    assert overlap_note(PROBLEMS[:4], PROBLEMS[4:]) is None
    note = overlap_note(PROBLEMS[:6], [Problem(f" {PROBLEMS[5].question} \n", "1", "#### 1"), *PROBLEMS[6:]])
    assert note.startswith("1 of 3 test questions are in the training data too") and "\n" not in note


def test_a_path_may_begin_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(lines_of(ROWS))
    assert load_problems("mine", "train", path="~/a.jsonl") == PROBLEMS
