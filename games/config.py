"""Settings of self_play.py: its sections, presets and command line. As tracking/run_config.py, without torch."""

from dataclasses import dataclass
from typing import NamedTuple

import evaluator
from engine import chat_templates
from games import GAMES
from tracking import run_config
from tracking.run_config import ADVANTAGE_SCALES, LOSS_TYPES, GRPOConfig, setting


@dataclass
class Model:
    _argument_group_name = "model and sampling"
    model_name: str = setting("tiny", "hub name, local folder, or an embedded model: tiny, tiny_student")
    trust_remote_code: bool = setting(False, "run code that comes with the model")
    tags: str = setting(
        "reasoning", "name of the reasoning block, if the model writes one before its move", tuple(evaluator.TAGS)
    )
    prompt_date: str | None = setting(
        None, "YYYY-MM-DD, for chat templates that write today's date; default: the day the run began"
    )
    max_completion_length: int = setting(4, "tokens of an answer, at most")
    temperature: float = setting(1.0, "of sampling; the loss uses the log-probs at the same temperature")


@dataclass
class Playing:
    _argument_group_name = "games and opponents"
    game: str = setting("nim", "explained in games/; without --preset, also the preset", tuple(GAMES))
    games_per_step: int = setting(128, "games in a step, played side by side")
    group_size: int = setting(8, "games from the same start position between the same players")
    max_plies: int | None = setting(None, "a game that is longer is a draw; default: the game's own limit")
    opponents: str = setting(
        "pool", "pool: itself in half of the groups, else a snapshot; self: only itself; random: only random moves",
        ("pool", "self", "random"),
    )  # fmt: skip
    pool: int = setting(6, "frozen snapshots kept: the start and the latest ones")
    snapshot_steps: int = setting(20, "a snapshot is taken every N steps")
    judge: str | None = setting(None, "debate: a hub name or folder of a model that judges; default: the rule judge")


@dataclass
class Objective:
    _argument_group_name = "advantages and loss"
    baseline: str = setting(
        "group", "what an outcome is compared with: its seat's mean in the group, or a moving mean of its seat (ema)",
        ("group", "ema"),
    )  # fmt: skip
    ema_decay: float = setting(0.95, "of the moving mean, per step")
    advantage_scale: str = setting("none", "whose standard deviation divides the group's advantages", ADVANTAGE_SCALES)
    loss_type: str = setting("dr_grpo", "explained in grpo.policy_loss", LOSS_TYPES)
    clip_low: float = setting(0.2, "the ratio's objective is clipped below 1 - clip_low")
    clip_high: float = setting(0.2, "... and above 1 + clip_high")
    beta: float = setting(0.0, "weight of the KL to the frozen start, which plays any legal move: it keeps exploring")
    control: str = setting("none", "the same run with the signal destroyed", ("none", "shuffled_advantages"))


@dataclass
class Optimization:
    _argument_group_name = "optimization"
    max_steps: int = setting(100, "steps of self-play in the run")
    updates_per_rollout: int = setting(1, "passes over the moves of a step")
    minibatches: int = setting(4, "optimizer steps a pass, each on an equal share of the groups")
    learning_rate: float = setting(1e-6, "peak of the schedule, which has")
    warmup_steps: int = setting(5, "... a linear warm-up of so many steps,")
    final_lr_fraction: float = setting(0.1, "... and a linear decay to this share of the peak")
    tokens_per_micro_batch: int = setting(4096, "tokens in one forward and backward pass (memory, not results)")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, about a third more time")
    bf16: bool | None = setting(None, "fp32 weights under bf16 autocast, and a bf16 actor; default: on a GPU")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    seed: int = setting(0, "of the start positions, the opponents and the sampling")


@dataclass
class ColdStart:
    _argument_group_name = "cold start: fine-tuning on random legal moves"
    cold_start_steps: int = setting(0, "optimizer steps; 0: the model knows how to answer with a move")
    cold_start_rows: int = setting(128, "random legal moves in a step")
    cold_start_learning_rate: float = setting(1e-5, "peak of the schedule")


@dataclass
class Output:
    _argument_group_name = "evaluation and output"
    eval_steps: int = setting(20, "evaluate every N steps; also at first, at last and with checkpoints")
    eval_games: int = setting(256, "games against each opponent; half of them in each seat")
    output_dir: str | None = setting(None, "the run's folder; default runs/PRESET, numbered if taken")
    overwrite_output_dir: bool = setting(False, "replace the run that is in output_dir")
    resume_from_checkpoint: str | None = setting(None, "latest, best, step-N or a path: go on from there in output_dir")
    save_steps: int = setting(100, "checkpoint every N steps (also after the last)")
    save_total_limit: int = setting(2, "keep the newest N checkpoints, and latest and best")
    report_to: str = setting("none", "a tracker, through accelerate", ("none", *run_config.TRACKERS))


SECTIONS = (Model, Playing, Objective, ColdStart, Optimization, Output)
MAY_BE_ZERO = (
    "clip_low", "clip_high", "beta", "learning_rate", "warmup_steps", "final_lr_fraction", "seed", "cold_start_steps",
)  # fmt: skip


class GamePrompt(NamedTuple):
    """How a position is put to the model: the game's rules as the instruction, the position as the question."""

    rules: str
    tags: str
    date: str | None

    def prompt(self, tokenizer, question: str) -> str:
        if tokenizer.chat_template is None:
            return f"{self.rules}\n\n{question}\n"
        return chat_templates.chat_prompt(tokenizer, self.rules, question, tags=self.tags, date=self.date)


@dataclass
class SelfPlayConfig(*reversed(SECTIONS)):
    """All settings. Refuses impossible values with a ValueError of one line."""

    preset: str = "nim"
    # No settings here; update.py and the cold start's loss read them.
    compile, fsdp, mask_truncated, rollout_is_cap, rollout_is_mask = False, False, False, 0.0, 0.0
    clip_delta, top_entropy, lora_rank = 0.0, 1.0, 0
    loss, jsd_beta = "sft", 0.5

    uses_bf16 = GRPOConfig.uses_bf16

    def __post_init__(self):
        run_config.check_values(self, MAY_BE_ZERO)
        if self.final_lr_fraction > 1:
            raise ValueError(f"--final_lr_fraction {self.final_lr_fraction}: must be at most 1")
        if self.ema_decay >= 1:
            raise ValueError(f"--ema_decay {self.ema_decay}: must be below 1")
        if self.group_size == 1 and self.baseline == "group":
            raise ValueError("--group_size 1: a game is compared with its group; give 2 or more, or --baseline ema")
        if self.games_per_step % (self.group_size * self.minibatches):
            raise ValueError(
                f"--games_per_step {self.games_per_step}: must be a multiple of --group_size {self.group_size} times "
                f"--minibatches {self.minibatches}"
            )
        if self.eval_games % 2:
            raise ValueError(f"--eval_games {self.eval_games}: must be even, half of the games in each seat")
        if self.judge is not None and self.game != "debate":
            raise ValueError(f"--judge {self.judge}: only a debate has one; --game {self.game}")

    def prompt_format(self, tokenizer=None) -> GamePrompt:
        return GamePrompt(GAMES[self.game].rules, self.tags, self.prompt_date)


PRESETS = {
    # Embedded model, two CPU cores.
    "nim": dict(
        game="nim", games_per_step=256, max_steps=100, learning_rate=1.5e-4, cold_start_steps=60,
        cold_start_learning_rate=1e-3, eval_steps=20,
    ),
    "tictactoe": dict(
        game="tictactoe", games_per_step=256, max_steps=200, learning_rate=1.5e-4, cold_start_steps=100,
        cold_start_learning_rate=1e-3, eval_steps=20,
    ),
    "debate": dict(
        game="debate", games_per_step=256, max_steps=100, learning_rate=1.5e-4, cold_start_steps=100,
        cold_start_learning_rate=1e-3, eval_steps=20,
    ),
}  # fmt: skip


def parse_config(arguments: list[str]) -> SelfPlayConfig:
    """self_play.py's settings. Raises ValueError, one line, on a bad argument."""
    first = run_config.ArgumentParser((), add_help=False)
    first.add_argument("--game", choices=GAMES, default="nim")
    game = first.parse_known_args(arguments)[0].game
    return run_config.parse(
        arguments, SelfPlayConfig, SECTIONS, PRESETS, game, "self_play.py",
        "Train a language model by games against itself.", cpu_preset=game,
    )  # fmt: skip
