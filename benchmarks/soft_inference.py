"""One model, answering the test problems with and without mixtures of tokens: what training in one mode is worth in the
other. Takes main.py's settings; each of the modes below is measured on the same problems.

The first row is what the others are compared with: the paired difference of their accuracies, problem by problem, with
its 95 % interval. Temperature 0.5 and greedy decoding stand beside the mixtures, because a mixture too makes answers
more alike. A mode's answers are in MODE.jsonl in the output folder: started again, the measurement goes on after them.

    python benchmarks/soft_inference.py --model_name runs/tiny/checkpoints/latest --preset tiny \
        --eval_problems 256 --eval_samples 32 --output_dir runs/soft_inference
"""

import dataclasses
import json
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.statistics import paired_difference, powers_of_two
from tracking import command_line
from tracking.run_config import GRPOConfig, parse_config


def modes(config: GRPOConfig) -> dict[str, dict]:
    """Options of evaluator.evaluate, by the mode's name. Settings of soft thinking beside K and the kind of draws, such
    as the temperature of the weights and when it starts, are the config's."""
    hard = dataclasses.replace(config.rollout_mode(), k=1, sampling="sample", weighting="count")
    sampled = dict(temperature=config.temperature, samples=config.eval_samples)
    result = {
        "hard": sampled | dict(soft=hard),
        "hard, T = 0.5": sampled | dict(soft=hard, temperature=0.5),
        "hard, greedy": dict(soft=hard, temperature=0.0, samples=1),
    }
    for sampling, name in (("sample", "count"), ("gumbel", "gumbel")):
        for k in (2, 3):
            result[f"soft, K = {k}, {name}"] = sampled | dict(soft=dataclasses.replace(hard, k=k, sampling=sampling))
    return result


def describe(result: dict, hard: dict) -> dict:
    """The numbers of a row of the table. result, hard: of evaluator.evaluate, with their records."""
    records = result["records"]
    row = {name: value for name, value in result.items() if name != "records"}
    difference = paired_difference(solved(result), solved(hard))
    row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
    if soft_steps := sum(record["soft_steps"] for record in records):
        # A row's mean is over all its steps, and on the hard ones the readable token has the whole weight.
        beyond = sum(record["length"] * (record["top_weight"] - 1) + record["soft_steps"] for record in records)
        row["top_weight_soft"] = beyond / soft_steps
    return row


def solved(result: dict) -> list[float]:
    """Of each problem, the share of right answers."""
    right, samples = [record["correct"] for record in result["records"]], result["samples"]
    return [fmean(right[first : first + samples]) for first in range(0, len(right), samples)]


def table(rows: dict[str, dict], config: GRPOConfig) -> str:
    """The rows as text."""
    ks = powers_of_two(config.eval_samples) if config.eval_samples > 1 else []
    first, width = next(iter(rows.values())), max(map(len, rows))
    lines = [
        f"{config.model_name}: {first['n']} test problems, {config.eval_samples} answers to each at temperature "
        f"{config.temperature:g} unless said otherwise",
        f"pass@1 with its 95 % Wilson interval over problems; its paired difference from {next(iter(rows))!r}; "
        "readable: weight of the readable token at soft positions",
        "",
        f"{'':{width}} {'pass@1':>7} {'interval':>16} {'difference':>24}"
        + "".join(f" {f'pass@{k}':>8}" for k in ks)
        + f" {'format':>7} {'tokens':>7} {'soft':>6} {'readable':>9}",
    ]
    for name, r in rows.items():
        interval = f"[{r['accuracy_low']:.1%}, {r['accuracy_high']:.1%}]"
        difference = f"{r['difference']:+.1%} [{r['difference_low']:+.1%}, {r['difference_high']:+.1%}]"
        passed = (f"{r[f'pass@{k}']:.1%}" if f"pass@{k}" in r else "-" for k in ks)
        readable = f"{r['top_weight_soft']:.3f}" if "top_weight_soft" in r else "-"
        lines.append(
            f"{name:{width}} {r['accuracy']:7.1%} {interval:>16} {difference if r is not first else '-':>24}"
            + "".join(f" {value:>8}" for value in passed)
            + f" {r['format_rate']:7.1%} {r['length']:7.1f} {r['soft_share']:6.1%} {readable:>9}"
        )
    return "\n".join(lines)


def main(config: GRPOConfig) -> None:
    import evaluator
    from tracking import run_folder, summaries

    if config.eval_problems < 2:
        raise ValueError(f"--eval_problems {config.eval_problems}: an interval of differences needs 2 or more")
    config, folder, model, tokenizer, problems = summaries.prepare_evaluation(config)
    rows, hard = {}, None
    for name, options in modes(config).items():
        options["soft"].check_vocabulary(model.config.vocab_size)
        log = run_folder.JsonLines(folder / f"{name.replace(' ', '').replace(',', '_')}.jsonl")
        result = evaluator.evaluate(
            model, tokenizer, problems, log=log, progress=True, **options, **config.answering(tokenizer)
        )
        hard = hard or result
        rows[name] = describe(result, hard)
        (folder / "soft_inference.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = table(rows, config)
    (folder / "soft_inference.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nIn {folder}: soft_inference.txt, soft_inference.json, and every answer in MODE.jsonl")


if __name__ == "__main__":
    command_line.run_script(main, command_line.parse_or_exit(parse_config))
