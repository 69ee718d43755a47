"""Prompts through a tokenizer's own chat template, whatever that template does with a system message, a date, or the
beginning of the answer.

A template is a program that comes with a model. What it does is found out once, with a question of ours:
  it refuses or ignores a system message     the instruction goes into the user's turn
  it writes today's date                     it gets the date that it is told
  it begins the answer with a reasoning tag  `opening` says so, as R1's distilled models and Qwen3 do it
  it closes the reasoning at once            it is asked to think (`enable_thinking`), or refused
  it fails, or writes something else at each use   refused, in one line
"""

import datetime
import functools
import re
from dataclasses import dataclass, field

# The template of the embedded models, which are trained on bare questions and know the form of the answer by
# themselves. Every other template must show the instruction.
EMBEDDED_TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'system' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PROBE = "How many are 12 and 34?"

# A tag that a template may begin an answer with: <think>, <reasoning>, [THINK], and their closing ones.
REASONING_TAG = re.compile(r"[<\[◁](?P<closes>/?)(?P<name>[\w:-]*(?:think|thought|reason)[\w:-]*)[>\]▷]", re.IGNORECASE)

# Names by which templates let a model think that would not: Qwen3 and its kin, DeepSeek V3.1.
THINKING = {"enable_thinking": True, "thinking": True}


def in_system_turn(instruction: str, question: str) -> list[dict]:
    return [{"role": "system", "content": instruction}, {"role": "user", "content": question}]


def in_user_turn(instruction: str, question: str) -> list[dict]:
    return [{"role": "user", "content": f"{instruction}\n\n{question}"}]


def in_both_turns(instruction: str, question: str) -> list[dict]:
    """For a template that needs a system message and leaves it out."""
    return [{"role": "system", "content": instruction}, *in_user_turn(instruction, question)]


def in_parts(instruction: str, question: str) -> list[dict]:
    """For a template that takes a list of parts, as those of multimodal models do."""
    return [{"role": "user", "content": [{"type": "text", "text": f"{instruction}\n\n{question}"}]}]


LAYOUTS = (in_system_turn, in_user_turn, in_both_turns, in_parts)


@dataclass(frozen=True)
class Template:
    """How a tokenizer's template is used."""

    layout: object  # one of LAYOUTS
    opening: str  # how it begins the answer: a reasoning tag and what follows it, or nothing
    options: dict = field(default_factory=dict)  # that the template is given


def chat_prompt(tokenizer, instruction: str, question: str, *, tags: str, date: str | None = None) -> str:
    """The prompt for a question. date: YYYY-MM-DD, what the template takes for today; default: the day on which this
    process asked first. Raises ValueError, one line, if the template cannot be used."""
    template = template_of(tokenizer, instruction, tags, date)
    return _render(tokenizer, template.layout(instruction, question), date, template.options)


def template_of(tokenizer, instruction: str, tags: str, date: str | None = None) -> Template:
    """What the tokenizer's template does. Raises ValueError, one line, if it cannot be used."""
    return _template_of(tokenizer, str(tokenizer.chat_template), instruction, tags, date or today())


@functools.cache
def today() -> str:
    """The day on which this process asked first: its prompts stay the same past midnight."""
    return datetime.date.today().isoformat()


@functools.lru_cache(maxsize=64)
def _template_of(tokenizer, template: str, instruction: str, tags: str, date: str) -> Template:
    layout = _layout(tokenizer, template, instruction, date)
    messages = layout(instruction, PROBE)
    for options in ({}, THINKING):
        begun = _beginning_of_the_answer(tokenizer, messages, date, options)
        last = list(REASONING_TAG.finditer(begun))[-1:]
        if not last or (last[0]["closes"] and last[0]["name"] != tags):
            return Template(layout, "", options)
        if not last[0]["closes"]:
            return Template(layout, _own_opening(begun, last[0], tags), options)
    raise ValueError(
        f"the chat template ends the reasoning, {begun.strip()[-40:]!r}, before the model can write any: choose other "
        "--tags, or --prompt_style plain"
    )


def _own_opening(begun: str, tag: re.Match, tags: str) -> str:
    if tag[0] == f"<{tags}>":
        return begun[tag.start() :]
    advice = f"--tags {tag['name']}" if tag[0] in ("<think>", "<reasoning>") else "--prompt_style plain"
    raise ValueError(f"the chat template begins the answer with {tag[0]}, not with <{tags}>: choose {advice}")


def _layout(tokenizer, template: str, instruction: str, date: str):
    """The first of LAYOUTS in which the prompt has the instruction and the question."""
    errors = []
    for layout in LAYOUTS:
        try:
            prompt = _render(tokenizer, layout(instruction, PROBE), date, {})
        except ValueError as error:
            errors.append(error)
            continue
        if PROBE in prompt and (instruction in prompt or template == EMBEDDED_TEMPLATE):
            if prompt != _render(tokenizer, layout(instruction, PROBE), date, {}):
                raise ValueError("the chat template writes another prompt each time: choose --prompt_style plain")
            return layout
    if len(errors) == len(LAYOUTS):
        raise errors[1]  # of the plainest layout
    raise ValueError("the chat template leaves out the question or the instruction: choose --prompt_style plain")


def _beginning_of_the_answer(tokenizer, messages, date: str, options: dict) -> str:
    """What the template writes for the model behind the conversation."""
    prompt = _render(tokenizer, messages, date, options)
    try:
        conversation = _render(tokenizer, messages, date, options, add_generation_prompt=False)
    except ValueError:
        conversation = None
    if conversation is not None and prompt.startswith(conversation):
        return prompt[len(conversation) :]
    return prompt.rpartition(PROBE)[2]


def _render(tokenizer, messages, date: str | None, options: dict, add_generation_prompt: bool = True) -> str:
    moment = datetime.datetime.fromisoformat(date or today())
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            strftime_now=moment.strftime,
            **options,
        )
    except Exception as error:  # a program of somebody else; the reader needs one way out
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the chat template fails ({type(error).__name__}: {reason}): repair it, or choose --prompt_style plain"
        ) from error
