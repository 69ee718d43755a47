"""Token probabilities of one answer: sampled as in training, measured at every step over the whole vocabulary, drawn.

    python token_analysis.py --output_dir analysis_results           # the embedded model; no network, no GPU
    python token_analysis.py --model_name runs/tiny/checkpoints/latest --prompt "Mia has 3 pens. ..." --soft_thinking
    python token_analysis.py --from_trace analysis_results           # draws everything again, without a model
    python token_analysis.py --compare tiny runs/tiny/checkpoints/latest --output_dir before_and_after
    python token_analysis.py --compare normal_trace soft_trace       # two folders: from their data alone

rollout.generate samples an answer, and the model reads it once more, soft mixtures included: all numbers come from this
second pass. The result, a trace, is saved, and all tables and pictures are made from the saved files:

    meta.json, trace.npz, trace.jsonl   the trace: settings and answers; arrays; tokens with their bytes and top-k
    tokens.csv                          one row per step, all scalars (`Trace.columns` defines them)
    summary.json                        means by part of the text, consistency, forks, soft steps
    trace_openai.json                   log-probs in the format of OpenAI's API, for tools that read it
    *.png, token_pdfs/, trace.html      pictures, one figure per token, a page to browse

Each distribution is measured twice: at temperature 1, and (suffix `_t`) at the sampling temperature; for greedy
decoding that is 1, as in rollout.py. Units are nats; bits = nats / ln 2.

This file has the settings and the command line. The work is done in analysis/, to be read in this order: measures.py
(the formulas), trace.py (what a trace has), recording.py (sampling and measuring one), files.py (saving, loading,
tables), comparison.py; then pictures.py, token_figures.py, comparison_pictures.py and page.py, which draw.

Left out on purpose: hidden states and attention (the subject is what a model says, not why), other samplers.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import evaluator
import llms
import rldatasets
from analysis.comparison import compare_models, compare_traces
from analysis.files import load_trace, save_trace, writable_folder, write_views
from analysis.recording import normalize_number, record
from tracking.run_config import ArgumentParser, GRPOConfig, Soft, setting


@dataclass
class TraceSubject:
    _argument_group_name = "what to analyse"
    model_name: str = setting("tiny", "hub name, local folder (a checkpoint too), or an embedded model")
    prompt: str | None = setting(None, "a question; default: a test problem of the dataset")
    dataset_name: str = setting("arithmetic", " or ".join(rldatasets.DATASETS))
    dataset_path: str | None = setting(None, "JSON lines in GSM8K's shape, in place of the dataset")
    dataset_index: int = setting(0, "which test problem, from 0")
    trust_remote_code: bool = setting(False, "run code that comes with the model")
    tags: str = setting("reasoning", "name of the reasoning block", tuple(evaluator.TAGS))
    prompt_style: str = setting("auto", "chat: the tokenizer's template; plain: R1-Zero's", rldatasets.PROMPT_STYLES)
    prefill: bool = setting(False, "write the opening tag of the reasoning for the model")
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


def run(config: AnalysisConfig) -> Path:
    """Records, draws or compares, as the settings say; returns the folder with the results."""
    are_traces = [Path(name, "meta.json").is_file() for name in config.compare or ()]
    if len(set(are_traces)) == 2:
        raise ValueError(f"--compare {' '.join(config.compare)}: one is a trace; give two models or two traces")
    trace = load_trace(config.from_trace) if config.from_trace else None
    output = writable_folder(config.output_dir or config.from_trace or "analysis_results")
    if any(are_traces):
        compare_traces(config.compare, output)
    elif config.compare:
        compare_models(config.compare, config.problem(), config, output)
    else:
        if trace is None:
            problem = config.problem()
            record(*llms.load(config.model_name, trust_remote_code=config.trust_remote_code), problem, config, output)
        elif not output.samefile(config.from_trace):
            save_trace(trace, output)
        write_views(load_trace(output), output, **config.views())
    return output


def main(arguments: list[str] | None = None) -> None:
    description = "Measure and draw the token probabilities of one answer."
    parser = ArgumentParser(SECTIONS, prog="token_analysis.py", description=description, allow_abbrev=False)
    try:
        output = run(AnalysisConfig(**vars(parser.parse_args(arguments))))
    except ValueError as error:
        print(f"token_analysis.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"in {output}/: {', '.join(sorted(path.name for path in output.iterdir()))}")


if __name__ == "__main__":
    main()
