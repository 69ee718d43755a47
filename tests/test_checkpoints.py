"""checkpoints.py: a checkpoint opens everywhere, and a run that is killed at any moment of writing one leaves the one
before intact."""

import contextlib
import copy
import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from models import pretrain_tiny
from tracking import checkpoints
from tracking.checkpoints import find_checkpoint, save_checkpoint
from tracking.run_folder import create_folder


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain_tiny.train_tokenizer(random.Random(0))


def make_model(seed: int):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models():
    """One model for each of a few steps: no two alike."""
    return [make_model(seed) for seed in range(4)]


@pytest.fixture
def run(tmp_path):
    return create_folder(str(tmp_path / "run"))


def same_weights(model, other) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_opens(checkpoint: Path, model, step: int):
    """The checkpoint is `model`, to every reader."""
    assert same_weights(AutoModelForCausalLM.from_pretrained(checkpoint), model)
    AutoTokenizer.from_pretrained(checkpoint)
    assert torch.load(checkpoint / "trainer_state.pt", weights_only=True)["step"] == step


def names_in(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def link(run: Path, name: str) -> str:
    return os.readlink(run / "checkpoints" / name)


def test_a_checkpoint_opens_as_any_model(run, models, tokenizer):
    model = models[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    state = {"step": 20, "best": 0.5, "optimizer": optimizer.state_dict()}
    checkpoint = save_checkpoint(run, 20, model, tokenizer, state, keep=2, is_best=True)
    assert checkpoint == run / "checkpoints" / "step-20"

    reopened = AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=True)
    assert type(reopened) is Qwen2ForCausalLM
    assert reopened.dtype == torch.float32
    assert same_weights(reopened, model)
    text = "<|im_start|>user\nMia has 17 eggs.<|im_end|>\n<reasoning>"
    read_by = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(read_by(text, return_tensors="pt")["input_ids"], ids)
    assert torch.equal(reopened.eval()(ids).logits, model(ids).logits)
    assert read_by.chat_template == tokenizer.chat_template
    assert (read_by.eos_token, read_by.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)

    loaded = torch.load(checkpoint / "trainer_state.pt", weights_only=True)
    assert (loaded["step"], loaded["best"]) == (20, 0.5)
    moments = loaded["optimizer"]["state"]
    assert moments.keys() == state["optimizer"]["state"].keys() and len(moments) > 0
    assert all(torch.equal(moments[i]["exp_avg"], state["optimizer"]["state"][i]["exp_avg"]) for i in moments)
    optimizer.zero_grad()


def test_latest_and_best_point_where_they_say(run, models, tokenizer):
    for step, is_best in [(1, True), (2, False), (3, True), (4, False)]:
        save_checkpoint(run, step, models[step - 1], tokenizer, {"step": step}, keep=9, is_best=is_best)
        best = {1: 1, 2: 1, 3: 3, 4: 3}[step]
        assert (link(run, "latest"), link(run, "best")) == (f"step-{step}", f"step-{best}")
        assert_opens(run / "checkpoints" / "latest", models[step - 1], step)
        assert_opens(run / "checkpoints" / "best", models[best - 1], best)
    assert names_in(run) == {"step-1", "step-2", "step-3", "step-4", "latest", "best"}


def test_there_is_no_best_before_the_first_best(run, models, tokenizer):
    save_checkpoint(run, 1, models[0], tokenizer, {"step": 1}, keep=1, is_best=False)
    assert names_in(run) == {"step-1", "latest"}
    with pytest.raises(ValueError, match="no checkpoint 'best'.*there: latest, step-1"):
        find_checkpoint(str(run), "best")


def test_links_survive_moving_the_run(run, models, tokenizer):
    save_checkpoint(run, 1, models[0], tokenizer, {"step": 1}, keep=1, is_best=True)
    moved = run.rename(run.parent / "elsewhere")
    for name in ("latest", "best"):
        assert_opens(moved / "checkpoints" / name, models[0], 1)


class SavesNothing:
    """A stand-in for model and tokenizer where their content is not what is tested."""

    def save_pretrained(self, folder, **_):
        Path(folder).mkdir(exist_ok=True)


def save_steps(run: Path, steps, best=(), keep=2):
    for step in steps:
        save_checkpoint(run, step, SavesNothing(), SavesNothing(), {"step": step}, keep, step in best)


@pytest.mark.parametrize(
    "steps, best, keep, left",
    [
        ([1, 2, 3, 4, 5], [], 2, [4, 5]),
        ([1, 2, 3, 4, 5], [], 1, [5]),
        ([1, 2, 3, 4, 5], [], 5, [1, 2, 3, 4, 5]),
        ([1, 2, 3, 4, 5], [], 99, [1, 2, 3, 4, 5]),
        ([1, 2, 3, 4, 5], [2], 2, [2, 4, 5]),
        ([1, 2, 3, 4, 5], [1, 3], 1, [3, 5]),  # the best before the best goes
        ([1, 2, 3, 4, 5], [4], 2, [4, 5]),
        ([8, 9, 10, 11], [], 2, [10, 11]),  # by number, not by name
        ([90, 100, 1000], [90], 1, [90, 1000]),
        ([10, 20, 30, 15], [], 2, [15]),  # a run that went back: what came later is of another past
        ([10, 20, 30, 15], [], 4, [10, 15]),
        ([10, 20, 30, 15, 20], [30], 2, [15, 20, 30]),  # ... but the best stays
        ([5, 5, 5], [5], 1, [5]),
    ],
)
def test_pruning_keeps_the_newest_and_latest_and_best(run, steps, best, keep, left):
    (run / "checkpoints" / "notes.txt").write_text("mine")
    save_steps(run, steps, best, keep)
    expected = {f"step-{step}" for step in left} | {"latest", "notes.txt"} | ({"best"} if best else set())
    assert names_in(run) == expected
    assert link(run, "latest") == f"step-{steps[-1]}"
    for step in left:
        assert torch.load(run / "checkpoints" / f"step-{step}" / "trainer_state.pt")["step"] == step


def test_a_users_copy_of_a_checkpoint_is_no_step(run):
    save_steps(run, [5])
    shutil.copytree(run / "checkpoints" / "step-5", run / "checkpoints" / "step-5-backup")
    save_steps(run, [6, 7, 8])
    assert names_in(run) == {"step-7", "step-8", "step-5-backup", "latest"}


def test_saving_a_step_again_replaces_it(run, models, tokenizer):
    save_checkpoint(run, 3, models[0], tokenizer, {"step": 3, "try": 1}, keep=1, is_best=True)
    (run / "checkpoints" / "step-3" / "stale").touch()
    save_checkpoint(run, 3, models[1], tokenizer, {"step": 3, "try": 2}, keep=1, is_best=False)
    assert_opens(run / "checkpoints" / "latest", models[1], 3)
    assert not (run / "checkpoints" / "step-3" / "stale").exists()


def test_going_back_forgets_what_came_later(run, models, tokenizer, monkeypatch):
    """Not before the new checkpoint is whole; and what a killed run left half-done goes too."""
    save_steps(run, [1, 2, 3], best=[3], keep=9)
    for name in (".writing-step-7", ".removing-step-1", ".replaced-step-5"):
        (run / "checkpoints" / name).mkdir()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(torch, "save", raising(OSError(28, "No space left on device")))
        save_steps(run, [2], keep=9)
    assert {"step-1", "step-2", "step-3"} < names_in(run)
    save_steps(run, [2], keep=9)
    assert names_in(run) == {"step-1", "step-2", "step-3", "latest", "best"}  # step 3 is the best still
    save_steps(run, [3, 1], best=[1], keep=9)
    assert names_in(run) == {"step-1", "latest", "best"}


def test_the_best_can_be_marked_later(run, tmp_path):
    save_steps(run, [1, 2])
    checkpoints.mark_best(run, 1)
    assert link(run, "best") == "step-1"
    checkpoints.mark_best(run, 7)  # not in this run
    assert link(run, "best") == "step-1"


@pytest.mark.parametrize("error", [SafetensorError("IoError: no space"), RuntimeError("file write failed")])
def test_errors_of_the_writing_libraries_are_errors_of_the_disk(run, monkeypatch, error):
    monkeypatch.setattr(torch, "save", raising(error))
    with pytest.raises(OSError, match=rf"cannot write .*step-4 \([0-9,]+ MiB were free\): {error}"):
        save_steps(run, [4])
    assert names_in(run) == set()  # what was half-written does not go on filling the disk


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc, to name an open file")
def test_everything_is_on_the_disk_before_the_old_checkpoint_goes(run, models, tokenizer, monkeypatch):
    """In the order: the files, the renaming, the folder of checkpoints, the removal."""
    save_checkpoint(run, 1, models[1], tokenizer, {"step": 1}, keep=1, is_best=True)
    (run / "metrics.jsonl").write_text("{}\n")
    events = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def noted(function, name):
        def call(what, *args, **kwargs):
            path = Path(os.readlink(f"/proc/self/fd/{what}")) if isinstance(what, int) else Path(what)
            if path.exists():
                events.append((name, path.name))
            return function(what, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", noted(fsync, "flush"))
    monkeypatch.setattr(os, "replace", noted(replace, "rename"))
    monkeypatch.setattr(shutil, "rmtree", noted(rmtree, "remove"))
    save_checkpoint(run, 2, models[2], tokenizer, {"step": 2}, keep=1, is_best=True)
    renamed = events.index(("rename", ".writing-step-2"))
    named = [name for event, name in events[:renamed] if event == "flush"]
    files = {path.name for path in (run / "checkpoints" / "step-2").iterdir()}
    assert set(named) == files | {".writing-step-2", "metrics.jsonl"}
    assert renamed < events.index(("flush", "checkpoints")) < events.index(("rename", "step-1"))


@pytest.mark.parametrize("what", ["model", "model, half written", "tokenizer", "trainer state", "rename"])
def test_an_error_while_saving_leaves_the_checkpoint_before(run, models, tokenizer, monkeypatch, what):
    save_checkpoint(run, 1, models[0], tokenizer, {"step": 1}, keep=1, is_best=True)
    before = everything_in(run)

    def half_written(folder, **_):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        (folder / "stale").touch()
        raise OSError(28, "No space left on device")

    full = raising(OSError(28, "No space left on device"))
    owner, name, function = {
        "model": (models[1], "save_pretrained", full),
        "model, half written": (models[1], "save_pretrained", half_written),
        "tokenizer": (type(tokenizer), "save_pretrained", full),
        "trainer state": (torch, "save", full),
        "rename": (os, "replace", full),
    }[what]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(owner, name, function)
        save_checkpoint(run, 2, models[1], tokenizer, {"step": 2}, keep=1, is_best=True)

    assert {name for name in names_in(run) if not name.startswith(".")} == {"step-1", "latest", "best"}
    assert {name: data for name, data in everything_in(run).items() if "/." not in name} == before
    assert (link(run, "latest"), link(run, "best")) == ("step-1", "step-1")
    for name in ("latest", "best", "step-1"):
        assert_opens(find_checkpoint(str(run), name)[1], models[0], 1)
    with pytest.raises(ValueError, match=r"there: best, latest, step-1$"):
        find_checkpoint(str(run), "step-2")

    save_checkpoint(run, 2, models[1], tokenizer, {"step": 2}, keep=1, is_best=True)  # the next try is not in its way
    assert names_in(run) == {"step-2", "latest", "best"}
    assert not (run / "checkpoints" / "step-2" / "stale").exists()
    assert_opens(run / "checkpoints" / "best", models[1], 2)


class Killed(BaseException):
    pass


def killed_at(patch, moment: int) -> None:
    """Stands in for kill -9: from the given call on, nothing that changes the file system returns.

    Removing a folder counts as two calls: killed between them, the weights are gone and the rest is still there.
    """
    calls = 0

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    remove_the_rest = mortal(shutil.rmtree)

    def remove(folder, *args, **kwargs):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(Path(folder) / "model.safetensors")
        remove_the_rest(folder, *args, **kwargs)

    patch.setattr(shutil, "rmtree", mortal(remove))
    for owner, name in [(os, "replace"), (torch, "save"), (Path, "unlink"), (Path, "symlink_to")]:
        patch.setattr(owner, name, mortal(getattr(owner, name)))


def found(run: Path, models, *names: str) -> dict[str, int]:
    """The step of each name that is found; asserts that it is whole."""
    steps = {}
    for name in names:
        with contextlib.suppress(ValueError):
            checkpoint = find_checkpoint(str(run), name)[1]
            steps[name] = torch.load(checkpoint / "trainer_state.pt", weights_only=True)["step"]
            weights = load_file(checkpoint / "model.safetensors")
            assert all(torch.equal(weights[key], models[steps[name]].state_dict()[key]) for key in weights)
    return steps


def runs_killed_while_saving(step, run, models, tokenizer, monkeypatch):
    """Copies of a run with step 1 that was killed while saving `step`: at the first moment, the second, and so on."""
    save_checkpoint(run, 1, models[1], tokenizer, {"step": 1}, keep=1, is_best=True)
    for moment in range(1, 100):
        copy = Path(f"{run}-{moment}")
        shutil.copytree(run, copy, symlinks=True)
        try:
            with monkeypatch.context() as patch:
                killed_at(patch, moment)
                save_checkpoint(copy, step, models[step], tokenizer, {"step": step}, keep=1, is_best=True)
        except Killed:
            yield copy
        else:
            assert moment > 8  # there were that many moments to die at
            return
    raise AssertionError("never finished")


def test_a_run_killed_at_any_moment_of_saving_has_a_whole_latest_and_best(run, models, tokenizer, monkeypatch):
    seen = []
    for killed in runs_killed_while_saving(2, run, models, tokenizer, monkeypatch):
        steps = found(killed, models, "latest", "best")
        assert set(steps) == {"latest", "best"}
        seen.append((steps["latest"], steps["best"]))
        save_checkpoint(killed, 3, models[3], tokenizer, {"step": 3}, keep=1, is_best=True)  # the run goes on
        assert found(killed, models, "latest", "best") == {"latest": 3, "best": 3}
    assert seen == sorted(seen)  # never back
    assert set(seen) == {(1, 1), (1, 2), (2, 2)}


def test_a_run_killed_while_pruning_finds_no_broken_checkpoint(run, models, tokenizer, monkeypatch):
    for killed in runs_killed_while_saving(2, run, models, tokenizer, monkeypatch):
        found(killed, models, "step-1", "step-2")


def test_a_run_killed_while_saving_the_same_step_again_has_a_latest(run, models, tokenizer, monkeypatch):
    for killed in runs_killed_while_saving(1, run, models, tokenizer, monkeypatch):
        assert found(killed, models, "latest", "best") == {"latest": 1, "best": 1}


# ---- Finding them again ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_found_by_name_and_by_path(run, tmp_path, monkeypatch):
    save_steps(run, [10, 20, 30], best=[20], keep=9)
    checkpoints = (run / "checkpoints").resolve()
    for which, step in [("latest", 30), ("best", 20), ("step-10", 10), ("step-20", 20)]:
        assert find_checkpoint(str(run), which) == (run, checkpoints / f"step-{step}")
        assert find_checkpoint(str(run), str(checkpoints / which)) == (run, checkpoints / f"step-{step}")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("run", "run/checkpoints/best") == (Path("run"), checkpoints / "step-20")
    assert find_checkpoint("run", "latest") == (Path("run"), checkpoints / "step-30")
    other = create_folder(str(tmp_path / "other"))
    assert find_checkpoint(str(other), str(checkpoints / "best")) == (other, checkpoints / "step-20")


def test_a_name_in_the_run_goes_before_a_path(run, tmp_path, monkeypatch):
    save_steps(run, [10])
    shutil.copytree(run / "checkpoints" / "step-10", tmp_path / "latest")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("run", "latest")[1] == (run / "checkpoints" / "step-10").resolve()


def test_what_is_there_is_listed_when_it_is_not_found(run):
    save_steps(run, [10, 20], best=[10])
    (run / "checkpoints" / ".writing-step-30").mkdir()
    for which in ("step-30", "newest", "", ".writing-step-30", "/nowhere/step-1", "step-1\0"):
        with pytest.raises(ValueError, match="there: best, latest, step-10, step-20$") as e:
            find_checkpoint(str(run), which)
        assert repr(which) in str(e.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "trainer_state.pt"])
def test_a_damaged_checkpoint_is_refused_with_its_file_and_the_whole_ones(run, models, tokenizer, name):
    for step in (1, 2):
        save_checkpoint(run, step, models[step], tokenizer, {"step": step}, keep=9, is_best=step == 1)
    file = run / "checkpoints" / "step-2" / name
    size = file.stat().st_size
    for damage, reason in (
        (lambda: os.truncate(file, size - 1), f"has {size - 1:,} bytes of {size:,}"),
        (file.unlink, "is missing"),
    ):
        damage()
        for which in ("latest", "step-2", str(file.parent)):
            with pytest.raises(ValueError, match="damaged: .*; whole ones there: best, step-1$") as e:
                find_checkpoint(str(run), which)
            assert f"step-2/{name} {reason}" in str(e.value) and repr(which) in str(e.value)
        assert_opens(find_checkpoint(str(run), "best")[1], models[1], 1)


def test_a_damaged_or_missing_list_of_files(run):
    save_steps(run, [1])
    file = run / "checkpoints" / "step-1" / "files.json"
    os.truncate(file, 5)
    with pytest.raises(ValueError, match="step-1/files.json is not what was written; whole ones there: none$"):
        find_checkpoint(str(run), "latest")
    file.unlink()  # a checkpoint without one cannot be compared with it
    assert find_checkpoint(str(run), "latest")[1].name == "step-1"


def test_a_run_without_a_checkpoint(run, tmp_path):
    for folder in (run, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="no checkpoint 'latest' in .*; there: none$"):
            find_checkpoint(str(folder), "latest")


def test_resuming_needs_the_runs_folder():
    with pytest.raises(ValueError, match="--resume_from_checkpoint needs --output_dir"):
        find_checkpoint(None, "latest")


# ---- A disk without links, and a run whose links became folders ------------------------------------------------------


@pytest.fixture
def no_links(monkeypatch):
    def refused(target, link, *_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(target), None, str(link))

    monkeypatch.setattr(os, "symlink", refused)


def step_found(run: Path, which: str) -> int:
    return torch.load(find_checkpoint(str(run), which)[1] / "trainer_state.pt")["step"]


def test_without_links_text_files_stand_in_for_them(run, models, tokenizer, no_links):
    for step, is_best in [(1, True), (2, False), (3, False), (3, False)]:
        save_checkpoint(run, step, models[step], tokenizer, {"step": step}, keep=1, is_best=is_best)
    assert names_in(run) == {"step-1", "step-3", "latest", "best"}
    for name, step in (("latest", 3), ("best", 1)):
        file = run / "checkpoints" / name
        assert file.is_file() and file.read_text() == f"step-{step}\n"
        assert (
            find_checkpoint(str(run), name)[1] == find_checkpoint(str(run), str(file))[1] == checkpoints.resolve(file)
        )
        assert_opens(Path(checkpoints.resolve_model_name(str(file))), models[step], step)
    checkpoints.mark_best(run, 3)
    assert step_found(run, "best") == 3
    with pytest.raises(ValueError, match="there: best, latest, step-1, step-3$"):
        find_checkpoint(str(run), "step-2")
    (run / "checkpoints" / "step-3" / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="'latest' is damaged: .*step-3/model.safetensors is missing; .*there: step-1$"
    ):
        find_checkpoint(str(run), "latest")


def test_a_run_may_move_between_disks_with_and_without_links(run, monkeypatch, no_links):
    save_steps(run, [1], best=[1])
    monkeypatch.undo()
    save_steps(run, [2, 3], keep=1)
    assert link(run, "latest") == "step-3" and step_found(run, "best") == 1
    assert names_in(run) == {"step-1", "step-3", "latest", "best"}


def test_killed_at_any_moment_without_links(run, models, tokenizer, monkeypatch, no_links):
    seen = []
    for killed in runs_killed_while_saving(2, run, models, tokenizer, monkeypatch):
        steps = found(killed, models, "latest", "best")
        assert set(steps) == {"latest", "best"}
        seen.append((steps["latest"], steps["best"]))
    assert set(seen) == {(1, 1), (1, 2), (2, 2)} and seen == sorted(seen)
    for killed in runs_killed_while_saving(1, Path(f"{run}-again"), models, tokenizer, monkeypatch):
        assert found(killed, models, "latest", "best") == {"latest": 1, "best": 1}


def test_a_run_whose_links_became_folders_goes_on(run):
    save_steps(run, [1, 2], best=[1])
    copy = run.parent / "copy"
    shutil.copytree(run, copy)  # follows links
    before = everything_in(copy / "checkpoints" / "best")
    assert [step_found(copy, name) for name in ("latest", "best")] == [2, 1]
    save_steps(copy, [3, 4], keep=1)
    assert link(copy, "latest") == "step-4"
    assert names_in(copy) == {"step-4", "latest", "best"}
    assert step_found(copy, "best") == 1 and everything_in(copy / "checkpoints" / "best") == before  # the only one left
    save_steps(copy, [5], best=[5], keep=1)
    assert link(copy, "best") == "step-5" and names_in(copy) == {"step-5", "latest", "best"}


def test_a_models_name_is_resolved_only_where_a_text_stands_in(run, tmp_path, monkeypatch):
    save_steps(run, [1])
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("tiny", "Qwen/Qwen3-0.6B", str(run / "checkpoints" / "latest"), "latest", "", "no\0name"):
        assert checkpoints.resolve_model_name(name) == name
    assert checkpoints.resolve_model_name("~/run/checkpoints/latest") == str(run / "checkpoints" / "latest")
    for text in ("", "nothing", "../step-1", "/step-1", "step-1\nstep-2"):  # not what is written here
        (tmp_path / "latest").write_text(text)
        assert checkpoints.resolve(tmp_path / "latest") in (tmp_path / "latest", tmp_path / text)


# ---- Saving is tried first -------------------------------------------------------------------------------------------


def test_what_saving_needs_is_tried_and_nothing_is_left(run, models, tokenizer):
    before = sorted(run.rglob("*"))
    checkpoints.try_saving(models[0], tokenizer, run)
    checkpoints.try_saving(models[0], tokenizer)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("what", ["configuration", "generation_config.json", "tokenizer"])
def test_what_cannot_be_saved_is_refused_in_one_line(run, tokenizer, monkeypatch, what):
    model, other = make_model(0), copy.copy(tokenizer)
    owner = {"configuration": model.config, "generation_config.json": model.generation_config, "tokenizer": other}[what]
    if what == "generation_config.json":
        model.generation_config.do_sample, model.generation_config.top_k = True, -5
        model.generation_config.num_beams = "many"
    monkeypatch.setattr(owner, "save_pretrained", raising(ValueError("The values\nare wrong")), raising=False)
    with pytest.raises(ValueError, match=f"checkpoints cannot be saved: its {what} is refused .The values are wrong"):
        checkpoints.try_saving(model, other, run)
    assert names_in(run) == set() and not list(run.glob(".*"))


def test_a_disk_that_refuses_is_named(run, models, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(models[0].config, "save_pretrained", raising(OSError(28, "No space left on device")), False)
    with pytest.raises(ValueError, match="cannot write checkpoints to .*run': No space left on device"):
        checkpoints.try_saving(models[0], tokenizer, run)
    with pytest.raises(ValueError, match="cannot write checkpoints to .*nowhere"):
        checkpoints.try_saving(models[1], tokenizer, tmp_path / "nowhere")
