"""Settings of self_play.py: its sections, presets and command line. As tracking/run_config.py, without torch."""

from dataclasses import dataclass
from typing import NamedTuple

import evaluator
from engine import chat_templates
from games import GAMES
from tracking import run_config
from tracking.argument_parser import read_early
from tracking.run_config import ADVANTAGE_SCALES, LOSS_TYPES, GRPOConfig, OptimizerSteps, RunFolder, setting


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
        "group", "what an outcome is compared with: its seat's mean in the group, its moving mean (ema), or the mean "
        "of all answers to the same position", ("group", "ema", "position"),
    )  # fmt: skip
    ema_decay: float = setting(0.95, "of the moving mean, per step")
    advantage_scale: str = setting("none", "whose standard deviation divides the group's advantages", ADVANTAGE_SCALES)
    loss_type: str = setting("dr_grpo", "explained in grpo.policy_loss", LOSS_TYPES)
    clip_low: float = setting(0.2, "the ratio's objective is clipped below 1 - clip_low")
    clip_high: float = setting(0.2, "... and above 1 + clip_high")
    beta: float = setting(0.0, "weight of the KL to the frozen start, which plays any legal move: it keeps exploring")
    control: str = setting("none", "the same run with the signal destroyed", ("none", "shuffled_advantages"))


@dataclass
class Optimization(OptimizerSteps):
    _argument_group_name = "optimization"


@dataclass
class ColdStart:
    _argument_group_name = "cold start: fine-tuning on legal moves"
    cold_start_steps: int = setting(0, "optimizer steps; 0: the model knows how to answer with a move")
    cold_start_rows: int = setting(128, "moves in a step")
    cold_start_moves: str = setting(
        "random", "random: any legal move, which teaches the form; best: perfect play, to see what imitation reaches",
        ("random", "best"),
    )  # fmt: skip
    cold_start_learning_rate: float = setting(1e-5, "peak of the schedule")


@dataclass
class Output(RunFolder):
    _argument_group_name = "evaluation and output"
    eval_games: int = setting(256, "games against each opponent; half of them in each seat")


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
            return f"{tokenizer.bos_token or ''}{self.rules}\n\n{question}\n"
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
            raise ValueError(
                "--group_size 1: a game is compared with its group; give 2 or more, or --baseline ema or position"
            )
        if self.advantage_scale != "none" and self.baseline != "group":
            raise ValueError(
                f"--advantage_scale {self.advantage_scale}: scales by the group's outcomes, and --baseline is "
                f"{self.baseline}; give --advantage_scale none or --baseline group"
            )
        if self.games_per_step % (self.group_size * self.minibatches):
            raise ValueError(
                f"--games_per_step {self.games_per_step}: must be a multiple of --group_size {self.group_size} times "
                f"--minibatches {self.minibatches}"
            )
        if self.eval_games % 2:
            raise ValueError(f"--eval_games {self.eval_games}: must be even, half of the games in each seat")
        if self.cold_start_moves == "best" and not GAMES[self.game].solvable:
            solvable = ", ".join(name for name, game in GAMES.items() if game.solvable)
            raise ValueError(f"--cold_start_moves best: nobody knows them in --game {self.game}; choose {solvable}")
        if self.judge is not None and self.game != "debate":
            raise ValueError(f"--judge {self.judge}: only a debate has one; --game {self.game}")

    def prompt_format(self, tokenizer=None) -> GamePrompt:
        return GamePrompt(GAMES[self.game].rules, self.tags, self.prompt_date)


# Embedded model, two CPU cores.
SMALL = dict(
    games_per_step=256, learning_rate=1.5e-4, final_lr_fraction=0.1, minibatches=4, tokens_per_micro_batch=4096,
    cold_start_learning_rate=1e-3, eval_steps=20, save_steps=100,
)  # fmt: skip
PRESETS = {
    "nim": SMALL | dict(game="nim", baseline="position", beta=0.1, max_steps=80, cold_start_steps=60),
    "tictactoe": SMALL | dict(
        game="tictactoe", baseline="position", beta=0.02, group_size=16, learning_rate=6e-4, max_steps=100,
        cold_start_steps=100,
    ),
    "debate": SMALL | dict(
        game="debate", beta=0.05, group_size=16, learning_rate=3e-4, max_steps=100, cold_start_steps=400,
    ),
}  # fmt: skip


def parse_config(arguments: list[str]) -> SelfPlayConfig:
    """self_play.py's settings. Raises ValueError, one line, on a bad argument."""
    game = read_early(arguments, {"game": dict(choices=GAMES, default="nim")}).game
    return run_config.parse(
        arguments, SelfPlayConfig, SECTIONS, PRESETS, game, "self_play.py",
        "Train a language model by games against itself.", cpu_preset=game,
    )  # fmt: skip
