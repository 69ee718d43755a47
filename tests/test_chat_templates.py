"""Chat templates that refuse, ignore or need a system message, write a date, open or close the reasoning, or fail."""

import copy
import datetime
import json

import pytest
from small_runs import distill_config, small_dataset, tiny_config
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

import evaluator
import llms
import rldatasets
from distillation.examples import completion_ids, gold_rows
from engine import chat_templates
from main import train
from rldatasets import DEFAULT_FORMAT, INSTRUCTION, Problem, PromptFormat, build_prompt
from rollout import generate

TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
LOOP = "{% for message in messages %}" + TURN + "{% endfor %}"
BEGIN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ALTERNATE = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
IGNORES = "{% for message in messages %}{% if message['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}"
DATE = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}"
QUESTION = "What is 2+3?"


def begins(with_text: str) -> str:
    return LOOP + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + with_text + "' }}{% endif %}"


@pytest.fixture
def with_template(tokenizer):
    def make(template):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return other

    return make


def test_the_embedded_models_template_is_known(tokenizer):
    """They are trained on bare questions, so it alone may leave the instruction out."""
    student = llms.load_tokenizer("tiny_student")
    assert tokenizer.chat_template == student.chat_template == chat_templates.EMBEDDED_TEMPLATE


@pytest.mark.parametrize("template", [NO_SYSTEM + LOOP + BEGIN, ALTERNATE + LOOP + BEGIN, IGNORES + BEGIN])
def test_without_a_system_turn_the_instruction_is_in_the_users(with_template, template):
    prompt = build_prompt(with_template(template), QUESTION, tags="think")
    instruction = INSTRUCTION.format(think="think")
    assert prompt == f"<|im_start|>user\n{instruction}\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_needs_a_system_turn_and_leaves_it_out(with_template):
    needs = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    prompt = build_prompt(with_template(needs + IGNORES + BEGIN), QUESTION)
    assert prompt.count(INSTRUCTION.format(think="reasoning")) == 1 and QUESTION in prompt


def test_a_template_that_takes_parts(with_template):
    parts = "{% for m in messages %}{% for part in m.content %}{% if part is mapping %}{{ part.text }}{% endif %}"
    prompt = build_prompt(with_template(parts + "{% endfor %}{% endfor %}"), QUESTION)
    assert prompt == f"{INSTRUCTION.format(think='reasoning')}\n\n{QUESTION}"


@pytest.mark.parametrize(
    "template, reason",
    [
        (LOOP + "{{ undefined_name.field }}", "UndefinedError: 'undefined_name' is undefined"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no chat\nwith me') }}", "TemplateError: no chat with me"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | length }}", "leaves out the question"),
        ("{{ messages[-1]['role'] }}" + BEGIN, "leaves out the question"),
        (LOOP + "{{ range(99999) | random }}", "another prompt each time"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(with_template, template, reason):
    for ask in (lambda t: build_prompt(t, QUESTION), DEFAULT_FORMAT.resolve):
        with pytest.raises(ValueError, match=reason) as refused:
            ask(with_template(template))
        assert "\n" not in str(refused.value) and "--prompt_style plain" in str(refused.value)
    assert build_prompt(with_template(template), QUESTION, style="plain").endswith("Assistant:")


# ---------------------------------------------------------------- templates that begin the answer


@pytest.mark.parametrize("tags", ["think", "reasoning"])
@pytest.mark.parametrize("end", ["", r"\n", r"\n\n"])
def test_an_opening_tag_in_the_template_is_as_a_prefilled_one(with_template, tags, end):
    tokenizer = with_template(begins(f"<{tags}>{end}"))
    opening = f"<{tags}>" + end.replace(r"\n", "\n")
    for prefill in (False, True):  # which writes no second one
        unresolved = PromptFormat(tags, prefill=prefill)
        asked = unresolved.resolve(tokenizer)
        prompt = asked.prompt(tokenizer, QUESTION)
        assert prompt.endswith(f"assistant\n{opening}") and prompt == unresolved.prompt(tokenizer, QUESTION)
        full = asked.full_text(f"5</{tags}>\n<answer>5</answer>")
        assert full.startswith(opening) and full.count(f"<{tags}>") == 1
        assert evaluator.format_reward(full, tags) == evaluator.accuracy_reward(full, "5", tags) == 1
        assert asked.resolve(tokenizer) == asked
        plain = PromptFormat(tags, "plain", prefill).resolve(tokenizer)
        assert plain.full_text("x") == rldatasets.prefilled(tags) * prefill + "x"


def test_what_follows_the_tag_is_graded_with_it(with_template):
    tokenizer = with_template(begins(r"<think>\nOkay, "))
    assert PromptFormat("think").resolve(tokenizer).opens_reasoning == "<think>\nOkay, "


@pytest.mark.parametrize(
    "begun, tags, advice",
    [
        (r"<think>\n", "reasoning", "begins the answer with <think>, not with <reasoning>: choose --tags think"),
        (r"<reasoning>", "think", "choose --tags reasoning"),
        (r"[THINK]", "think", "begins the answer with \\[THINK\\].*--prompt_style plain"),
        (r"<thought>\n", "think", "--prompt_style plain"),
        (r"<think>\n\n</think>\n\n", "think", "ends the reasoning, .* before the model can write any"),
        (r"</think>", "think", "ends the reasoning"),
    ],
)
def test_other_beginnings_are_refused_with_what_to_choose(with_template, begun, tags, advice):
    with pytest.raises(ValueError, match=advice) as refused:
        build_prompt(with_template(begins(begun)), QUESTION, tags=tags)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_a_model_that_need_not_think_is_asked_to(with_template, name):
    closed = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    closed += "{% if not " + name + " %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
    tokenizer = with_template(LOOP + closed)
    asked = PromptFormat("think").resolve(tokenizer)
    assert asked.opens_reasoning == "<think>\n" and asked.prompt(tokenizer, QUESTION).endswith("assistant\n<think>\n")
    # With tags of its own, the reasoning has a place behind the empty block.
    other = PromptFormat("reasoning").resolve(tokenizer)
    assert other.opening == "" and other.prompt(tokenizer, QUESTION).endswith("</think>\n\n")


def test_tags_of_the_question_are_no_beginning(with_template):
    for question in ("What is <think>?", "Say </think> and <think>"):
        assert build_prompt(with_template(LOOP + BEGIN), question).endswith(
            f"{question}<|im_end|>\n" + "<|im_start|>assistant\n"
        )


def test_what_is_left_to_write_has_no_second_tag():
    for opening in ("<think>\n", "<think>"):
        asked = PromptFormat("think", opens_reasoning=opening)
        for full in ("<think>\n1</think>", "<think>1</think>", "\n<think>\n1</think>"):
            assert asked.left_to_write(full).strip() == "1</think>"
        assert asked.left_to_write(asked.full_text("\n1</think>")) == "\n1</think>"
    assert PromptFormat("think").left_to_write("<think>1</think>") == "<think>1</think>"


def test_a_student_learns_what_is_left_to_write_after_its_own_prompt(with_template):
    """Also if the teacher's answers begin with another form of the tag, or the data set's solution with none."""
    opens, asks = with_template(begins(r"<think>\n")), with_template(LOOP + BEGIN)
    config = distill_config(tags="think")
    whole = "<think>\n2+3=5</think>\n<answer>5</answer>"
    gold = gold_rows([{"question": QUESTION, "answer": "5", "solution": "2+3=5\n#### 5"}], config)[0]
    for row in ({"completion": whole, "ids": None}, {"completion": whole.replace("\n2", "2"), "ids": None}, gold):
        for tokenizer, text in ((opens, row["completion"][7:].lstrip()), (asks, row["completion"])):
            ids = completion_ids(row, tokenizer, [2], False, config)
            assert tokenizer.decode(ids[:-1]) == text
            full = config.prompt_format(tokenizer).full_text(text)
            assert evaluator.format_reward(full, "think") == 1 and full.count("<think>") == 1


def save_model(folder, template: str) -> str:
    model, tokenizer = llms.load("tiny", "cpu")
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_training_and_evaluation_grade_with_the_templates_tag(tmp_path):
    name, data = save_model(tmp_path / "model", begins(r"<think>\n")), small_dataset(tmp_path / "data")
    settings = dict(model_name=name, dataset_path=data, tags="think", max_steps=1, eval_steps=1, max_prompt_length=500)
    folder = train(tiny_config(tmp_path / "run", **settings, max_completion_length=8, group_size=2))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "test"}
    for row in rows:
        assert row["completion"].startswith("<think>\n") and row["completion"].count("<think>") == 1
        assert row["split"] == "test" or row["prompt"].endswith("<think>\n")


def test_soft_thinking_starts_in_the_prompt_that_opens_the_reasoning(with_template):
    from engine.sampling_params import SoftThinking

    model, tokenizer = llms.load("tiny", "cpu")[0], with_template(begins(r"<reasoning>\n"))
    prompt = DEFAULT_FORMAT.prompt(tokenizer, "Mia has 3 pens.")
    rollout = generate(model, tokenizer, [prompt], max_new_tokens=4, soft=SoftThinking(k=2), seed=0)
    assert rollout.is_soft[0, 0]


# ---------------------------------------------------------------- the date


@pytest.fixture
def later(monkeypatch):
    """later(days): moves the clock to so many days after 1 March, and begins a new process, as it were."""

    def move(days, new_process=True):
        moment = datetime.datetime(2026, 3, 1, 12) + datetime.timedelta(days)

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return moment

        class Calendar(datetime.date):
            @classmethod
            def today(cls):
                return moment.date()

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        monkeypatch.setattr(datetime, "date", Calendar)
        if new_process:
            chat_templates.today.cache_clear()

    yield move
    chat_templates.today.cache_clear()


def test_a_template_gets_the_date_that_it_is_told(with_template, later):
    tokenizer = with_template(DATE + LOOP + BEGIN)
    later(0)
    assert build_prompt(tokenizer, QUESTION).startswith("Today: 01 Mar 2026\n")
    assert build_prompt(tokenizer, QUESTION, date="2024-07-26").startswith("Today: 26 Jul 2024\n")
    assert PromptFormat(date="2024-07-26").prompt(tokenizer, QUESTION).startswith("Today: 26 Jul 2024\n")


def test_a_resumed_run_sees_the_same_prompts_on_another_day(tmp_path, later):
    name, data = save_model(tmp_path / "model", DATE + LOOP + BEGIN), small_dataset(tmp_path / "data")
    settings = dict(
        model_name=name, dataset_path=data, max_prompt_length=500, group_size=2, max_completion_length=8, save_steps=1,
        eval_steps=9,
    )  # fmt: skip

    def dates(folder):
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        return {row["prompt"].partition("\n")[0] for row in rows if row["split"] == "train"}

    later(0)
    folder = train(tiny_config(tmp_path / "run", max_steps=1, **settings))
    assert dates(folder) == {"Today: 01 Mar 2026"}
    assert json.loads((folder / "args.json").read_text())["config"]["prompt_date"] == "2026-03-01"
    later(1)
    train(tiny_config(folder, max_steps=2, resume_from_checkpoint="latest", **settings))
    assert dates(folder) == {"Today: 01 Mar 2026"}
    assert dates(train(tiny_config(tmp_path / "new", max_steps=1, **settings))) == {"Today: 02 Mar 2026"}
    with pytest.raises(ValueError, match="--prompt_date 2026-03-02: .* was made with 2026-03-01"):
        train(tiny_config(folder, max_steps=3, resume_from_checkpoint="latest", prompt_date="2026-03-02", **settings))


def test_a_date_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--prompt_date 'today': give it as YYYY-MM-DD"):
        tiny_config(None, prompt_date="today")


def test_prompts_do_not_change_at_midnight(with_template, later):
    tokenizer = with_template(DATE + LOOP + BEGIN)
    later(0)
    before = build_prompt(tokenizer, QUESTION)
    later(1, new_process=False)
    assert build_prompt(tokenizer, QUESTION) == before
    later(1)
    assert build_prompt(tokenizer, QUESTION) != before


def test_long_prompts_are_measured_with_the_templates_tag(with_template):
    tokenizer = with_template(begins(r"<think>\n"))
    asked, problem = PromptFormat("think"), Problem(QUESTION, "5", "#### 5")
    length = len(tokenizer(asked.prompt(tokenizer, QUESTION), add_special_tokens=False)["input_ids"])
    assert rldatasets.drop_long_prompts([problem], tokenizer, length, asked) == [problem]
    with pytest.raises(ValueError, match="the shortest prompt"):
        rldatasets.drop_long_prompts([problem], tokenizer, length - 1, asked)


def test_the_template_travels_with_a_checkpoint(tmp_path):
    """So that a checkpoint is asked as its run was."""
    name = save_model(tmp_path / "model", begins(r"<think>\n"))
    assert PromptFormat("think").resolve(AutoTokenizer.from_pretrained(name)).opens_reasoning == "<think>\n"
