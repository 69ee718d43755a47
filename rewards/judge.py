"""A judge as a reward: another model says which of two answers to a question is better.

    python main.py --rewards judge:1,format:0.5 --judge_model Qwen/Qwen2.5-0.5B-Instruct
    python main.py --rewards judge:1 --judge_url http://localhost:8000/v1 --judge_name my-model     # OpenAI-compatible

Every pair of a group's answers is shown in both orders. An answer that is preferred both times wins; if the verdict
follows the order, the pair is a tie, half a win for each. The reward is the share of wins. Groups larger than MAX_ALL
are judged as a ring, each answer against the next, so that the cost grows with the group and not with its square.

A verdict that cannot be had (a time-out, an error of the server, neither letter in the reply) is asked for again, then
counted and left out with its pair. An answer without any judged pair gets 0.5, the mean, so it teaches nothing.

Logged as judge/...: ties, position bias, verdicts that failed, agreement with the gold answers (docs/metrics.md).
A judge is a weak reward: read these, and the accuracy beside its reward, before believing a curve.

Left out on purpose: scores of single answers, which drift more than comparisons; examples in the prompt.
"""

import concurrent.futures
import importlib.util
import os
import re
import zlib
from collections.abc import Callable

MAX_ALL = 6  # answers of a group of which all pairs are judged: 15 pairs, 30 verdicts
LETTERS = ("A", "B")
PROMPT = """Which answer to the question is better: A or B? Say only the letter.

Question: {question}

Answer A: {first}

Answer B: {second}

The better answer is"""

Question = tuple[str, str, str]  # question, the answer shown first, the answer shown second


class Judge:
    """The reward `judge` of evaluator.grade.

    verdicts: list of Questions -> for each, 0 (the answer shown first is better), 1, or None (no verdict).
    """

    def __init__(self, verdicts: Callable[[list[Question]], list[int | None]]):
        self.verdicts = verdicts

    def __call__(self, groups: list[list[dict]]) -> list[list[float]]:
        """groups: lists of records with question, completion and correct -> shares of wins. Adds to each record
        "judge", counts over the pairs of which it is the first answer."""
        pairs = [(group, a, b) for group in groups for a, b in pairs_of(len(group))]
        asked = [
            (group[a]["question"], group[first]["completion"], group[second]["completion"])
            for group, a, b in pairs
            for first, second in ((a, b), (b, a))
        ]
        verdicts = self.verdicts(asked) if asked else []
        wins = [[[] for _ in group] for group in groups]
        index = {id(group): number for number, group in enumerate(groups)}
        for group in groups:
            for record in group:
                record["judge"] = dict.fromkeys(COUNTS, 0)
        for (group, a, b), forward, backward in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
            counts = group[a]["judge"]
            given = [verdict for verdict in (forward, backward) if verdict is not None]
            counts["asked"] += 2
            counts["verdicts"] += len(given)
            counts["first"] += given.count(0)
            if len(given) < 2:
                continue
            share = (1 - forward + backward) / 2  # of the pair's win that a gets: 1, 1/2 for a tie, 0
            wins[index[id(group)]][a].append(share)
            wins[index[id(group)]][b].append(1 - share)
            counts["pairs"] += 1
            counts["ties"] += share == 0.5
            if group[a]["correct"] != group[b]["correct"]:
                counts["decidable"] += 1
                counts["agreed"] += share if group[a]["correct"] else 1 - share
        return [[sum(own) / len(own) if own else 0.5 for own in of_group] for of_group in wins]


# asked, verdicts (that came), first (of them, for the answer shown first), pairs (with both verdicts), ties;
# decidable (pairs of a right and a wrong answer), agreed (the right one won; half for a tie)
COUNTS = ("asked", "verdicts", "first", "pairs", "ties", "decidable", "agreed")


def pairs_of(size: int) -> list[tuple[int, int]]:
    """Which answers of a group are compared: all pairs up to MAX_ALL answers, else each with the next of a ring."""
    if size <= MAX_ALL:
        return [(a, b) for a in range(size) for b in range(a + 1, size)]
    return [(a, (a + 1) % size) for a in range(size)]


def metrics(records: list[dict]) -> dict[str, float]:
    """The judge/... metrics of a step; none if no judge was asked. What nothing defines is left out."""
    if "judge" not in records[0]:
        return {}
    total = {name: sum(record["judge"][name] for record in records) for name in COUNTS}
    shares = {
        "judge/failed": (total["asked"] - total["verdicts"], total["asked"]),
        "judge/position_bias": (total["first"] - total["verdicts"] / 2, total["verdicts"]),
        "judge/ties": (total["ties"], total["pairs"]),
        "judge/agreement": (total["agreed"], total["decidable"]),
    }
    return {name: part / whole for name, (part, whole) in shares.items() if whole}


def make_judge(config) -> Judge:
    """The judge of a run. config: GRPOConfig. Raises ValueError, one line, if there is none or it cannot be loaded."""
    if config.judge_url:
        return Judge(ServerVerdicts(config.judge_url, config.judge_name, config.judge_timeout, config.judge_retries))
    if config.judge_model == "random":
        return Judge(random_verdicts)
    return Judge(ModelVerdicts(config.judge_model, config))


def check_judge(config) -> None:
    """Raises ValueError, one line, for settings of a judge that do not go together. Loads nothing."""
    asked = [name for name in ("judge_model", "judge_url") if getattr(config, name)]
    if len(asked) != 1:
        given = " and ".join(f"--{name}" for name in asked) or "neither"
        raise ValueError(f"--rewards judge: needs one of --judge_model and --judge_url, got {given}")
    if config.judge_url and not config.judge_name:
        raise ValueError("--judge_url: needs --judge_name, the server's name of the model")
    if config.judge_url and importlib.util.find_spec("openai") is None:
        raise ValueError("--judge_url: the package openai is not here (pip install openai)")


def random_verdicts(questions: list[Question]) -> list[int]:
    """A coin for each question, the same one whenever it is asked: the control of every other judge."""
    return [zlib.crc32("\0".join(question).encode()) >> 7 & 1 for question in questions]


# ---------------------------------------------------------------- a model here


class ModelVerdicts:
    """Verdicts of a local model: the letter that it finds likelier as its next token. It never fails to answer."""

    def __init__(self, model_name: str, config):
        import llms

        self.model, self.tokenizer = llms.load(
            model_name, dtype=llms.sampling_dtype(), trust_remote_code=config.trust_remote_code
        )
        self.model.requires_grad_(False)
        self.tokens_per_batch = config.tokens_per_micro_batch
        self.letters = verdict_ids(self.tokenizer)

    def __call__(self, questions: list[Question]) -> list[int]:
        logprobs = self.logprobs(questions)
        return (logprobs[:, 1] > logprobs[:, 0]).long().tolist()

    def logprobs(self, questions: list[Question]):
        """Log-probs of the two letters after each question's prompt, differentiable where the model is: (n, 2)."""
        import torch

        import llms

        rollout = verdict_rollout(self.tokenizer, questions, self.letters, self.model.device)
        limit = llms.max_positions(self.model.config)
        if (longest := max(map(len, rollout.prompt_ids))) > limit:
            raise ValueError(f"judge: a prompt has {longest} tokens, the judge's model has {limit} positions")
        batches = llms.micro_batches(rollout, range(len(questions)), self.tokens_per_batch)
        parts = [llms.completion_logprobs(self.model, rollout, rows=rows)[:, 0] for rows in batches]  # in order
        return torch.cat(parts)


def verdict_ids(tokenizer) -> tuple[int, int]:
    """The tokens that stand for the two letters after the prompt: with a space before them after plain text."""
    texts = LETTERS if tokenizer.chat_template else [f" {letter}" for letter in LETTERS]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in texts]
    if ids[0] == ids[1]:
        raise ValueError("judge: the model's tokenizer does not tell A and B apart")
    return tuple(ids)


def verdict_prompt(tokenizer, question: Question) -> str:
    text = PROMPT.format(question=question[0], first=question[1], second=question[2])
    if not tokenizer.chat_template:
        return (tokenizer.bos_token or "") + text
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def verdict_rollout(tokenizer, questions: list[Question], letters: tuple[int, int], device):
    """The questions as a Rollout with one position, at which both letters are draws: the pass that trains a policy
    gives the log-probs of both."""
    import torch

    from rollout import Rollout

    prompts = [verdict_prompt(tokenizer, question) for question in questions]
    n = len(prompts)
    ones = torch.ones(n, 1, dtype=torch.bool, device=device)
    both = ones[..., None].expand(n, 1, 2)
    return Rollout(
        prompt_ids=[torch.tensor(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]],
        draws=torch.tensor(letters, device=device).expand(n, 1, 2),
        weights=both / 2,
        draw_mask=both,
        logprobs=torch.zeros(n, 1, 2, device=device),
        trace_ids=torch.full((n, 1), letters[0], device=device),
        completion_mask=ones,
        is_soft=ones,
        entropy=torch.zeros(n, 1, device=device),
        finish=["length"] * n,
        texts=[""] * n,
    )


# ---------------------------------------------------------------- a server


class ServerVerdicts:
    """Verdicts of an OpenAI-compatible server, several requests at a time. The key is in OPENAI_API_KEY, if it asks."""

    def __init__(self, url: str, name: str, timeout: float, retries: int, workers: int = 16):
        """timeout: seconds of one request. retries: after a request that gave no verdict."""
        import openai

        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=0)
        self.errors, self.name, self.retries, self.workers = openai.OpenAIError, name, retries, workers

    def __call__(self, questions: list[Question]) -> list[int | None]:
        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.ask, questions))

    def ask(self, question: Question) -> int | None:
        text = PROMPT.format(question=question[0], first=question[1], second=question[2])
        for _ in range(1 + self.retries):
            try:
                reply = self.client.chat.completions.create(
                    model=self.name, messages=[{"role": "user", "content": text}], temperature=0
                )
                verdict = read_verdict(reply.choices[0].message.content)
            except (self.errors, ValueError, LookupError, AttributeError, TypeError):  # also what is no such reply
                verdict = None
            if verdict is not None:
                return verdict
        return None


def read_verdict(text: str | None) -> int | None:
    """0 for A, 1 for B: the letter that the reply begins with, or the only one of the two in it. Else None: "Answer A
    is better than answer B" would have to be understood."""
    text = (text or "").strip()
    begins = re.match(r"\W*([AB])\W*(?:$|\n|[.:)] )", text)  # "A", "**B**", "A. It is shorter."
    found = {begins[1]} if begins else set(re.findall(r"(?<![\w'])([AB])(?![\w'])", text))
    return LETTERS.index(found.pop()) if len(found) == 1 else None
