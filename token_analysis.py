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

The work is done in analysis/, to be read in this order: measures.py (the formulas), trace.py (what a trace has),
recording.py (sampling and measuring one), files.py (saving, loading, tables), comparison.py; then pictures.py,
token_figures.py, comparison_pictures.py and page.py, which draw. config.py has the settings.

Left out on purpose: hidden states and attention (the subject is what a model says, not why), other samplers.
"""

from analysis.config import AnalysisConfig, parse_config
from tracking import command_line

if __name__ == "__main__":  # --help and refused flags are answered before torch is imported, which takes seconds
    CONFIG = command_line.parse_or_exit(parse_config)

from pathlib import Path

import llms
from analysis.comparison import compare_models, compare_traces
from analysis.files import load_trace, save_trace, writable_folder, write_views
from analysis.recording import record
from tracking import checkpoints


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
            name = checkpoints.resolve_model_name(config.model_name)
            record(*llms.load(name, trust_remote_code=config.trust_remote_code), problem, config, output)
        elif not output.samefile(config.from_trace):
            save_trace(trace, output)
        write_views(load_trace(output), output, **config.views())
    return output


def main(config: AnalysisConfig) -> None:
    output = run(config)
    print(f"in {output}/: {', '.join(sorted(path.name for path in output.iterdir()))}")


if __name__ == "__main__":
    command_line.run_script(main, CONFIG)
