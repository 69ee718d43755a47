"""rewards/judge.py: pairs in both orders, what is counted, a local model, and a server that misbehaves."""

import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from small_runs import metrics_of, small_dataset, tiny_config

import main
from rewards import judge
from rewards.judge import Judge, ModelVerdicts, ServerVerdicts
from tracking.run_config import parse_config


def group_of(lengths, right=()) -> list[dict]:
    texts = ["x" * n for n in lengths]
    return [{"question": "Q?", "completion": text, "correct": i in right} for i, text in enumerate(texts)]


def longer(questions):
    """Prefers the longer answer; of equally long ones, the one that is shown first."""
    return [int(len(second) > len(first)) for _, first, second in questions]


# ---------------------------------------------------------------- pairs and shares


@pytest.mark.parametrize("size", [2, 5, judge.MAX_ALL, judge.MAX_ALL + 1, 16])
def test_small_groups_are_judged_in_full_and_large_ones_as_a_ring(size):
    pairs = judge.pairs_of(size)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) and all(a != b for a, b in pairs)
    assert len(pairs) == (size * (size - 1) // 2 if size <= judge.MAX_ALL else size)
    assert {answer for pair in pairs for answer in pair} == set(range(size))


def test_shares_of_wins_against_a_plain_loop():
    rng = random.Random(0)
    groups = [group_of([rng.randrange(4) for _ in range(size)], right={0, 2}) for size in (2, 4, 6, 9)]
    for group, shares in zip(groups, Judge(longer)(groups), strict=True):
        for i, record in enumerate(group):
            others = [b if a == i else a for a, b in judge.pairs_of(len(group)) if i in (a, b)]
            own = len(record["completion"])
            scores = [(own > len(group[o]["completion"])) + 0.5 * (own == len(group[o]["completion"])) for o in others]
            assert shares[i] == pytest.approx(sum(scores) / len(scores))


def test_both_orders_make_a_judge_of_positions_worthless():
    group = group_of([1, 2, 3], right={2})
    assert Judge(lambda asked: [0] * len(asked))([group]) == [[0.5] * 3]
    logged = judge.metrics(group)
    assert logged == {
        "judge/failed": 0.0, "judge/position_bias": 0.5, "judge/ties": 1.0, "judge/agreement": 0.5
    }  # fmt: skip


def test_agreement_counts_pairs_of_a_right_and_a_wrong_answer():
    group = group_of([3, 1, 2], right={0, 1})  # the longer is right in (0, 2), wrong in (1, 2); (0, 1) does not count
    Judge(longer)([group])
    assert judge.metrics(group)["judge/agreement"] == 0.5 and judge.metrics(group)["judge/ties"] == 0
    assert "judge/agreement" not in (Judge(longer)([same := group_of([1, 2])]) and judge.metrics(same))
    assert judge.metrics([{"reward": 1.0}]) == {}


def test_verdicts_that_are_missing_are_counted_and_left_out():
    def forgetful(asked):
        return [
            None if "xxx" in (first, second) else v for (_, first, second), v in zip(asked, longer(asked), strict=True)
        ]

    group = group_of([1, 2, 3])
    assert Judge(forgetful)([group]) == [[0.0, 1.0, 0.5]]
    assert judge.metrics(group)["judge/failed"] == pytest.approx(4 / 6)
    group = group_of([1, 2])
    assert Judge(lambda asked: [None] * len(asked))([group]) == [[0.5, 0.5]]
    assert judge.metrics(group) == {"judge/failed": 1.0}
    assert Judge(lambda asked: [0, None])([group]) == [[0.5, 0.5]], "one order alone decides nothing"


def test_the_random_judge_is_a_fair_coin_that_remembers():
    asked = [("Q?", str(i), str(i + 1)) for i in range(2000)]
    verdicts = judge.random_verdicts(asked)
    assert verdicts == judge.random_verdicts(asked) and 0.45 < sum(verdicts) / 2000 < 0.55


# ---------------------------------------------------------------- a local model


def test_a_models_verdicts_are_those_of_its_own_forward_pass():
    """Batched and packed, against one plain pass per question."""
    verdicts = ModelVerdicts("tiny", tiny_config("unused", tokens_per_micro_batch=300))
    asked = [("How many?", "x" * n, "<answer>3</answer>" * (n % 3)) for n in range(7)]
    logprobs = verdicts.logprobs(asked)
    for row, question in enumerate(asked):
        ids = verdicts.tokenizer(judge.verdict_prompt(verdicts.tokenizer, question), return_tensors="pt")["input_ids"]
        expected = verdicts.model(ids).logits[0, -1].log_softmax(-1)[list(verdicts.letters)]
        assert torch.allclose(logprobs[row], expected, atol=1e-4)
    assert verdicts(asked) == [int(b > a) for a, b in logprobs.tolist()]
    assert [verdicts.tokenizer.decode(i).strip() for i in verdicts.letters] == ["A", "B"]


def test_with_a_chat_template_the_letters_come_first(qwen):
    ids = judge.verdict_ids(qwen)
    assert [qwen.decode(i) for i in ids] == ["A", "B"]
    assert judge.verdict_prompt(qwen, ("Q?", "1", "2")).endswith("<|im_start|>assistant\n")


def test_a_prompt_that_the_judge_cannot_read_is_refused():
    verdicts = ModelVerdicts("tiny", tiny_config("unused"))
    with pytest.raises(ValueError, match="tokens, the judge's model has 512 positions"):
        verdicts([("Q?", "7 " * 600, "")])


# ---------------------------------------------------------------- a server


class FakeServer(ThreadingHTTPServer):
    """An OpenAI-compatible server whose answer to its n-th request is behaviour(n, text)."""

    def __init__(self, behaviour):
        self.behaviour, self.requests, self.lock = behaviour, [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            number = len(self.server.requests)
        status, content = self.server.behaviour(number, body["messages"][0]["content"])
        if content is not None and not isinstance(content, bytes):
            message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
            content = json.dumps(
                {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [message]}
            )
            content = content.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content or b"{}")
        except OSError:
            pass  # the client did not wait

    def log_message(self, *_):
        pass


QUESTION = ("Q?", "one", "two")


def test_a_server_is_asked_for_every_pair_in_both_orders():
    def longer_answer(number, text):
        first, second = (text.split(f"Answer {letter}: ")[1].split("\n")[0] for letter in "AB")
        return 200, "B" if len(second) > len(first) else "The better answer is A."

    with FakeServer(longer_answer) as server:
        group = group_of([1, 3, 2])
        shares = Judge(ServerVerdicts(server.url, "the-model", 5.0, 0))([group])
    assert shares == [[0.0, 1.0, 0.5]] and judge.metrics(group)["judge/failed"] == 0
    assert len(server.requests) == 6 and {request["model"] for request in server.requests} == {"the-model"}


@pytest.mark.parametrize(
    "trouble",
    [(500, None), (429, None), (404, None), (200, ""), (200, "I cannot judge."), (200, b"no json"), (200, b"[]"),
     (200, b'{"choices": []}'), (200, b'{"choices": null}')],
    ids=str,
)  # fmt: skip
def test_trouble_is_asked_again_and_then_left_out(trouble):
    with FakeServer(lambda number, text: trouble if number < 3 else (200, "B")) as server:
        assert ServerVerdicts(server.url, "m", 5.0, retries=2)([QUESTION]) == [1]
        assert len(server.requests) == 3
    with FakeServer(lambda number, text: trouble) as server:
        assert ServerVerdicts(server.url, "m", 5.0, retries=1)([QUESTION]) == [None]
        assert len(server.requests) == 2


def test_a_server_that_sleeps_or_is_not_there():
    def slow(number, text):
        time.sleep(0.6 if number == 1 else 0)
        return 200, "A"

    with FakeServer(slow) as server:
        assert ServerVerdicts(server.url, "m", 0.2, retries=1)([QUESTION]) == [0]
        gone = server.url
    assert ServerVerdicts(gone, "m", 0.5, retries=1)([QUESTION, QUESTION]) == [None, None]


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("A", 0),
        (" B.", 1),
        ("A is weak, so B", None),
        ("Answer A is better than answer B.", None),
        ("Answer B is better.", 1),
        ("B. A clear choice", 1),
        ("A: it is shorter than B", 0),
        ("**A**", 0),
        ("Both", None),
        ("", None),
        (None, None),
        ("AB", None),
    ],
)
def test_reading_a_verdict(text, verdict):
    assert judge.read_verdict(text) == verdict


# ---------------------------------------------------------------- whole runs


def test_a_run_with_a_judge_logs_what_it_did(tmp_path):
    data = small_dataset(tmp_path / "data")
    with FakeServer(lambda number, text: (200, "A") if number % 5 else (500, None)) as server:
        settings = dict(judge_url=server.url, judge_name="m", judge_retries=0, rewards="judge,format:0.5")
        config = tiny_config(
            tmp_path / "run", dataset_path=data, max_steps=1, max_completion_length=24, eval_problems=2, **settings
        )
        folder = main.train(config)
    row = metrics_of(folder)[-1]
    assert row["reward/judge"] == 0.5 and row["judge/position_bias"] == 0.5 and row["judge/ties"] == 1.0
    assert 0.1 < row["judge/failed"] < 0.3 and row["skipped_updates"] == 0


@pytest.mark.parametrize(
    "flags, fragment",
    [
        ("", "needs one of --judge_model and --judge_url, got neither"),
        ("--judge_model tiny --judge_url http://x", "got --judge_model and --judge_url"),
        ("--judge_url http://x", "--judge_url: needs --judge_name"),
        ("--judge_model tiny --judge_timeout 0", "--judge_timeout 0"),
    ],
)
def test_settings_that_do_not_go_together(flags, fragment):
    with pytest.raises(ValueError) as error:
        parse_config(["--preset", "tiny", "--rewards", "judge", *flags.split()])
    assert fragment in str(error.value)


def test_without_openai_it_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(judge.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the package openai is not here \(pip install openai\)"):
        parse_config("--preset tiny --rewards judge --judge_url http://x --judge_name m".split())


def test_a_judge_that_cannot_be_loaded_is_refused_before_the_run(tmp_path):
    config = tiny_config(tmp_path / "run", rewards="judge", judge_model="./nowhere")
    with pytest.raises(ValueError, match="./nowhere"):
        main.prepare(config)
    assert not (tmp_path / "run").exists()
