"""Several processes (gloo, on the CPU) do what one does: the same losses and weights, whatever is unevenly divided."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from random_models import ROOT
from safetensors.torch import load_file

from engine import distributed

SETTINGS = (
    "--preset tiny --problems_per_step 4 --group_size 4 --minibatches 2 --max_completion_length 24 --max_steps 5 "
    "--eval_problems 12 --eval_steps 5 --save_steps 5 --learning_rate 1e-4 --warmup_steps 1 "
    "--final_lr_fraction 1 --seed 3"
).split()


def train(folder: Path, num_processes: int, *flags: str):
    return processes.run("main.py", *SETTINGS, "--output_dir", str(folder), *flags, num_processes=num_processes)


def weights(folder: Path, step: int = 5) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step}" / "model.safetensors")


def log(folder: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def same_run(one: Path, several: Path) -> None:
    for a, b in zip(log(one), log(several), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not name.startswith(("time/", "tokens_per_second")):
                assert a[name] == pytest.approx(b[name], abs=1e-5), (a["step"], name)
    for a, b in zip(log(one, "samples"), log(several, "samples"), strict=True):
        assert a["completion"] == b["completion"] and a.get("advantage") == b.get("advantage")
    before, after = weights(one), weights(several)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.allclose(before[name], after[name], atol=1e-5), name


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    result = train(folder, 1)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder


def test_two_processes_end_where_one_does(one, tmp_path):
    result = train(tmp_path / "two", 2)
    assert result.returncode == 0, result.stderr[-2000:]
    same_run(one, tmp_path / "two")
    assert result.stdout.count("test, n = 12") == 4, "one process speaks: two evaluations, and both in the summary"
    assert json.loads((tmp_path / "two" / "args.json").read_text())["processes"] == 2


def test_two_processes_replace_the_same_groups_and_learn_the_same_adapters(tmp_path):
    """Also where one of them has nothing to sample again."""
    flags = ("--dynamic_sampling", "2", "--lora_rank", "4", "--save_merged")
    for name, num_processes in (("one", 1), ("two", 2)):
        result = train(tmp_path / name, num_processes, *flags)
        assert result.returncode == 0, result.stderr[-2000:]
    same_run(tmp_path / "one", tmp_path / "two")
    assert sum(row["replaced_groups"] for row in log(tmp_path / "one")[1:]) > 0
    file = "checkpoints/step-5/adapter/adapter_model.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
    assert all(one[name].abs().max() > 0 for name in one), "an adapter begins with B = 0"
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


DISTILL = (
    "train --preset tiny --teacher_name tiny --train_problems 60 --problems_per_step 8 --eval_problems 4 "
    "--max_completion_length 60 --epochs 4 --batch_size 8 --learning_rate 1e-4 --warmup_steps 1"
).split()


def test_two_processes_distil_the_same_student(tmp_path):
    """All stages that several processes share, on-policy batches, and a divided student."""
    flags = ("--loss", "fkl", "--on_policy_fraction", "0.5")
    for name, num_processes, more in (("one", 1, ()), ("two", 2, ("--fsdp",))):
        arguments = [*DISTILL, *flags, *more, "--output_dir", str(tmp_path / name)]
        result = processes.run("distill.py", *arguments, num_processes=num_processes)
        assert result.returncode == 0, result.stderr[-2000:]
    answers = [(tmp_path / name / "generate" / "teacher.jsonl").read_text() for name in ("one", "two")]
    assert answers[0] == answers[1] and answers[0].count("\n") == 60
    one, two = (tmp_path / name / "train" / "distilled" for name in ("one", "two"))
    last = log(one)[-1]["step"]
    assert last == log(two)[-1]["step"] >= 4
    for a, b in zip(log(one), log(two), strict=True):
        assert all(a[name] == pytest.approx(b[name], abs=1e-5) for name in ("loss", "grad_norm", "completion_length"))
    before, after = weights(one, last), weights(two, last)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


UNEVEN = """
import copy
import sys

import torch

sys.path[:0] = ["."]
import grpo, llms, main
from engine import distributed
from rollout import generate
from update import update
from tracking.run_config import PRESETS, GRPOConfig

distributed.init_distributed()
torch.manual_seed(0)
plain = dict(problems_per_step=4, group_size=2, max_completion_length=40, tokens_per_micro_batch=64)
config = GRPOConfig(**PRESETS["tiny"] | plain | dict(minibatches=1, learning_rate=1e-4, fsdp="fsdp" in sys.argv))
policy, tokenizer = llms.load("tiny")
start = copy.deepcopy(policy)
if config.fsdp:
    actor = llms.make_actor(policy, torch.float32, always_copy=True)
    distributed.shard_model(policy, llms.completion_logprobs)
else:
    actor = policy
optimizer = llms.make_optimizer(policy, config.learning_rate)
prompts = ["Mia has 12 eggs.", "Tom has 3 apples and 4 pears. How many?", "Why?", "Ann buys 7 pens."]
places = distributed.shard_indices(4, 1)
for step, lengths in enumerate([(40, 40), (40, 3), (3, 40), (1, 40), (40, 40)]):
    rollout = generate(
        actor, tokenizer, [prompts[i] for i in places], group_size=2, seed=step, prompt_indices=places,
        max_new_tokens=lengths[distributed.rank()],
    )
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5]) * (distributed.rank() != step % 2 or step == 4)
    if step == 3:  # nobody has anything to learn from
        advantages = advantages * 0
    stats = update(policy, actor, None, optimizer, rollout, advantages, config)
    llms.sync_actor(actor, policy)
    assert stats["updates"] == (step != 3), (step, stats)
    mine = torch.cat([distributed.full_tensor(p).detach().flatten() for p in policy.parameters()])
    acts = torch.cat([p.detach().flatten() for p in actor.parameters()])
    assert torch.equal(mine, acts), "the actor is the gathered policy"
    sums = distributed.all_gather([mine.double().sum().item()])
    assert sums[0] == sums[1], "both processes have the same weights"
moved = (mine - torch.cat([p.detach().flatten() for p in start.parameters()])).abs().max()
assert moved > 1e-5
"""


@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
def test_processes_with_less_or_nothing_to_do_keep_up(tmp_path, kind):
    """Uneven lengths and numbers of micro-batches, a process without any row to learn from, and none with one."""
    script = tmp_path / "uneven.py"
    script.write_text(UNEVEN)
    result = processes.run(script, kind, num_processes=2)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_divided_policy_takes_the_same_steps_and_one_process_goes_on_from_there(one, tmp_path):
    first = train(tmp_path / "run", 2, "--fsdp", "--max_steps", "3")
    assert first.returncode == 0, first.stderr[-2000:]
    for a, b in zip(log(one)[:3], log(tmp_path / "run"), strict=False):
        assert all(
            a[name] == pytest.approx(b[name], abs=1e-5) for name in ("reward", "entropy", "grad_norm") if name in a
        )
    rest = train(tmp_path / "run", 1, "--resume_from_checkpoint", "latest")
    assert rest.returncode == 0, rest.stderr[-2000:]
    assert [row["step"] for row in log(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    before, after = weights(one), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


LONG = [*SETTINGS, "--max_steps", "500", "--eval_steps", "500", "--save_steps", "500"]


def wait_for_steps(folder: Path, running) -> None:
    """Until a run that goes on has logged two steps."""
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(log(folder)) < 3:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def stopped_with_a_checkpoint(folder: Path, stderr: str) -> None:
    step = log(folder)[-1]["step"]
    assert f"step {step} is saved; go on with torchrun --nproc_per_node 2 main.py" in stderr
    assert weights(folder, step)


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(tmp_path):
    running = processes.Running("main.py", *LONG, "--output_dir", str(tmp_path / "run"), num_processes=2)
    try:
        wait_for_steps(tmp_path / "run", running)
        os.kill(running.processes[1].pid, signal.SIGTERM)
        for process in running.processes:  # each by itself: finish() sends the signal again to those that are slower
            process.join(60)
    except BaseException:
        running.kill()
        raise
    result = running.finish(60)
    assert [process.exitcode for process in running.processes] == [128 + signal.SIGTERM] * 2
    stopped_with_a_checkpoint(tmp_path / "run", result.stderr)


def test_torchrun_starts_the_processes_and_a_signal_to_it_ends_them_with_a_checkpoint(tmp_path):
    """The one test that pays for torchrun itself: it and its processes import torch each by itself."""
    folder, errors = tmp_path / "run", tmp_path / "stderr"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(errors, "w") as file:
        launcher = subprocess.Popen(
            [*torchrun, "main.py", *LONG, "--output_dir", str(folder)],
            stderr=file, stdout=subprocess.DEVNULL, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        wait_for_steps(folder, launcher)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=60) != 0
    finally:
        launcher.kill()
    stopped_with_a_checkpoint(folder, errors.read_text())


@pytest.mark.parametrize(
    "flags, line",
    [
        (
            ("--problems_per_step", "6"),
            "--problems_per_step 6: must be a multiple of --minibatches 2 times 2 processes",
        ),
        (("--output_dir", "/proc/nowhere"), "cannot write to output_dir '/proc/nowhere'"),
    ],
)
def test_refusals_end_all_processes(tmp_path, flags, line):
    result = train(tmp_path / "run", 2, *flags)
    assert result.returncode != 0 and line in result.stderr


def test_one_process_is_alone():
    with pytest.raises(ValueError, match="--fsdp: one process has nothing to shard"):
        distributed.check_fsdp_world_size(True)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main_process()) == (0, 1, True)
    assert distributed.all_reduce_sum({"a": 2.5}) == {"a": 2.5} and distributed.all_reduce_max(3) == 3
    assert distributed.shard_indices(6, 3) == list(range(6))


@pytest.mark.parametrize("count, minibatches", [(2, 1), (2, 2), (4, 2), (3, 1)])
def test_every_problem_has_one_place_and_minibatches_stay_what_they_are(monkeypatch, count, minibatches):
    monkeypatch.setattr(distributed, "world_size", lambda: count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.shard_indices(24, minibatches))
    assert sorted(sum(shares, [])) == list(range(24))
    size = 24 // minibatches // count
    for m in range(minibatches):  # the m-th part of every process together are the m-th minibatch of one
        together = sorted(i for share in shares for i in share[m * size : (m + 1) * size])
        assert together == list(range(m * 24 // minibatches, (m + 1) * 24 // minibatches))


@pytest.mark.parametrize("limit", [1, 6, 7, 100])
def test_gradients_are_sent_together_and_end_where_they_were(monkeypatch, limit):
    """Every tensor once, in place, in messages of at most BUCKET numbers or of one tensor."""
    sent = []

    def doubled(tensor):  # as if another rank had the same gradients
        sent.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr(distributed, "BUCKET", limit)
    monkeypatch.setattr(distributed.dist, "all_reduce", doubled)
    shapes = [(2, 3), (1,), (4,), (3, 3), (), (5,), (1, 1)]
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    expected, places = [2 * tensor for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    parts = distributed.buckets(tensors)
    assert [id(tensor) for part in parts for tensor in part] == [id(tensor) for tensor in tensors]
    for part in parts:
        assert len(part) == 1 or sum(tensor.numel() for tensor in part) <= limit
        distributed.all_reduce_together(part)
    assert len(sent) == len(parts) and sum(sent) == sum(tensor.numel() for tensor in tensors)
    assert len(sent) == {1: 7, 6: 5, 7: 4, 100: 1}[limit]
    for tensor, right, place in zip(tensors, expected, places, strict=True):
        assert torch.equal(tensor, right) and tensor.data_ptr() == place
