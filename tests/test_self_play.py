"""self_play.py: advantages, the pool, the update on the rows of many rollouts, measures, refusals, and whole runs that
resume exactly and do with two processes what they do with one."""

import copy
import dataclasses
import inspect
import json
import re
import signal
from types import SimpleNamespace

import processes
import pytest
import torch
from drawing import drawing
from random_models import ROOT
from run_folders import write_run
from safetensors.torch import load_file
from small_runs import metrics_of, self_play_config, tiny_config, without_times

import llms
import self_play
from games import GAMES, measurement, records
from games.config import PRESETS, SelfPlayConfig, parse_config
from games.debate import Debate
from games.judge import ModelJudge
from games.nim import Nim
from games.nim import State as Heap
from games.play import Match, ModelPlayer, PerfectPlayer, Ply, RandomPlayer, play
from games.tictactoe import TicTacToe
from main import control_advantages
from rollout import Rollout, generate
from tracking import report, report_games
from tracking.run_config import GRPOConfig
from tracking.training_run import SignalHandler, TrainingStopped
from update import update

# ---------------------------------------------------------------- advantages


def everywhere(outcomes):
    """The policy in both seats."""
    return torch.ones_like(outcomes, dtype=torch.bool)


def test_a_seat_is_compared_with_itself_in_its_own_group():
    config = self_play_config("unused", baseline="group", group_size=2)
    outcomes = torch.tensor([[1.0, -1], [-1, 1], [1, -1], [1, -1]])
    advantages = self_play.seat_advantages(outcomes, everywhere(outcomes), config, [0.0, 0.0])
    assert advantages.tolist() == [[1, -1], [-1, 1], [0, 0], [0, 0]]


def test_a_seat_that_always_loses_teaches_nothing():
    """With the mean over both seats, every move of the lost seat would be punished, whatever it was."""
    config = self_play_config("unused", baseline="group", group_size=4)
    outcomes = torch.tensor([[1.0, -1.0]] * 8)
    assert self_play.seat_advantages(outcomes, everywhere(outcomes), config, [0.0, 0.0]).abs().max() == 0
    config, means = self_play_config("unused", baseline="ema"), [0.0, 0.0]
    for _ in range(200):
        advantages = self_play.seat_advantages(outcomes, everywhere(outcomes), config, means)
    assert advantages.abs().max() < 1e-3 and means == pytest.approx([1, -1], abs=1e-3)


def test_the_moving_mean_is_that_of_the_steps_before():
    config, means = self_play_config("unused", baseline="ema", ema_decay=0.75), [0.0, 0.0]
    outcomes = torch.tensor([[1.0, -1.0], [1.0, -1.5]])
    first = self_play.seat_advantages(outcomes, everywhere(outcomes), config, means)
    assert first.tolist() == [[1, -1], [1, -1.5]] and means == [0.25, -0.3125]
    second = self_play.seat_advantages(torch.zeros(1, 2), torch.tensor([[True, False]]), config, means)
    assert second.tolist() == [[-0.25, 0.3125]]
    assert means == [0.1875, -0.3125], "what the other player gets in seat 1 is not the policy's"


def test_an_answer_is_compared_with_all_answers_at_its_position():
    config = self_play_config("unused", baseline="position")
    outcomes = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-1.5, 0.5]])
    assert torch.equal(self_play.seat_advantages(outcomes, everywhere(outcomes), config, [0.0, 0.0]), outcomes)
    plies = [
        [(0, "policy", "9 left", 3), (1, "snapshot", "6 left", 3), (0, "policy", "4 left", 0)],
        [(0, "policy", "9 left", 1), (1, "policy", "8 left", 2)],
        [(1, "policy", "9 left", 4)],
        [(0, "policy", "3 left", 5)],
    ]
    matches = [
        Match(i, None, (), [Ply(seat, player, None, prompt, "1", row) for seat, player, prompt, row in rows])
        for i, rows in enumerate(plies)
    ]
    of_rows = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.5, -1.0])
    means = self_play.position_means(matches, of_rows, group_size=3)
    seat_0 = (1.0 - 1.0 + 1.0) / 3  # for "4 left", which no other answer of the policy was given to
    seat_1 = (1.0 + 0.5) / 2  # for "8 left"
    assert torch.allclose(means, torch.tensor([seat_0, 0.5 / 3, seat_1, 0.5 / 3, 0.5 / 3, -1.0])), "-1: another group"


def test_the_control_deals_the_same_advantages_to_others():
    config = self_play_config("unused", control="shuffled_advantages")
    advantages = torch.arange(64.0).view(32, 2)
    dealt = self_play.control_advantages(advantages, config, step=3)
    assert sorted(dealt.flatten().tolist()) == sorted(advantages.flatten().tolist()) and (dealt != advantages).any()
    assert torch.equal(dealt, self_play.control_advantages(advantages, config, step=3))
    assert torch.equal(advantages, self_play.control_advantages(advantages, self_play_config("unused"), step=3))


# ---------------------------------------------------------------- rows of several rollouts


@pytest.fixture(scope="module")
def tiny():
    return llms.load("tiny")


def rollouts_of(tiny) -> list[Rollout]:
    model, tokenizer = tiny
    asked = [(["7 left", "12 left"], 3), (["12 left"], 6), (["Why?", "7 left"], 1)]
    return [
        generate(model, tokenizer, prompts, group_size=2, max_new_tokens=limit, seed=limit) for prompts, limit in asked
    ]


def test_concatenated_rollouts_hold_every_row_unchanged(tiny):
    parts = rollouts_of(tiny)
    whole = Rollout.concatenate(parts)
    row = 0
    for part in parts:
        for i, length in enumerate(part.lengths.tolist()):
            assert torch.equal(whole.prompt_ids[row], part.prompt_ids[i])
            assert whole.texts[row] == part.texts[i] and whole.finish[row] == part.finish[i]
            for name in ("draws", "weights", "draw_mask", "logprobs", "trace_ids", "completion_mask", "entropy"):
                column = getattr(whole, name)[row]
                assert torch.equal(column[:length], getattr(part, name)[i][:length]) and not column[length:].any()
            row += 1
    assert row == len(whole.texts) == 10
    assert len({id(ids) for ids in whole.prompt_ids}) == 3, "equal prompts are one object"
    together = llms.completion_logprobs(tiny[0], whole)
    apart = [llms.completion_logprobs(tiny[0], part) for part in parts]
    for row, alone in enumerate(row for part in apart for row in part):
        assert torch.allclose(together[row, : len(alone)], alone, atol=1e-5)


def test_shares_are_the_minibatches(tiny):
    """The default shares given by hand take the same steps; so does any order within a share."""
    rollout = Rollout.concatenate(rollouts_of(tiny)[:1] * 2)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, 0.0, -1.0, 0.25])
    config = tiny_config(None, minibatches=2, learning_rate=1e-3)
    results = []
    for shares in (None, [[0, 1, 2, 3], [4, 5, 6, 7]], [[3, 1, 2, 0], [6, 4, 7, 5]], [[0, 1, 2], [3, 4, 5, 6, 7]]):
        policy = copy.deepcopy(tiny[0])
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)  # Adam would enlarge what rounding leaves
        stats = update(policy, policy, None, optimizer, rollout, advantages, config, None, shares)
        assert stats["updates"] == 2
        results.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(results[0], results[1]) and torch.allclose(results[0], results[2], atol=1e-6)
    assert not torch.allclose(results[0], results[3], atol=1e-4)


def test_every_answer_of_the_policy_is_a_row_with_its_games_advantage(tiny):
    config = self_play_config("unused")
    learner, other = ModelPlayer("policy", *tiny, config), RandomPlayer()
    players = [(learner, learner), (learner, other), (other, learner), (learner, learner)]
    matches = [Match(i * 4, Heap(9, 0), pair) for i, pair in enumerate(players)]
    play(Nim(), matches, "seed", 20)
    rollout = learner.rollout()
    advantages = torch.arange(32.0).view(16, 2)
    shares, row_advantages = self_play.learned_rows(matches, advantages, rollout, config)
    assert sorted(sum(shares, [])) == list(range(len(rollout.texts)))
    for match in matches:
        for ply in match.plies:
            if ply.player == "policy":
                assert rollout.texts[ply.row].strip() == ply.text
                assert row_advantages[ply.row] == advantages[match.index, ply.seat]
                assert ply.row in shares[match.index // 8], "whole groups"
    for share in shares:
        prompts = [id(rollout.prompt_ids[row]) for row in share]
        blocks = [p for i, p in enumerate(prompts) if i == 0 or prompts[i - 1] != p]
        assert len(blocks) == len(set(blocks)), "rows of one prompt stand together"


# ---------------------------------------------------------------- opponents


def setup_with_pool(steps):
    return SimpleNamespace(
        game=Nim(), actor=torch.nn.Linear(1, 1), opponent=torch.nn.Linear(1, 1), tokenizer=None,
        pool=[self_play.Snapshot(step, torch.nn.Linear(1, 1).state_dict()) for step in steps],
    )  # fmt: skip


@pytest.mark.parametrize("limit, kept", [(3, [0, 40, 50]), (5, [0, 20, 30, 40, 50]), (6, [0, 10, 20, 30, 40, 50])])
def test_the_pool_keeps_the_start_and_the_latest(limit, kept):
    setup = setup_with_pool([0])
    for step in range(10, 60, 10):
        self_play.add_snapshot(setup, step, limit)
    assert [snapshot.step for snapshot in setup.pool] == kept
    before = setup.pool[-1].weights["weight"].clone()
    setup.actor.weight.data += 1
    assert torch.equal(setup.pool[-1].weights["weight"], before), "a snapshot does not follow the policy"


@pytest.mark.parametrize("opponents", ["pool", "self", "random"])
def test_who_plays_whom(opponents):
    config = self_play_config("unused", opponents=opponents, games_per_step=64)
    learner = named(RandomPlayer(), "policy")
    matches = self_play.start_matches(config, setup_with_pool([0, 1]), learner, 1, list(range(16)))
    assert [match.index for match in matches] == list(range(64))
    kinds = []
    for start in range(0, 64, 4):
        group = matches[start : start + 4]
        assert len({(match.state, match.players) for match in group}) == 1, "a group's games have one start"
        kinds.append(tuple(player.name for player in group[0].players))
    other = {"pool": "snapshot", "self": "policy", "random": "random"}[opponents]
    assert kinds.count((other, "policy")) == kinds.count(("policy", other)) or opponents == "self"
    few = [self_play.start_matches(config, setup_with_pool([0]), learner, step, [0, 1]) for step in (1, 2)]
    seats = {match.seats_of("policy") for matches in few for match in matches}
    assert len(seats) == {"pool": 3, "self": 1, "random": 2}[opponents], "with few groups, from step to step"
    share = {"pool": 8, "self": 16, "random": 0}[opponents]
    assert kinds.count(("policy", "policy")) == share


# ---------------------------------------------------------------- measures


def test_perfect_play_measures_as_perfect():
    config = self_play_config("unused", eval_games=64)
    for game in (Nim(), TicTacToe()):
        metrics, samples = measurement.evaluate(game, PerfectPlayer(), named(RandomPlayer(), "start"), config)
        assert metrics["eval/accuracy"] == 1 and metrics["eval/illegal"] == 0 and metrics["eval/held_perfect"] == 1
        assert metrics["eval/win_random"] + metrics["eval/draw_random"] > 0.7
        assert metrics["eval/n"] >= len(game.decisive_positions()) and samples[0]["correct"]


def test_random_play_measures_as_what_it_is():
    config = self_play_config("unused", eval_games=256)
    metrics, _ = measurement.evaluate(Nim(), RandomPlayer(), named(RandomPlayer(), "start"), config)
    # Of three moves (two with two left) one is right.
    assert metrics["eval/accuracy"] == pytest.approx((13 * 1 / 3 + 1 / 2) / 14, abs=0.07)
    assert metrics["eval/win_random"] == pytest.approx(0.5, abs=0.1)
    assert metrics["eval/win_random_low"] < metrics["eval/win_random"] < metrics["eval/win_random_high"]
    assert metrics["eval/held_perfect"] < 0.2


def named(player, name):
    player.name = name
    return player


class Honest(RandomPlayer):
    """Shows a nine if that helps its side, and hides it if it does not."""

    name = "policy"

    def moves(self, game, state):
        helps = state.claims_nine == (game.seat(state) == 0)
        wanted = [move for move in game.legal(state) if (move == "9") == helps]
        return wanted or game.legal(state)


def test_debate_helps_the_judge_and_one_side_does_not():
    config = self_play_config("unused", game="debate", eval_games=512)
    metrics, _ = measurement.evaluate(Debate(), Honest(), named(RandomPlayer(), "start"), config)
    assert metrics["eval/accuracy"] == metrics["eval/judge_ceiling"] == 1
    assert metrics["eval/judge_random"] == pytest.approx(0.8, abs=0.06)
    assert metrics["eval/judge_one_sided"] == pytest.approx(0.75, abs=0.06), "a side that hides all nines is believed"
    assert metrics["eval/judge_claim_right"] == metrics["eval/judge_right_side_first"] == 1


def test_the_matrix_is_antisymmetric_and_says_who_wins():
    matrix = measurement.snapshot_matrix(Nim(), [RandomPlayer(), Better()], self_play_config("unused", eval_games=64))
    assert matrix[0][0] is None and matrix[1][0] == -matrix[0][1] > 0.5


class Better(RandomPlayer):
    name = "better"

    def moves(self, game, state):
        return game.best_moves(state)


def test_metrics_of_hand_made_games():
    def record(index, players, illegal, lengths):
        plies = [
            {"player": players[i % 2], "length": n, "entropy": 0.5 * n, "finish": "stop"} for i, n in enumerate(lengths)
        ]
        return {"index": index, "players": players, "illegal": illegal, "plies": plies}

    games = [
        record(0, ["policy", "policy"], None, [2, 2, 2]), record(1, ["policy", "policy"], 1, [2, 4]),
        record(2, ["snapshot", "policy"], None, [0, 2]), record(3, ["snapshot", "policy"], 0, [0, 2]),
    ]  # fmt: skip
    outcomes = torch.tensor([[1.0, -1.0], [0.5, -1.5], [1.0, -1.0], [-1.5, 0.5]])
    result = records.metrics(games, outcomes, group_size=2)
    assert result["reward"] == pytest.approx((1 - 1 + 0.5 - 1.5 - 1 + 0.5) / 6)
    assert result["reward/seat_0"] == 0.75 and result["reward/seat_1"] == pytest.approx((-1 - 1.5 - 1 + 0.5) / 4)
    assert result["illegal_rate"] == pytest.approx(1 / 7), "the snapshot's illegal move is not the policy's"
    assert result["plies"] == 9 / 4 and result["completion_length"] == pytest.approx(16 / 7)
    assert result["entropy"] == 0.5 and result["win_rate"] == 0.5 and result["zero_std_groups"] == 0


# ---------------------------------------------------------------- the model judge


def test_the_model_judge_is_asked_in_both_orders(tiny, monkeypatch):
    judge = ModelJudge(self_play_config("unused", game="debate", judge="tiny"))
    asked = []

    def answer(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        assert options["temperature"] == 0
        # Believes the last digit shown: a 9 last means yes.
        return SimpleNamespace(texts=["Yes." if "9." in p else "no" if "2." in p else "perhaps" for p in prompts])

    monkeypatch.setattr("games.judge.generate", answer)
    start = Debate().start(0)._replace(digits=(9, 1, 1, 2, 3, 3, 3, 3))
    states = [start._replace(shown=shown) for shown in [(0, 1, 2, 3), (0, 1, 2, 0), (3, 1, 2, 3), (1, 2)]]
    assert judge(states) == [None, True, False, None], "disagreement, and an answer that is none, are ties"
    assert len(asked) == 8 and "Shown: 9, 1, 1, 2." in asked[0] and "Shown: 2, 1, 1, 9." in asked[1]
    assert Debate(judge).outcomes(states[:1]) == [(0.0, 0.0)]


def test_a_debate_with_a_model_judge_runs(tmp_path):
    folder = self_play.train(self_play_config(tmp_path / "run", game="debate", judge="tiny", max_steps=1))
    assert metrics_of(folder)[-1]["eval/judge_ceiling"] <= 1


# ---------------------------------------------------------------- the cold start


@pytest.mark.parametrize("moves", ["random", "best"])
def test_examples_are_legal_moves_or_the_best_ones(tokenizer, moves):
    config = self_play_config("unused", cold_start_rows=200, cold_start_moves=moves)
    taken = [
        (int(example.question.split()[0]), int(tokenizer.decode(example.completion[:-1])))
        for example in self_play.example_moves(config, Nim(), tokenizer, step=0)
    ]
    assert all(1 <= move <= min(3, heap) for heap, move in taken)
    optimal = [(heap - move) % 4 == 0 for heap, move in taken if heap % 4]
    assert all(optimal) if moves == "best" else 0.2 < sum(optimal) / len(optimal) < 0.6


# ---------------------------------------------------------------- settings


def test_every_setting_is_read():
    files = [ROOT / name for name in ("self_play.py", "update.py", "tracking/training_run.py", "distill.py")]
    files += (ROOT / "games").glob("*.py")
    source = "".join(file.read_text() for file in files)
    source += inspect.getsource(GRPOConfig.uses_bf16) + inspect.getsource(control_advantages)
    for f in dataclasses.fields(SelfPlayConfig):
        assert re.search(rf"\b(config|cold|self)\.{f.name}\b", source), f"{f.name} is parsed and never used"


@pytest.mark.parametrize("game", GAMES)
def test_the_game_picks_its_preset(game, capsys):
    config = parse_config(["--game", game, "--device", "cpu"])
    assert config.preset == config.game == game
    assert all(getattr(config, name) == value for name, value in PRESETS[game].items())
    assert parse_config(["--preset", "nim", "--game", game]).game == game


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        ("--game chess", ["chess", "nim", "tictactoe", "debate"]),
        ("--baseline best", ["best", "group", "ema"]),
        ("--opponents none", ["none", "pool", "self", "random"]),
        ("--pool 0", ["--pool 0", "above 0"]),
        ("--max_plies 0", ["--max_plies 0"]),
        ("--games_per_step 100", ["--games_per_step 100", "--group_size 8", "--minibatches 4"]),
        ("--baseline group --group_size 1", ["--group_size 1", "ema", "position"]),
        ("--advantage_scale group", ["--advantage_scale group", "position", "--baseline group"]),
        ("--ema_decay 1", ["--ema_decay 1", "below 1"]),
        ("--eval_games 7", ["--eval_games 7", "even"]),
        ("--judge tiny", ["--judge tiny", "debate", "nim"]),
        ("--game debate --cold_start_moves best", ["--cold_start_moves best", "debate", "nim, tictactoe"]),
        ("--gmae nim", ["--gmae", "--game"]),
    ],
)
def test_refusals_are_one_line(arguments, fragments):
    with pytest.raises(ValueError) as error:
        parse_config(arguments.split())
    assert "\n" not in str(error.value) and all(fragment in str(error.value) for fragment in fragments)


@pytest.mark.parametrize(
    "settings, line",
    [
        (dict(model_name="nowhere/at-all"), "cannot load model 'nowhere/at-all'"),
        (dict(max_completion_length=600), "exceed the 512 positions of the model"),
        (dict(game="debate", judge="nowhere/at-all"), "cannot load model 'nowhere/at-all'"),
    ],
)
def test_what_cannot_be_run_leaves_no_folder(tmp_path, settings, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        self_play.train(self_play_config(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- whole runs


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step}" / "model.safetensors")


@pytest.mark.parametrize("settings", [dict(game="nim", baseline="ema"), dict(game="debate", beta=0.1)])
def test_a_stopped_run_ends_as_an_uninterrupted_one(tmp_path, settings):
    """The pool, the moving means and the optimizer go on where they were."""
    config = self_play_config(tmp_path / "whole", **settings, max_steps=4, eval_steps=4, save_steps=4)
    self_play.train(config)
    stopped = dataclasses.replace(config, output_dir=str(tmp_path / "stopped"))

    class AfterTwoSteps(SignalHandler):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        @property
        def signal(self):
            done = (tmp_path / "stopped" / "metrics.jsonl").exists() and len(metrics_of(tmp_path / "stopped")) > 1
            return signal.SIGTERM if done else None

        @signal.setter
        def signal(self, value):
            pass

    with pytest.raises(TrainingStopped) as stop:
        self_play.train(stopped, signals=AfterTwoSteps())
    assert stop.value.exit_code == 128 + signal.SIGTERM and len(metrics_of(tmp_path / "stopped")) == 3
    self_play.train(dataclasses.replace(stopped, resume_from_checkpoint="latest"))
    assert without_times(metrics_of(tmp_path / "stopped")) == without_times(metrics_of(tmp_path / "whole"))
    one, other = weights(tmp_path / "whole", 4), weights(tmp_path / "stopped", 4)
    assert all(torch.equal(one[name], other[name]) for name in one)
    matrices = [(tmp_path / name / "matrix.json").read_text() for name in ("whole", "stopped")]
    assert matrices[0] == matrices[1]


def test_a_run_goes_on_another_day_with_the_date_that_it_began_with(tmp_path):
    config = self_play_config(tmp_path / "run", max_steps=1)
    self_play.train(config)
    args = tmp_path / "run" / "args.json"
    text = args.read_text()
    today = json.loads(text)["config"]["prompt_date"]
    args.write_text(text.replace(today, "2026-03-01"))
    self_play.train(dataclasses.replace(config, max_steps=2, resume_from_checkpoint="latest"))
    assert json.loads(args.read_text())["config"]["prompt_date"] == "2026-03-01"


def test_a_resumed_run_keeps_its_settings(tmp_path):
    config = self_play_config(tmp_path / "run", max_steps=1)
    self_play.train(config)
    with pytest.raises(ValueError, match="--game tictactoe: what is in .* was made with nim"):
        self_play.train(dataclasses.replace(config, game="tictactoe", max_steps=3, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="--max_steps 1: the checkpoint is at step 1 already"):
        self_play.train(dataclasses.replace(config, resume_from_checkpoint="latest"))


def test_two_processes_play_and_learn_what_one_does(tmp_path):
    flags = (
        "--game nim --games_per_step 32 --group_size 4 --minibatches 2 --max_steps 3 --cold_start_steps 3 "
        "--cold_start_rows 17 --eval_steps 3 --eval_games 10 --snapshot_steps 1 --learning_rate 1e-4 --device cpu "
        "--baseline position"
    ).split()
    for name, num_processes in (("one", 1), ("two", 2)):
        folder = str(tmp_path / name)
        result = processes.run("self_play.py", *flags, "--output_dir", folder, num_processes=num_processes)
        assert result.returncode == 0, result.stderr[-2000:]
    one, two = tmp_path / "one", tmp_path / "two"
    for a, b in zip(without_times(metrics_of(one)), without_times(metrics_of(two)), strict=True):
        assert a.keys() == b.keys()
        assert all(a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5) for name in a), a["step"]
    samples = [(folder / "samples.jsonl").read_text().splitlines() for folder in (one, two)]
    for a, b in zip(*(map(json.loads, lines) for lines in samples), strict=True):
        assert {k: v for k, v in a.items() if k != "entropy"} == {k: v for k, v in b.items() if k != "entropy"}
    before, after = weights(one, 3), weights(two, 3)
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    assert (one / "matrix.json").read_text() == (two / "matrix.json").read_text()


@pytest.mark.parametrize("game", GAMES)
def test_games_are_on_the_page(tmp_path, game):
    folder = self_play.train(self_play_config(tmp_path / "run", game=game))
    steps = report_games.read_games(folder / "samples.jsonl")
    assert [entry["step"] for entry in steps] == [1, 2]
    assert len(steps[0]["games"]) == 16 and all(view["plies"] and view["start"] for view in steps[0]["games"])
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows if "game" not in row} == {"test"}
    assert report.compare_config(dataclasses.asdict(self_play_config("unused", game=game)))[0]["name"] != "unknown"
    head = report.headline(metrics_of(folder), report.read_run(folder)[0])
    assert head["facts"]["game"] == game and head["note"].split()[1] in ("debates", "answers")
    assert head["measures"][0]["name"] == ("right verdicts" if game == "debate" else "optimal moves")


def test_the_games_page_in_the_browser(window, tmp_path):
    def row(step, game, ply, text, advantage):
        return {
            "step": step, "split": "train", "game": game, "ply": ply, "seat": ply % 2, "player": "policy",
            "prompt": "7 left", "completion": text, "board": f"board {game}", "after": f"after {text}", "reward": 1.0,
            "advantage": advantage,
        }  # fmt: skip

    hostile = "</script><script>document.title = 'owned'</script>"
    rows = [row(1, 0, 0, "1", 0.5), row(1, 0, 1, "2", -0.5), row(1, 1, 0, "3", 1.0), row(2, 0, 0, hostile, 1.0)]
    folder = write_run(tmp_path / "run", samples=rows, **dataclasses.asdict(self_play_config("unused")))
    with drawing():
        window.open(report.make_report(folder))
    assert window.title == "Run run" and hostile in window.text("#boards"), "the last step is shown first"
    script = "const s = document.getElementById(arguments[0]); s.selectedIndex = arguments[1];"
    script += "s.dispatchEvent(new Event('change'))"
    window.execute_script(script, "game-step", 0)
    assert all(text in window.text("#boards") for text in ("board 0", "after 1", "after 2", "advantage -0.5"))
    window.execute_script(script, "game", 1)
    assert "after 3" in window.text("#boards") and "after 1" not in window.text("#boards")
    assert window.execute_script("return document.getElementById('game-section').hidden") is False
    folder = write_run(tmp_path / "other")
    with drawing():
        window.open(report.make_report(folder))
    assert window.execute_script("return document.getElementById('game-section').hidden") is True
    assert window.console() == []
