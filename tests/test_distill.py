"""distill.py: the losses are their formulas, only verified answers are learned from, students are what they are said to
be, and a run that was stopped anywhere ends as the uninterrupted one."""

import dataclasses
import functools
import inspect
import json
import math
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from drawing import drawing
from hypothesis import given
from hypothesis import strategies as st
from random_models import PROMPTS, ROOT, random_model
from small_runs import InThisProcess, Stop, stop_at
from small_runs import distill_config as config_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import distill
import evaluator
import llms
import rldatasets
from distillation import examples, measurement
from distillation.config import LOSSES, PRESETS, DistillConfig, StudentConfig, parse_config
from distillation.examples import SFTExample
from distillation.losses import divergence, token_losses
from distillation.measurement import measure_all
from distillation.students import new_student
from engine import head
from engine.attention import flash_takes_heads
from rollout import generate
from tracking import command_line, run_config, run_folder
from update import lr_scale

# ---------------------------------------------------------------- losses


def log(*probabilities):
    return torch.tensor([probabilities]).log()


def test_losses_by_hand():
    teacher, student = log(0.5, 0.5), log(0.25, 0.75)
    assert divergence(student, teacher, "fkl").item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert divergence(student, teacher, "rkl").item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    to_teacher = 0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)  # their mixture is (3/8, 5/8)
    to_student = 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    assert divergence(student, teacher, "jsd").item() == pytest.approx((to_teacher + to_student) / 2, rel=1e-5)
    mixture = 0.2 * 0.5 + 0.8 * 0.25  # beta is the teacher's weight
    by_hand = 0.2 * (0.5 * math.log(0.5 / mixture) + 0.5 * math.log(0.5 / (1 - mixture)))
    by_hand += 0.8 * (0.25 * math.log(0.25 / mixture) + 0.75 * math.log(0.75 / (1 - mixture)))
    assert divergence(student, teacher, "jsd", 0.2).item() == pytest.approx(by_hand, rel=1e-5)


def random_logprobs(seed, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(6, 11, generator=generator, dtype=torch.float64)).log_softmax(-1)


@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_losses_are_zero_at_equality_and_positive_elsewhere_and_jsd_is_symmetric_at_one_half(seed, beta):
    p, q = random_logprobs(seed), random_logprobs(seed + 1)
    for loss in ("fkl", "rkl", "jsd"):
        assert divergence(p, p, loss, beta).abs().max() < 1e-12
        assert (divergence(p, q, loss, beta) > 0).all()
    assert torch.allclose(divergence(p, q, "fkl"), divergence(q, p, "rkl"))
    assert torch.allclose(divergence(p, q, "jsd", 0.5), divergence(q, p, "jsd", 0.5))
    assert torch.allclose(divergence(p, q, "jsd", beta), divergence(q, p, "jsd", 1 - beta))
    assert (divergence(p, q, "jsd", beta) < math.log(2)).all()


def test_jsd_goes_over_into_both_kls():
    p, q = random_logprobs(0, 1.0), random_logprobs(1, 1.0)
    assert torch.allclose(divergence(p, q, "jsd", 1e-6) / 1e-6, divergence(p, q, "fkl"), rtol=1e-4)
    assert torch.allclose(divergence(p, q, "jsd", 1 - 1e-6) / 1e-6, divergence(p, q, "rkl"), rtol=1e-4)


def sampled(tokenizer, model=None):
    rollout = generate(model or random_model(), tokenizer, PROMPTS, group_size=2, max_new_tokens=20, seed=0)
    assert len(set(rollout.lengths.tolist())) > 2 and {"stop", "length"} == set(rollout.finish)
    return rollout


def naive_logits(model, rollout, row):
    """Row by row, one plain forward pass: (tokens of the completion, V), and the tokens."""
    tokens = rollout.trace_ids[row][rollout.completion_mask[row]]
    ids = torch.cat([rollout.prompt_ids[row], tokens])
    return model(ids[None]).logits[0, len(rollout.prompt_ids[row]) - 1 : len(ids) - 1].float(), tokens


def naive_losses(policy, teacher, rollout, loss, width):
    result = []
    for row in range(len(rollout.texts)):
        student, tokens = naive_logits(policy, rollout, row)
        if loss == "sft":
            result.append(torch.nn.functional.cross_entropy(student, tokens, reduction="none"))
        else:
            p, q = naive_logits(teacher, rollout, row)[0][:, :width].softmax(-1), student[:, :width].softmax(-1)
            m = (p + q) / 2
            kl = {"fkl": (p, q), "rkl": (q, p)}.get(loss)
            both = [(a * (a / b).log()).sum(-1) for a, b in ([kl] if kl else [(p, m), (q, m)])]
            result.append(sum(both) / len(both))
    return torch.cat(result)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("max_logits", [None, 3000])  # all positions at once, and a few at a time
def test_token_losses_equal_a_naive_pass_values_and_gradients(tokenizer, monkeypatch, loss, max_logits):
    """Also with a teacher whose head is padded to another width, as among the Qwen2.5 sizes."""
    if max_logits:
        monkeypatch.setattr(head, "MAX_LOGITS", max_logits)
    teacher = random_model(seed=1, hidden_size=32, head_dim=8, vocab_size=544).requires_grad_(False)
    rollout = sampled(tokenizer)
    fast, naive = random_model(), random_model()
    losses = token_losses(fast, teacher, rollout, range(len(rollout.texts)), loss)
    expected = naive_losses(naive, teacher, rollout, loss, width=512)
    assert losses.shape == (rollout.completion_mask.sum(),)  # every completion token, and no token of a prompt
    assert torch.allclose(losses, expected, atol=2e-4)
    losses.sum().backward()
    expected.sum().backward()
    for a, b in zip(fast.parameters(), naive.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-3)


def test_lessons_become_the_rollout_that_sampled_them_stop_token_included(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny")
    problems = rldatasets.load_problems("arithmetic", "train", 6)
    config = config_of()
    rollout = examples.sample(model, tokenizer, problems, config, seed=0)
    stops = llms.stop_ids(model, tokenizer)
    lessons = []
    for problem, record in zip(problems, examples.answer_records(problems, rollout, config), strict=True):
        ids = examples.completion_ids(record, tokenizer, stops, True, config)
        assert ids[-1] in stops or record["finish"] == "length"
        lessons.append(SFTExample(problem.question, ids))
    again = examples.as_rollout(lessons, tokenizer, config, torch.device("cpu"))
    kept = [row for row, finish in enumerate(rollout.finish) if finish == "stop"]
    assert kept
    for row in kept:
        n = rollout.lengths[row]
        assert again.lengths[row] == n and again.texts[row] == rollout.texts[row]
        assert torch.equal(again.draws[row, :n], rollout.draws[row, :n]) and again.draw_mask[row, :n].all()
        assert torch.equal(again.prompt_ids[row], rollout.prompt_ids[row])
    losses = token_losses(model, None, again, kept, "sft")
    assert torch.allclose(-losses, rollout.logprobs[kept][rollout.completion_mask[kept]][:, 0], atol=1e-4)


# ---------------------------------------------------------------- one update


def moved(tokenizer, **overrides):
    model, teacher = random_model(), random_model(seed=1)
    rollout = sampled(tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    stats = distill.update(model, teacher, optimizer, rollout, config_of(max_grad_norm=1e9, **overrides))
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)], stats


@pytest.mark.parametrize("loss", ["sft", "rkl"])
def test_an_update_is_the_gradient_of_the_mean_over_all_tokens_whatever_the_micro_batches(tokenizer, loss):
    model = random_model()
    mean = token_losses(model, random_model(seed=1), rollout := sampled(tokenizer), range(len(rollout.texts)), loss)
    mean.mean().backward()
    for budget in (1, 100, 10**6):
        deltas, stats = moved(tokenizer, loss=loss, tokens_per_micro_batch=budget)
        assert stats["loss"] == pytest.approx(mean.mean().item(), rel=1e-4) and stats["lr"] == 0.1
        for delta, parameter in zip(deltas, model.parameters(), strict=True):
            assert torch.allclose(delta, -0.1 * parameter.grad, atol=1e-6)


def test_an_update_that_is_not_finite_is_skipped(tokenizer, monkeypatch):
    plain = distill.token_losses
    monkeypatch.setattr(distill, "token_losses", lambda *a: plain(*a) * math.inf)
    deltas, stats = moved(tokenizer)
    assert all((delta == 0).all() for delta in deltas)
    assert stats["skipped_updates"] == 1


def test_learning_rate_schedule():
    factors = [lr_scale(step, 11, 3, 0.1, "cosine") for step in range(1, 12)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[3:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * i / 7)) / 2 for i in range(8)])
    assert min(lr_scale(step, 2, 3, 0.1, "cosine") for step in (1, 2)) > 0


# ---------------------------------------------------------------- what is learned from


def row_of(question="q", completion="c", finish="stop", form=1.0, right=1.0):
    return {"question": question, "completion": completion, "finish": finish, "reward/format": form,
            "reward/accuracy": right}  # fmt: skip


def test_every_reason_against_an_answer_is_counted():
    rows = [
        row_of(), row_of(completion=" c\n"), row_of(completion="d"), row_of(completion="e"),
        row_of(question=" a\ntest"),
        row_of(finish="length"), row_of(form=0.0), row_of(right=0.0, question="r"), row_of(question="r"),
    ]  # fmt: skip
    kept, counts = examples.filter_rows(rows, keep_per_problem=2, test_questions={"a test"})
    assert counts == {
        "kept": 3, "test problem": 1, "truncated": 1, "badly formed": 1, "wrong": 1, "duplicate": 1, "surplus": 1,
    }  # fmt: skip
    assert kept == [rows[0], rows[2], rows[8]]


rows_of_all_kinds = st.lists(
    st.builds(
        row_of,
        question=st.sampled_from("pqrs"),
        completion=st.sampled_from(["a", "b", " b", "c"]),
        finish=st.sampled_from(["stop", "stop", "length"]),
        form=st.sampled_from([1.0, 1.0, 0.0]),
        right=st.sampled_from([1.0, 1.0, 0.0]),
    ),
    max_size=30,
)


@given(rows_of_all_kinds, st.integers(1, 3))
def test_counts_add_up_and_nothing_bad_passes(rows, keep_per_problem):
    kept, counts = examples.filter_rows(rows, keep_per_problem, {"s"})
    assert sum(counts.values()) == len(rows) and counts["kept"] == len(kept)
    for row in kept:
        assert (row["finish"], row["reward/format"], row["reward/accuracy"]) == ("stop", 1.0, 1.0)
        assert row["question"] != "s"
    texts = [(row["question"], row["completion"].strip()) for row in kept]
    assert len(set(texts)) == len(texts)
    for question in "pqr":  # as many as there are, up to the limit
        right = {
            r["completion"].strip()
            for r in rows
            if r["question"] == question and r["finish"] == "stop" and r["reward/format"] and r["reward/accuracy"]
        }
        assert sum(row["question"] == question for row in kept) == min(keep_per_problem, len(right))


def test_gold_solutions_are_graded_right_and_well_formed():
    gsm8k = dict(question="q", answer="1,234", solution="He has 12*2=<<12*2=24>>24.\nSo 1,234.\n#### 1,234")
    for tags in evaluator.TAGS:
        for prefill in (False, True):
            config = config_of(tags=tags, prefill=prefill)
            for row in (gsm8k, dataclasses.asdict(rldatasets.load_problems("arithmetic", "train", 1)[0])):
                text = examples.gold_completion(row, config)
                assert evaluator.accuracy_reward(text, row["answer"], tags) == 1.0
                assert evaluator.format_reward(text, tags) == 1.0
                assert "<<" not in text and "####" not in text
                assert text.startswith(rldatasets.prefilled(tags)) or not prefill


def test_a_completion_in_another_tokenizer_is_encoded_again_and_ends_in_its_own_stop_token(tokenizer):
    config = config_of(prefill=True)
    row = {"completion": "<reasoning>\n1+1=2</reasoning>\n<answer>2</answer>", "ids": [5, 6, 7]}
    ids = examples.completion_ids(row, tokenizer, [tokenizer.eos_token_id], False, config)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "1+1=2</reasoning>\n<answer>2</answer>", "the prefilled tag is the prompt's"
    assert examples.completion_ids(row, tokenizer, [7], True, config) == [5, 6, 7]
    assert examples.completion_ids(row, tokenizer, [2], True, config) == [5, 6, 7, 2], "the teacher stopped at a tag"


# ---------------------------------------------------------------- students


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny")


def test_a_student_of_the_shipped_base_s_size(teacher):
    student = new_student(StudentConfig.parse("layers=4,width=64"), teacher, seed=0)
    shipped = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny_student")
    assert [(n, p.shape) for n, p in student.named_parameters()] == [
        (n, p.shape) for n, p in shipped.named_parameters()
    ]
    same, other = (new_student(StudentConfig.parse("layers=4,width=64"), teacher, seed) for seed in (0, 1))
    assert torch.equal(same.lm_head.weight, student.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, student.lm_head.weight)


def test_copied_teacher_layers(teacher, tmp_path):
    whole = new_student(StudentConfig.parse("layers=4,init=teacher_layers"), teacher, seed=0)
    ids = torch.randint(512, (2, 9))
    assert torch.equal(whole(ids).logits, teacher(ids).logits)
    two = new_student(StudentConfig.parse("layers=2,init=teacher_layers"), teacher, seed=0)
    for mine, its in ((0, 0), (1, 3)):
        pairs = zip(two.model.layers[mine].parameters(), teacher.model.layers[its].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    two.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, two(ids).logits)
    assert StudentConfig(3, None, "random").teacher_layers(28) == [0, 14, 27]
    assert StudentConfig(1, None, "random").teacher_layers(28) == [0]


def test_other_families_can_be_made_smaller():
    for family in ("qwen3", "llama"):  # qwen3 and llama name a head's width in their configuration
        teacher = random_model(family)
        student = new_student(StudentConfig.parse("layers=2,width=32"), teacher, seed=0)
        assert student(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 512)
        assert student.config.head_dim == 8 and student.model.layers[0].self_attn.q_proj.out_features == 32


def test_students_have_heads_that_attention_on_a_gpu_takes():
    teacher = random_model().config  # four heads
    for head_dim in (8, 12, 16, 20, 64, 72, 256, 264):
        student = StudentConfig.parse(f"layers=1,width={4 * head_dim}")
        if 4 * head_dim == teacher.hidden_size or flash_takes_heads(head_dim):
            assert student.model_config(teacher).hidden_size == 4 * head_dim
        else:
            with pytest.raises(ValueError, match="must be a multiple of 32 up to 1024"):
                student.model_config(teacher)


def test_a_copied_layer_keeps_heads_that_are_wider_than_their_share():
    teacher = random_model("qwen3", head_dim=24)  # four of them, and 48 numbers between layers; as in Qwen3-0.6B
    student = new_student(StudentConfig.parse("layers=2,init=teacher_layers"), teacher, seed=0)
    assert torch.equal(student.model.layers[1].self_attn.q_proj.weight, teacher.model.layers[2].self_attn.q_proj.weight)


@pytest.mark.parametrize(
    "text, fragment",
    [
        ("layers=two", "'layers=two' is none of"),
        ("layers=0", "'layers=0' is none of"),
        ("layers=2,depth=3", "'depth=3' is none of"),
        ("layers=2,init=pretrained", "random|teacher_layers"),
        ("width=64", "how many layers"),
        ("layers=2,width=48", "multiple of 32 up to 1024"),
        ("layers=5,init=teacher_layers", "4 layers of width 128"),
        ("layers=2,width=64,init=teacher_layers", "4 layers of width 128"),
    ],
)
def test_students_that_cannot_be_are_refused_before_anything_is_sampled(tmp_path, text, fragment):
    with pytest.raises(ValueError, match=re.escape(fragment)) as error:
        distill.run(config_of(tmp_path / "run", student_config=text))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- settings


def test_every_setting_is_read():
    borrowed = [
        inspect.getsource(f) for f in (DistillConfig.prompt_format, DistillConfig.answering, DistillConfig.stop_tag)
    ]
    files = [ROOT / name for name in ("distill.py", "update.py", "tracking/training_run.py")]
    files += (ROOT / "distillation").glob("*.py")
    source = "".join(file.read_text() for file in files) + "".join(borrowed)
    for f in dataclasses.fields(DistillConfig):
        assert re.search(rf"\b(config|self)\.{f.name}\b", source), f"{f.name} is parsed and never used"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_every_flag_overrides_them(preset):
    config = parse_config(["--preset", preset])
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == value
    other = parse_config(["sweep", "--preset", preset, "--loss", "jsd", "--seed", "3"])
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(other, f.name)}
    assert changed == {"stage", "loss", "seed"}


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        ("fliter", ["fliter", "filter", "report"]),
        ("--los sft", ["--los", "--loss"]),
        ("--loss kl", ["kl", "sft", "fkl", "rkl", "jsd"]),
        ("--loss sft --on_policy_fraction 0.5", ["on_policy_fraction 0.5", "rkl"]),
        ("--loss rkl --on_policy_fraction 1.5", ["on_policy_fraction 1.5"]),
        ("--jsd_beta 1", ["jsd_beta 1"]),
        ("--jsd_beta 0", ["jsd_beta 0"]),
        ("--epochs 0", ["epochs 0"]),
        ("--batch_size -1", ["batch_size -1"]),
        ("--teacher_preset big", ["big", "tiny", "qwen2.5-1.5b"]),
        ("--control silver", ["silver", "gold"]),
        ("--sweep_students tiny;layers=x", ["layers=x"]),
        ("--dataset_name mmlu", ["mmlu", "gsm8k"]),
    ],
)
def test_bad_arguments_get_one_line_and_exit_code_2(arguments, fragments, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["distill.py", *arguments.split()])
    with pytest.raises(SystemExit) as exit_code:
        command_line.run_script(distill.main, command_line.parse_or_exit(parse_config))
    message = capsys.readouterr().err
    assert exit_code.value.code == 2 and message.count("\n") == 1
    for fragment in ("distill.py:", *fragments):
        assert fragment in message


@pytest.fixture(scope="module")
def other_tokens(tmp_path_factory):
    """The student's base with a tokenizer that knows one token more."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(ROOT / "models" / "tiny_student", folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("~~~")
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(520)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("loss", ["fkl", "rkl", "jsd"])
def test_different_tokenizers_are_refused_where_distributions_are_compared(tmp_path, other_tokens, loss):
    with pytest.raises(
        ValueError, match=f"--loss {loss}: .*'tiny' and .* have different tokenizers; choose --loss sft"
    ):
        distill.run(config_of(tmp_path / "run", model_name=other_tokens, loss=loss))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def here():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "ProcessPoolExecutor", InThisProcess)
        patch.setattr(rldatasets, "load_problems", functools.cache(rldatasets.load_problems))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, here):
    with drawing():
        return distill.run(config_of(tmp_path_factory.mktemp("runs") / "run"))


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


CLOCKS = ("time/rollout", "time/train", "tokens_per_second", "peak_memory")


def without_clocks(rows):
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def same_results(a, b):
    """Bit for bit, but for clocks and memory."""
    for file in ("generate/teacher.jsonl", "filter/distill.jsonl", "filter/counts.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    for student in ("distilled", "gold"):
        assert without_clocks(lines(a / f"train/{student}/metrics.jsonl")) == without_clocks(
            lines(b / f"train/{student}/metrics.jsonl")
        )
        weights = [AutoModelForCausalLM.from_pretrained(f / f"train/{student}/checkpoints/latest") for f in (a, b)]
        assert all(torch.equal(x, y) for x, y in zip(*(w.parameters() for w in weights), strict=True))
    assert without_clocks(lines(a / "report/measured.jsonl")) == without_clocks(lines(b / "report/measured.jsonl"))


def test_a_run_leaves_what_it_promises(finished, capsys):
    answers = lines(finished / "generate/teacher.jsonl")
    assert len(answers) == 96
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
    test_questions = {problem.question for problem in rldatasets.load_problems("arithmetic", "test", path=None)}
    for row in answers:
        assert row["reward/accuracy"] == evaluator.accuracy_reward(row["completion"], row["answer"])
        assert len(row["ids"]) == row["length"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["completion"]
    kept = lines(finished / "filter/distill.jsonl")
    counts = json.loads((finished / "filter/counts.json").read_text())
    assert counts.pop("generated") == 96 == sum(counts.values()) and counts["kept"] == len(kept) > 3
    assert not test_questions & {row["question"] for row in kept}, "a test problem is in the training data"
    assert all(row["ids"][-1] == tokenizer.eos_token_id for row in kept)

    table = json.loads((finished / "report/distill.json").read_text())["models"]
    assert list(table) == ["teacher", "untrained student", "distilled student", "gold-solution control"]
    for row in table.values():
        assert row["n"] == 8 and row["tokens_per_second"] > 0
        for kind in ("", "greedy/"):
            assert row[f"{kind}accuracy_low"] <= row[f"{kind}accuracy"] <= row[f"{kind}accuracy_high"]
    assert table["teacher"]["parameters"] == 854_144 and table["distilled student"]["parameters"] == 230_464
    assert (finished / "report/distill.png").stat().st_size > 10_000
    assert (finished / "train/distilled/plots/overview.png").exists()
    steps = lines(finished / "train/distilled/metrics.jsonl")
    assert len(steps) == round(2 * len(kept) / 8) and steps[-1]["lr"] == pytest.approx(2e-4)
    assert {"loss", "grad_norm", "lr", "skipped_updates", "completion_length", *CLOCKS[:3]} <= set(steps[0])


def stop_in(patch, name, call):
    """stop_at for a function of distill.py or of the files that it is made of."""
    stop_at(patch, measurement if name == "measure" else examples if name == "generate" else distill, name, call)


def test_a_run_that_is_stopped_in_every_stage_ends_as_the_uninterrupted_one(finished, tmp_path, no_pictures):
    config, folder = config_of(tmp_path / "run"), tmp_path / "run"
    steps = len(lines(finished / "train/distilled/metrics.jsonl"))
    stops = [  # the function, its call since the last start, and the file that is being written then
        ("generate", 2, "generate/teacher.jsonl"),
        ("filter_rows", 1, None),
        ("update", 4, "train/distilled/metrics.jsonl"),
        ("update", steps, "train/gold/metrics.jsonl"),  # the last three of distilled are done
        ("measure", 3, "report/measured.jsonl"),
    ]
    assert steps >= 5, "each is stopped between two checkpoints, of which there is one every two steps"
    for name, call, file in stops:
        with pytest.MonkeyPatch.context() as patch:
            stop_in(patch, name, call)
            with pytest.raises(Stop):
                distill.run(config)
        if file:
            (folder / file).write_text((folder / file).read_text() + '{"question": "to')
    same_results(distill.run(config), finished)
    with pytest.MonkeyPatch.context() as patch:  # and what is finished is not done again
        for name in ("generate", "filter_rows", "update", "measure"):
            stop_in(patch, name, 1)
        distill.run(config)


def test_a_stage_by_itself_does_what_it_needs_and_no_more(finished, tmp_path):
    config = config_of(tmp_path / "run", stage="filter")
    distill.run(config)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["filter", "generate"]
    assert (tmp_path / "run/filter/distill.jsonl").read_bytes() == (finished / "filter/distill.jsonl").read_bytes()


@pytest.mark.parametrize(
    "changed, fragment",
    [
        (dict(temperature=0.7), "--temperature 0.7: what is in"),
        (dict(keep_per_problem=1), "--keep_per_problem 1: what is in"),
        (dict(learning_rate=1e-3), "--learning_rate 0.001: what is in"),
        (dict(eval_problems=9), "--eval_problems 9: what is in"),
        (dict(teacher_name="tiny_student"), "--teacher_name tiny_student: the answers in"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_name(finished, changed, fragment):
    with pytest.raises(ValueError, match=re.escape(fragment)) as error:
        distill.run(config_of(finished, **changed))
    assert "--overwrite_output_dir" in str(error.value)


def test_overwriting_makes_a_stage_again_and_what_was_built_on_it(finished, tmp_path, no_pictures):
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    answers = (folder / "generate/teacher.jsonl").stat().st_mtime_ns
    distill.run(config_of(folder, stage="train", learning_rate=1e-3, overwrite_output_dir=True))
    assert (folder / "generate/teacher.jsonl").stat().st_mtime_ns == answers
    assert not (folder / "report").exists()
    assert max(row["lr"] for row in lines(folder / "train/distilled/metrics.jsonl")) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="no such folder"):  # what is refused replaces nothing
        distill.run(config_of(folder, model_name="./nowhere", overwrite_output_dir=True))
    assert (folder / "train/distilled").exists()


def test_on_policy_batches_are_the_students_own_and_as_many_as_asked(finished, tmp_path, no_pictures, monkeypatch):
    """From the answers of another run, and with a new student."""
    seen = []
    original = distill.update
    monkeypatch.setattr(
        distill, "update", lambda p, t, o, rollout, c: (seen.append(rollout), original(p, t, o, rollout, c))[1]
    )
    folder = distill.run(
        config_of(
            tmp_path / "run",
            stage="train",
            data_dir=str(finished),
            loss="rkl",
            on_policy_fraction=0.4,
            epochs=6.0,
            student_config="layers=1,width=32",
            control="none",
            seed=1,
        )  # fmt: skip
    )
    assert sorted(path.name for path in folder.iterdir()) == ["train"]
    flags = [row["on_policy"] for row in lines(folder / "train/distilled/metrics.jsonl")]
    assert sum(flags) == math.floor(0.4 * len(flags)) > 1
    texts = {row["completion"] for row in lines(finished / "filter/distill.jsonl")}
    for flag, rollout in zip(flags, seen, strict=True):
        assert len(rollout.texts) == 8
        assert bool(flag) == (not set(rollout.texts) & texts)
    assert seen[flags.index(1)].logprobs.any(), "sampled, so with the log-probs of sampling"


def test_the_unfiltered_twin_learns_as_many_answers_that_nobody_checked(finished, tmp_path, no_pictures, monkeypatch):
    learned, original = {}, distill.train_student
    monkeypatch.setattr(
        distill, "train_student", lambda *args: (learned.update({args[3].name: args[2]}), original(*args))[1]
    )
    known = lines(finished / "filter/distill.jsonl")[0]["question"]
    monkeypatch.setattr(distill, "test_questions", lambda config: {known})  # as if it were a test problem too
    folder = distill.run(config_of(tmp_path / "run", stage="train", data_dir=str(finished), control="both", epochs=0.1))
    for name in ("distilled", "gold", "unfiltered"):
        assert (folder / "train" / name / "checkpoints" / "latest" / "model.safetensors").exists()
    answers = lines(finished / "generate/teacher.jsonl")
    assert len(learned["unfiltered"]) == len(learned["distilled"]) and learned["unfiltered"] != learned["distilled"]
    assert all(row in answers and row["finish"] == "stop" for row in learned["unfiltered"])
    assert any(row["reward/accuracy"] != 1 for row in learned["unfiltered"]), "wrong ones too"
    assert known not in {row["question"] for row in learned["unfiltered"]}


def test_only_a_student_that_writes_answers_has_an_actor(finished, tmp_path, no_pictures, monkeypatch):
    made, original = [], llms.make_actor
    monkeypatch.setattr(llms, "make_actor", lambda *args, **options: (made.append(1), original(*args, **options))[1])
    run = dict(stage="train", data_dir=str(finished), control="none", epochs=0.1)
    distill.run(config_of(tmp_path / "sft", **run))
    distill.run(config_of(tmp_path / "rkl", loss="rkl", **run))
    assert made == []
    distill.run(config_of(tmp_path / "on_policy", loss="rkl", on_policy_fraction=0.5, **run))
    assert made == [1]


def test_the_student_learns_the_teachers_stop_token_and_other_tokenizers_work_with_sft(
    finished, tmp_path, no_pictures, other_tokens
):
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny_student")
    base.config.eos_token_id = base.generation_config.eos_token_id = 0
    base.save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny_student")
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(tmp_path / "base")
    run = dict(stage="train", data_dir=str(finished), control="none", epochs=1.0)
    for name, stops in ((str(tmp_path / "base"), [0, 2]), (other_tokens, [2])):
        folder = distill.run(config_of(tmp_path / Path(name).name / "run", model_name=name, **run))
        student, its_tokenizer = llms.load(str(folder / "train/distilled/checkpoints/latest"))
        assert llms.stop_ids(student, its_tokenizer) == stops


def test_a_sweep_measures_every_student(finished, tmp_path, no_pictures):
    students = "tiny_student;layers=1,width=32;layers=2,init=teacher_layers"
    settings_ = dict(stage="sweep", data_dir=str(finished), sweep_students=students, epochs=0.5)
    folder = distill.run(config_of(tmp_path / "run", **settings_))
    table = json.loads((folder / "sweep/sweep.json").read_text())
    sizes = {label: row["parameters"] for label, row in table.items()}
    assert list(sizes) == ["teacher", *students.split(";")]
    assert sizes["layers=1,width=32"] < sizes["tiny_student"] < sizes["layers=2,init=teacher_layers"] < sizes["teacher"]
    assert (folder / "sweep/sweep.png").stat().st_size > 10_000


def test_a_model_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "ProcessPoolExecutor", ProcessPoolExecutor)
    run_folder.JsonLines(tmp_path / "measured.jsonl").append({"model": "b", "known": "already"})
    config = config_of(eval_problems=64)
    table = measure_all({"a": "tiny_student", "b": "nowhere"}, config, tmp_path)
    assert table["b"] == {"model": "b", "known": "already"}
    assert measure_all({"a": "nowhere"}, config, tmp_path)["a"] == table["a"], "measured once"
    # Weights; keys and values of 64 rows, 4 layers, 2 heads of 16 numbers, over 72 tokens and a prompt at least.
    at_least = 4 * table["a"]["parameters"] + 64 * 4 * 2 * 2 * 16 * 4 * 100
    assert at_least / 2**20 < table["a"]["peak_memory"] < 500


# ---------------------------------------------------------------- the teacher


def finished_grpo_run(folder, steps=2, last=2, files=("config.json",), **config):
    checkpoint = folder / "checkpoints" / f"step-{last}"
    checkpoint.mkdir(parents=True)
    for name in files:
        (checkpoint / name).touch()
    config = dict(preset="tiny", control="none", max_steps=steps) | config
    (folder / "args.json").write_text(json.dumps({"config": config}))


def test_the_newest_finished_run_is_the_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert distill.newest_run("tiny") is None
    finished_grpo_run(tmp_path / "runs/tiny-2")
    finished_grpo_run(tmp_path / "runs/tiny-3", steps=5)  # not finished
    finished_grpo_run(tmp_path / "runs/tiny-4", control="shuffled_advantages")
    finished_grpo_run(tmp_path / "runs/tiny-5", preset="qwen2.5-1.5b")
    finished_grpo_run(tmp_path / "runs/tiny-6", files=("trainer_state.pt",), lora_rank=8)  # adapters alone
    assert distill.newest_run("tiny") == "runs/tiny-2/checkpoints/step-2"


def test_without_a_teacher_grpo_trains_one_on_the_same_task(tmp_path, no_pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = dict(problems_per_step=4, group_size=4, minibatches=1)
    monkeypatch.setitem(run_config.PRESETS, "tiny", run_config.PRESETS["tiny"] | small)
    config = config_of(
        "run", stage="generate", teacher_name=None, teacher_steps=1, tags="think", eval_problems=4, train_problems=8
    )
    distill.run(config)
    args = json.loads(Path("run/teacher/args.json").read_text())["config"]
    assert (args["max_steps"], args["tags"], args["model_name"]) == (1, "think", "tiny")
    name = json.loads(Path("run/generate/teacher.json").read_text())["teacher_name"]
    assert name == "run/teacher/checkpoints/step-1"
    finished_grpo_run(tmp_path / "runs/tiny")  # a newer run does not change what was decided
    assert distill.find_teacher(config, Path("run")) == name
