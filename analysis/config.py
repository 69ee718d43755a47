"""Settings of token_analysis.py: its sections and command line. As tracking/run_config.py, without torch."""

import math
from dataclasses import dataclass

import evaluator
import rldatasets
from tracking.argument_parser import ArgumentParser, parse_flags, read_early
from tracking.run_config import GRPOConfig, Soft, check_date, setting


@dataclass
class TraceSubject:
    _argument_group_name = "what to analyse"
    model_name: str = setting("tiny", "hub name, local folder (a checkpoint too), GGUF file, or a model of this repo")
    prompt: str | None = setting(None, "a question; default: a test problem of the dataset")
    dataset_name: str = setting("arithmetic", " or ".join(rldatasets.DATASETS))
    dataset_path: str | None = setting(None, "a file or folder with problems, in place of the dataset, as for main.py")
    dataset_index: int = setting(0, "which test problem, from 0")
    trust_remote_code: bool = setting(False, "run code that comes with the model")
    tags: str = setting("reasoning", "name of the reasoning block", tuple(evaluator.TAGS))
    prompt_style: str = setting("auto", "chat: the tokenizer's template; plain: R1-Zero's", rldatasets.PROMPT_STYLES)
    prefill: bool = setting(False, "write the opening tag of the reasoning for the model")
    prompt_date: str | None = setting(None, "YYYY-MM-DD, for chat templates that write today's date; default: today's")
    from_trace: str | None = setting(None, "a folder with a trace: draw it again, without a model")
    compare: list[str] | None = setting(None, "two models, or two folders with traces")


@dataclass
class TraceSampling:
    _argument_group_name = "sampling"
    max_new_tokens: int = setting(256, "tokens of the answer, at most")
    temperature: float = setting(1.0, "of sampling; 0 is greedy")
    stop_at_answer: bool = setting(False, "</answer> ends an answer too")
    seed: int = setting(0, "of the sampling")
    num_resamples: int = setting(16, "more answers, for the consistency of paths and answers")
    forks: int | None = setting(None, "strongest forks at which the runner-up is forced; default 3, in soft mode 0")


@dataclass
class TraceOutput:
    _argument_group_name = "output"
    output_dir: str | None = setting(None, "default analysis_results, or the folder of --from_trace")
    top_k: int = setting(50, "likeliest tokens kept of each step")
    save_full: bool = setting(False, "also keep all log-probs: full_logp.npy, 4 bytes x steps x vocabulary")
    skip_individual_pdfs: bool = setting(False, "leave out the figure for every token")
    max_pdfs: int | None = setting(None, "draw it for the first so many tokens only")


PRESETS = {"tiny": {}, "smollm2-135m": dict(model_name="smollm2-135m", dataset_name="two_step", num_resamples=8)}
SECTIONS = (TraceSubject, TraceSampling, Soft, TraceOutput)


@dataclass
class AnalysisConfig(*reversed(SECTIONS)):
    """All settings. Raises ValueError, one line, for impossible values."""

    # The prompt and the sampling are those of main.py.
    prompt_format, stop_tag, rollout_mode = GRPOConfig.prompt_format, GRPOConfig.stop_tag, GRPOConfig.rollout_mode

    def __post_init__(self):
        minima = {"max_new_tokens": 1, "num_resamples": 0, "forks": 0, "top_k": 2, "max_pdfs": 0, "seed": 0}
        minima |= {"dataset_index": 0, "temperature": 0}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value < math.inf:
                raise ValueError(f"--{name} {value}: must be {minimum} or more")
        check_date(self.prompt_date)
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt: the question is empty")
        if self.compare and len(self.compare) != 2:
            raise ValueError(f"--compare takes two models or two folders, not {len(self.compare)}")
        if self.compare and self.from_trace:
            raise ValueError("--from_trace and --compare: choose one (--compare takes trace folders too)")
        if self.num_forks() and not self.num_resamples:
            raise ValueError(f"--forks {self.forks}: needs --num_resamples 1 or more, the continuations of a fork")
        mode = self.rollout_mode()
        if self.forks and (mode.k > 1 or mode.answer_reserve):
            raise ValueError(
                f"--forks {self.forks}: not with soft thinking or --answer_reserve; a fork is continued in plain tokens"
            )

    def num_forks(self) -> int:
        """How many forks are forced."""
        if self.forks is not None:
            return self.forks
        return 0 if self.soft_thinking or self.answer_reserve or not self.num_resamples else 3

    @property
    def max_completion_length(self) -> int:
        return self.max_new_tokens  # main.py's name, which rollout_mode reads

    def sampling(self) -> dict:
        """Options of rollout.generate."""
        return dict(max_new_tokens=self.max_new_tokens, temperature=self.temperature, stop_tag=self.stop_tag())

    def views(self) -> dict:
        """Options of files.write_views."""
        return dict(individual_figures=not self.skip_individual_pdfs, max_figures=self.max_pdfs)

    def answer_of(self, text: str) -> str | None:
        """The completion's answer: its answer block, else the last number in it, else None."""
        text = self.prompt_format().full_text(text)
        return normalize_number(evaluator.extract_answer(text, self.tags) or evaluator.extract_answer_flexible(text))

    def problem(self) -> rldatasets.Problem:
        """--prompt, or the test problem of the dataset. Raises ValueError if there is no such problem."""
        if self.prompt is not None:
            return rldatasets.Problem(self.prompt.strip(), None, None)
        problems = rldatasets.load_problems(self.dataset_name, "test", self.dataset_index + 1, self.dataset_path)
        if len(problems) <= self.dataset_index:
            raise ValueError(f"--dataset_index {self.dataset_index}: there are {len(problems)} test problems")
        return problems[self.dataset_index]


def normalize_number(text: str | None) -> str | None:
    """The same string for equal numbers ("12", "12.0"), so that answers can be counted; other text is unchanged."""
    number = evaluator.parse_number(text)
    return text if number is None else str(number)


def parse_config(arguments: list[str]) -> AnalysisConfig:
    """token_analysis.py's settings. Raises ValueError, one line, on a bad argument."""
    description = "Measure and draw the token probabilities of one answer."
    flags = {"preset": dict(choices=PRESETS, help="a set of defaults")}
    parser = ArgumentParser(SECTIONS, flags, prog="token_analysis.py", description=description)
    parser.set_defaults(**PRESETS[read_early(arguments, flags).preset or "tiny"])
    values = parse_flags(parser, arguments)
    del values["preset"]
    return AnalysisConfig(**values)
