"""Self-play: one language model plays both seats of a game and learns from who wins.

One step: play many games side by side, half of them against itself, half against a frozen snapshot of itself; compare
each game's outcome with those of the same seat in games from the same start; make the moves of better games likelier
and those of worse ones less likely. The loss, the log-probs and the optimizer steps are main.py's: a move is a row.

    python self_play.py                                  # nim with the embedded model
    python self_play.py --game tictactoe --seed 1 --output_dir runs/tictactoe-seed1
    python self_play.py --game debate                    # two debaters and a judge
    python self_play.py --game debate --judge MODEL      # a language model judges
    python self_play.py --control shuffled_advantages    # the run that must not learn
    python self_play.py --opponents self                 # without the pool of snapshots
    python self_play.py --help

The embedded model has never seen a game: fine-tuning on random legal moves first teaches it what a move looks like, and
no strategy. Read `train` here, then games/game.py (what a game is), games/play.py (how games are played) and
games/measurement.py (what is measured). docs/self-play.md has the results.
Left out on purpose: search, a value network, more than two seats, sharded weights (--fsdp), ratings of players.
"""

from games.config import SelfPlayConfig, parse_config
from tracking import command_line

if __name__ == "__main__":  # --help and refused flags are answered before torch is imported, which takes seconds
    CONFIG = command_line.parse_or_exit(parse_config)

import copy
import dataclasses
import functools
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import distill
import llms
from distillation.examples import SFTExample, as_rollout
from engine import distributed
from games import GAMES, measurement, records
from games.game import Game
from games.judge import ModelJudge
from games.play import Match, ModelPlayer, RandomPlayer, play
from grpo import compute_advantages
from main import control_advantages, with_prompt_date
from tracking import checkpoints, run_folder
from tracking.training_run import SignalHandler, TrainingRun
from update import TokenBudget, make_trainable, set_learning_rate, update


@dataclass
class Snapshot:
    """The actor's weights after a step, frozen."""

    step: int
    weights: dict[str, torch.Tensor]  # on the CPU


@dataclass
class Setup:
    """What a run needs, loaded."""

    folder: Path
    game: Game
    policy: PreTrainedModel  # learns: fp32
    actor: PreTrainedModel  # plays: a bf16 copy on a GPU, the policy itself on a CPU
    opponent: PreTrainedModel  # plays with the weights of a snapshot
    reference: PreTrainedModel | None  # the frozen start, for --beta
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    pool: list[Snapshot]  # the start, then the latest ones
    means: list[float]  # moving mean of each seat's outcomes, for --baseline ema
    last_step: int
    best: float


# ---------------------------------------------------------------- the training loop


def train(config: SelfPlayConfig, signals: SignalHandler | None = None) -> Path:
    """Trains by self-play as configured; returns the run's folder.

    Raises ValueError, one line, for what cannot be run, and training_run.TrainingStopped, after a checkpoint, when a
    signal came or updates stay non-finite.
    """
    started, config = time.time(), with_prompt_date(config)
    signals = signals or SignalHandler()
    setup = prepare(config, signals)
    game, policy, optimizer = setup.game, setup.policy, setup.optimizer
    learner = ModelPlayer("policy", setup.actor, setup.tokenizer, config)
    G, budget = config.group_size, TokenBudget(config.tokens_per_micro_batch)
    groups = distributed.shard_indices(config.games_per_step // G, config.minibatches)  # of this process
    run = TrainingRun(
        setup.folder, config, policy=policy, tokenizer=setup.tokenizer, optimizer=optimizer, max_steps=config.max_steps,
        last_step=setup.last_step, best=setup.best, evaluate=functools.partial(evaluate, config, setup, learner),
        more_state=lambda: {"pool": [(s.step, s.weights) for s in setup.pool], "means": list(setup.means)},
        signals=signals, how_to_resume="go on with the same command, --output_dir and --resume_from_checkpoint latest",
    )  # fmt: skip
    with run:
        for step in run.steps():
            # 1. Play: games_per_step games, a group's from the same start between the same players.
            matches = start_matches(config, setup, learner, step, groups)
            learner.reset()
            with run.timer("rollout"):
                play(game, matches, f"{config.seed}-{step}", measurement.plies(game, config))
                rollout = learner.rollout()

            # 2. Compare: an answer's outcome with that of others. All processes' games.
            gathered = distributed.all_gather([(m.index, m.outcome, m.seats_of("policy")) for m in matches])
            _, outcomes, own = map(torch.tensor, zip(*sorted(gathered), strict=True))  # (games,), and (games, 2) each
            advantages = seat_advantages(outcomes, own, config, setup.means)  # (games, 2)
            advantages = control_advantages(advantages, config, step)
            rows, advantages = learned_rows(matches, advantages, rollout, config)  # of each minibatch, and (B,)
            if config.baseline == "position":
                advantages -= position_means(matches, advantages, G)

            # 3. Update: every answer of the learner is a row.
            set_learning_rate(optimizer, config, step, config.max_steps)
            with run.timer("train"):
                stats = update(
                    policy, setup.actor, setup.reference, optimizer, rollout, advantages.to(policy.device), config,
                    budget, rows,
                )  # fmt: skip
                llms.sync_actor(setup.actor, policy)
            if step % config.snapshot_steps == 0 and step < config.max_steps:
                add_snapshot(setup, step, config.pool)

            # 4. Log. The run evaluates, saves and stops when due.
            played = records.of_matches(game, matches, rollout, advantages)
            metrics = records.metrics(played, outcomes, G) | stats
            metrics |= run.times(num_tokens=sum(ply["length"] for match in played for ply in match["plies"]))
            run.finish_step(metrics, records.samples(played, G), note=records.progress_note(metrics))
    records.save_matrix(setup.folder, *matrix(config, setup, learner))
    if distributed.is_main_process():
        records.print_summary(setup.folder, time.time() - started)
    return setup.folder


def start_matches(config: SelfPlayConfig, setup: Setup, learner, step: int, groups: list[int]) -> list[Match]:
    """The games of this process's groups. With a pool, every second group is played against one of its snapshots, the
    same for all groups of the step; the policy's seat alternates from group to group."""
    opponent = None
    if config.opponents == "random":
        opponent = RandomPlayer()
    elif config.opponents == "pool":
        snapshot = random.Random(f"{config.seed}-{step}-opponent").choice(setup.pool)
        opponent = snapshot_player(config, setup, snapshot)
    matches = []
    for group in groups:
        state = setup.game.training_start(f"{config.seed}-{step}-{group}")
        players = [learner, learner]
        if opponent and (config.opponents == "random" or group % 2):
            players[(group // 2 + step) % 2] = opponent
        first = group * config.group_size
        matches += [Match(first + i, state, tuple(players)) for i in range(config.group_size)]
    return matches


def seat_advantages(outcomes, own, config: SelfPlayConfig, means: list[float]) -> torch.Tensor:
    """Each seat's outcome relative to what that seat usually gets. outcomes: (games, 2); own: (games, 2) bool, True
    where the policy plays -> (games, 2).

    A game is zero-sum, so the mean over both seats is near 0 whatever the policy does, and a seat with the better
    chances would be praised for having them: the baseline is the seat's own. group: the mean of the seat's outcomes in
    the group (GRPO). ema: a moving mean of the seat's outcomes (role-conditioned advantages, SPIRAL, arXiv 2506.24119);
    `means`, of the steps before, is updated. position: the outcomes as they are, for position_means.
    """
    if config.baseline == "position":
        return outcomes
    if config.baseline == "group":
        seats = [compute_advantages(seat, config.group_size, config.advantage_scale) for seat in outcomes.unbind(dim=1)]
        return torch.stack(seats, dim=1)
    advantages = outcomes - torch.tensor(means)
    for seat in (0, 1):
        if own[:, seat].any():
            mean = outcomes[own[:, seat], seat].mean().item()
            means[seat] = config.ema_decay * means[seat] + (1 - config.ema_decay) * mean
    return advantages


def learned_rows(matches, advantages, rollout, config: SelfPlayConfig) -> tuple[list[list[int]], torch.Tensor]:
    """(the rows of each minibatch, the advantage of every row (B,)). A minibatch has the answers of whole groups. Rows
    of one prompt stand together, which saves computing it again."""
    shares: list[list[int]] = [[] for _ in range(config.minibatches)]
    row_advantages = torch.zeros(len(rollout.texts))
    for match in matches:
        for ply in match.plies:
            if ply.player == "policy":
                shares[match.index * config.minibatches // config.games_per_step].append(ply.row)
                row_advantages[ply.row] = advantages[match.index, ply.seat]
    order = {}  # of the different prompts
    for ids in rollout.prompt_ids:
        order.setdefault(id(ids), len(order))
    return [sorted(share, key=lambda row: order[id(rollout.prompt_ids[row])]) for share in shares], row_advantages


def position_means(matches: list[Match], outcomes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Collective. The mean outcome of all answers of the step to the same prompt, for each answer. (B,) -> (B,).

    A game's outcome is that of all its answers, good and bad ones. Compared with other answers to the same position,
    each has the credit of its own choice alone, on average: what came before is the same for all of them. Where there
    is no other answer, the mean of the seat's answers in the group stands in, whose games had the same start.
    """
    own = {
        ply.row: (ply.prompt, (match.index // group_size, ply.seat))
        for match in matches for ply in match.plies if ply.player == "policy"
    }  # fmt: skip
    of_prompt, of_seat = defaultdict(list), defaultdict(list)
    for (prompt, seat), outcome in distributed.all_gather([(own[row], outcomes[row].item()) for row in own]):
        of_prompt[prompt].append(outcome)
        of_seat[seat].append(outcome)
    places = (own[row] for row in range(len(outcomes)))
    lists = (of_prompt[prompt] if len(of_prompt[prompt]) > 1 else of_seat[seat] for prompt, seat in places)
    return torch.tensor([records.mean(values) for values in lists])


def evaluate(config: SelfPlayConfig, setup: Setup, learner: ModelPlayer) -> tuple[dict[str, float], list[dict]]:
    return measurement.evaluate(setup.game, learner, snapshot_player(config, setup, setup.pool[0], "start"), config)


# ---------------------------------------------------------------- snapshots


def snapshot_player(config: SelfPlayConfig, setup: Setup, snapshot: Snapshot, name: str = "snapshot") -> ModelPlayer:
    """The opponent model with the weights of the snapshot. There is one such model: the player is good until the next
    call."""
    setup.opponent.load_state_dict(snapshot.weights)
    return ModelPlayer(name, setup.opponent, setup.tokenizer, config)


def add_snapshot(setup: Setup, step: int, limit: int) -> None:
    weights = {name: tensor.detach().cpu().clone() for name, tensor in setup.actor.state_dict().items()}
    setup.pool.append(Snapshot(step, weights))
    while len(setup.pool) > limit:
        del setup.pool[1]  # the start stays; with a limit of 1 it is alone


def matrix(config: SelfPlayConfig, setup: Setup, learner: ModelPlayer) -> tuple[list[int], list[list[float | None]]]:
    """Collective. The pool's snapshots and the last policy against each other: (their steps, the mean outcomes)."""
    players = []
    for snapshot in setup.pool:
        model = copy.deepcopy(setup.opponent)
        model.load_state_dict(snapshot.weights)
        players.append(ModelPlayer(f"step {snapshot.step}", model, setup.tokenizer, config))
    steps = [snapshot.step for snapshot in setup.pool] + [config.max_steps]
    return steps, measurement.snapshot_matrix(setup.game, [*players, learner], config)


# ---------------------------------------------------------------- before the loop

MAY_DIFFER_ON_RESUME = (
    "max_steps", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "eval_steps", "eval_games",
    "save_steps", "save_total_limit", "report_to", "tokens_per_micro_batch", "gradient_checkpointing", "preset",
)  # fmt: skip


def prepare(config: SelfPlayConfig, signals: SignalHandler) -> Setup:
    """Loads all that a run needs, after the cold start. Raises ValueError, one line, for whatever can be refused."""
    shares = config.group_size * config.minibatches * distributed.world_size()
    if config.games_per_step % shares:
        raise ValueError(
            f"--games_per_step {config.games_per_step}: must be a multiple of --group_size {config.group_size} times "
            f"--minibatches {config.minibatches} times {distributed.world_size()} processes"
        )
    judge = {"judge": ModelJudge(config)} if config.judge else {}
    game = GAMES[config.game](**judge)
    load = functools.partial(llms.load, trust_remote_code=config.trust_remote_code)
    state = {"step": 0, "best": -1.0, "optimizer": None}
    if config.resume_from_checkpoint:
        folder, checkpoint, state = checkpoints.find_resumed(config, MAY_DIFFER_ON_RESUME)
        policy, tokenizer = load(str(checkpoint))
    else:
        policy, tokenizer = load(checkpoints.resolve_model_name(config.model_name))
        check_length(config, game, policy, tokenizer)
        output_dir = config.output_dir or distributed.run_on_main(run_folder.unused_folder, f"runs/{config.preset}")
        folder = distributed.run_on_main(run_folder.create_folder, output_dir, config.overwrite_output_dir)
        if config.cold_start_steps:
            cold_start(config, game, policy, tokenizer, folder / "cold_start", signals)
    bf16 = config.uses_bf16(policy.device)
    actor = llms.make_actor(policy, torch.bfloat16 if bf16 else torch.float32)
    opponent = copy.deepcopy(actor).requires_grad_(False)
    optimizer = make_trainable(policy, config, llms.completion_logprobs, state["optimizer"])
    reference = None
    if config.beta > 0:
        cold = folder / "cold_start" / "checkpoints" / "latest"
        start = str(cold) if config.cold_start_steps else checkpoints.resolve_model_name(config.model_name)
        reference = llms.make_reference(load(start)[0], bf16)
    setup = Setup(
        folder, game, policy, actor, opponent, reference, tokenizer, optimizer,
        [Snapshot(*snapshot) for snapshot in state.get("pool", [])], state.get("means", [0.0, 0.0]), state["step"],
        state["best"],
    )  # fmt: skip
    if not setup.pool:
        add_snapshot(setup, 0, config.pool)
    return setup


def check_length(config: SelfPlayConfig, game: Game, policy, tokenizer) -> None:
    """Refuses answers that the model has no positions for, by the prompts of some games at random."""
    prompt_format, examples = config.prompt_format(), example_moves(config, game, tokenizer, step=0)
    prompts = [prompt_format.prompt(tokenizer, example.question) for example in examples]
    needed = max(map(len, tokenizer(prompts, add_special_tokens=False)["input_ids"])) + config.max_completion_length
    if needed > (positions := llms.max_positions(policy.config)):
        raise ValueError(f"{needed} tokens of prompt and answer exceed the {positions} positions of the model")


# ---------------------------------------------------------------- the cold start


def cold_start(config: SelfPlayConfig, game: Game, policy, tokenizer, folder: Path, signals: SignalHandler) -> None:
    """Fine-tunes the policy on moves (cross-entropy, as distill.py's). Random ones teach the form of an answer, and no
    strategy. Leaves a run's files in the folder."""
    cold = dataclasses.replace(config, learning_rate=config.cold_start_learning_rate, save_total_limit=1)
    optimizer = make_trainable(policy, cold, llms.completion_logprobs)
    distributed.run_on_main(distill.make_folder, folder / "checkpoints")
    own = distributed.shard_range(config.cold_start_rows)
    run = TrainingRun(
        folder, cold, policy=policy, tokenizer=tokenizer, optimizer=optimizer, max_steps=config.cold_start_steps,
        signals=signals, title="cold start", how_to_resume="start again with the same command",
    )  # fmt: skip
    with run:
        for step in run.steps():
            with run.timer("rollout"):
                examples = example_moves(config, game, tokenizer, step)
                rollout = as_rollout([examples[i] for i in own], tokenizer, config, policy.device)
            set_learning_rate(optimizer, cold, step, config.cold_start_steps, decay="cosine")
            with run.timer("train"):
                stats = distill.update(policy, None, optimizer, rollout, cold)
            num_tokens = distributed.all_reduce_sum({"tokens": rollout.lengths.sum().item()})["tokens"]
            run.finish_step(stats | run.times(num_tokens), note=f"loss {stats['loss']:.4f}")


def example_moves(config: SelfPlayConfig, game: Game, tokenizer, step: int) -> list[SFTExample]:
    """cold_start_rows positions of random games, each with a random legal or one of the best moves."""
    moves = game.legal if config.cold_start_moves == "random" else game.best_moves
    examples = []
    for row in range(config.cold_start_rows):
        rng = random.Random(f"{config.seed}-cold-{step}-{row}")
        states, state = [], game.start(f"{config.seed}-cold-{step}-{row}")
        while not game.is_over(state) and len(states) < measurement.plies(game, config):
            states.append(state)
            state = game.play(state, rng.choice(game.legal(state)))
        state = rng.choice(states)
        move = tokenizer(rng.choice(moves(state)), add_special_tokens=False)["input_ids"]
        examples.append(SFTExample(game.prompt(state, game.seat(state)), [*move, tokenizer.eos_token_id]))
    return examples


def main(config: SelfPlayConfig) -> None:
    distributed.init_distributed()
    train(config)


if __name__ == "__main__":
    command_line.run_script(main, CONFIG)
