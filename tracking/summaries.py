"""Results as text: an evaluation in one line, a run on one screen, a model's evaluation as a table (--eval_only)."""

import dataclasses
import json
import textwrap
from pathlib import Path

import evaluator
import llms
import rldatasets
from engine import distributed
from tracking import checkpoints, plotter, run_folder

SHOWN = {  # of an evaluation, after its accuracy
    "accuracy_greedy": "greedy {:.1%}",
    "format_rate": "format {:.1%}",
    "length": "{:.1f} tokens",
    "win_random": "wins {:.1%} against random moves",
    "win_start": "{:.1%} against the start",
    "held_perfect": "holds {:.1%} against perfect play",
    "judge_random": "judge with random reveals {:.1%}",
    "illegal": "illegal {:.1%}",
}


def describe_evaluation(when: str, metrics: dict) -> str:
    """One line about an evaluation."""
    r = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    line = f"{when}: accuracy {r['accuracy']:.1%} [{r['accuracy_low']:.1%}, {r['accuracy_high']:.1%}]"
    for name, shown in SHOWN.items():
        line += f", {shown.format(r[name])}" if name in r else ""
    return f"{line} (test, n = {r['n']})"


def print_run_summary(folder: Path, seconds: float) -> None:
    """The end of a run on one screen: the same problems answered before and after, accuracies, and where things are."""
    evaluations = [row for row in plotter.read_metrics(folder) if "eval/accuracy" in row]
    samples = [row for row in run_folder.JsonLines(folder / "samples.jsonl").read() if row["split"] == "test"]
    for step in (evaluations[0]["step"], evaluations[-1]["step"]):
        print(f"\n--- the first two test problems, answered after step {step}")
        for sample in [row for row in samples if row["step"] == step][:2]:
            print(f"{sample['question']}\n{textwrap.indent(sample['completion'], '    ')}")
            print(f"    [gold {sample['gold']}: {'right' if sample['correct'] else 'wrong'}]")
    print("\n" + describe_evaluation("before", evaluations[0]))
    print(describe_evaluation("after ", evaluations[-1]))
    print(f"{seconds:.0f} s. In {folder}: report.html, plots/, metrics.jsonl, samples.jsonl, checkpoints/latest")


def print_dry_run(config) -> None:
    """Prints the effective settings, as JSON that --config reads, and the first prompt of the first step.

    Loads the tokenizer and the problems, no weights. Raises ValueError as a run would.
    """
    problems = rldatasets.load_problems(config.dataset_name, "train", path=config.dataset_path)
    tokenizer = llms.load_tokenizer(checkpoints.resolve_model_name(config.model_name), config.trust_remote_code)
    prompt_format = config.prompt_format(tokenizer)
    problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, prompt_format)
    first = rldatasets.problems_of_step(problems, 1, config.problems_per_step, config.seed)[0]
    print(json.dumps(dataclasses.asdict(config) | {"dry_run": False}, indent=1))
    print(f"\n--- the first prompt (gold {first.answer})\n{prompt_format.prompt(tokenizer, first.question)}")


def prepare_evaluation(config):
    """-> config with its prompt's date, folder, model, tokenizer, test problems. config: run_config.GRPOConfig.

    The folder is made, or it holds an evaluation with the same settings, which can go on. Raises ValueError, one line.
    """
    folder = Path(config.output_dir or f"runs/eval-{Path(config.model_name).name}").expanduser()
    config = run_folder.fix_prompt_date(config, *([] if config.overwrite_output_dir else [folder]))
    problems = rldatasets.load_problems(config.dataset_name, "test", config.eval_problems, config.dataset_path)
    name = checkpoints.resolve_model_name(config.model_name)
    model, tokenizer = llms.load(name, dtype=llms.sampling_dtype(), trust_remote_code=config.trust_remote_code)
    problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, config.prompt_format())
    settings = dataclasses.asdict(config)
    if config.overwrite_output_dir or not (folder / "args.json").exists():
        distributed.run_on_main(run_folder.create_folder, str(folder), config.overwrite_output_dir)
        distributed.run_on_main(run_folder.write_args, folder, settings, model.device)
    run_folder.check_same_config(folder, settings, may_differ=("overwrite_output_dir", "output_dir"))
    return config, folder, model, tokenizer, problems


def evaluate_only(config) -> Path:
    """Measures a model on the test split, greedy, sampled and, with soft thinking, in mixtures, and prints a table;
    returns the folder with eval.json.

    config: run_config.GRPOConfig. Each batch's answers are logged as soon as they are graded: started again with the
    same settings, the evaluation continues after them.
    """
    config, folder, model, tokenizer, problems = prepare_evaluation(config)
    soft = config.rollout_mode()
    hard = dataclasses.replace(soft, k=1)
    modes = [("greedy", 0.0, 1, hard), ("sampled", config.temperature, config.eval_samples, hard)]
    modes += [("soft", config.temperature, config.eval_samples, soft)] if soft.k > 1 else []
    table = {}
    for name, temperature, samples, mode in modes:
        log = run_folder.JsonLines(folder / f"{name}.jsonl")
        table[name] = evaluator.evaluate(
            model, tokenizer, problems, samples=samples, temperature=temperature, soft=mode, progress=True, log=log,
            **config.answering(tokenizer),
        )  # fmt: skip
        del table[name]["records"]
    if distributed.is_main_process():
        (folder / "eval.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"\n{config.model_name} on {len(problems)} test problems, 95 % Wilson intervals:")
    print(f"{'':8} {'accuracy':>8} {'interval':>16} {'flexible':>9} {'format':>7} {'tokens':>7} {'cut off':>8}")
    for name, r in table.items():
        interval = f"[{r['accuracy_low']:.1%}, {r['accuracy_high']:.1%}]"
        print(
            f"{name:8} {r['accuracy']:8.1%} {interval:>16} {r['accuracy_flexible']:9.1%} {r['format_rate']:7.1%} "
            f"{r['length']:7.1f} {r['truncated_rate']:8.1%}"
            + "".join(f"  {key} {value:.1%}" for key, value in r.items() if "@" in key)
        )
    print(f"In {folder}: eval.json, and every answer in {', '.join(f'{name}.jsonl' for name in table)}")
    return folder
