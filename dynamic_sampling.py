"""The groups of one step, and dynamic sampling: groups that teach nothing are sampled again with other problems.

A group whose answers all got the same reward has no advantage and no gradient. With --dynamic_sampling N such groups
are replaced by those of new problems, in up to N more rounds (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2).
Groups that are still of equal rewards after the last round stay in the batch, where they have no gradient.

Everything follows from the seed, the step and the round, and which groups are replaced is decided from the records of
all processes. So a resumed run samples what the uninterrupted one would have, and several processes what one would.

    groups = StepGroups(problems, config, step, indices)
    for problems, slots in groups.rounds():
        rollout = generate(..., **groups.sampling()) if problems else None
        groups.add(rollout, records)
    groups.rollout, groups.records

Left out on purpose: sampling more groups than needed in the first round (how many are wasted is unknown before it), and
keeping groups for the next step, whose policy is another one.
"""

import torch

import rldatasets
from rollout import Rollout


class StepGroups:
    """The problems_per_step groups of one step. A slot is a group's place in the step; this process has some."""

    def __init__(self, problems: list[rldatasets.Problem], config, step: int, own_slots: list[int]):
        """problems: to train on. config: GRPOConfig. own_slots: of this process (distributed.shard_indices)."""
        self.problems, self.config, self.step, self.own_slots = problems, config, step, own_slots
        self.round, self.num_replaced, self.num_tokens = 0, 0, 0
        self.slots: list[int] = []  # of this process's groups that the current round samples
        self.rollout: Rollout | None = None  # rows of own_slots
        self.by_row: dict[int, dict] = {}

    def sampling(self) -> dict:
        """Options of rollout.generate for the round."""
        # Below 2^32, beyond which torch's generator ignores a seed's digits.
        seed = (step_seed(self.config, self.step) + self.round * 97_000_007) % 2**32
        return self.config.sampling() | {"seed": seed, "prompt_indices": self.slots}

    @property
    def records(self) -> list[dict]:
        """Of the rows of all processes, in order."""
        return [self.by_row[row] for row in sorted(self.by_row)]

    def rounds(self):
        """Yields (problems, slots) to sample: this process's, perhaps none. `add` what came of it before the next."""
        c = self.config
        problems = rldatasets.problems_of_step(self.problems, self.step, c.problems_per_step, c.seed)
        self.slots = self.own_slots
        yield [problems[slot] for slot in self.slots], self.slots
        if c.dynamic_sampling == 0:
            return
        most = c.dynamic_sampling * c.problems_per_step
        new = rldatasets.replacement_problems(self.problems, self.step, c.problems_per_step, c.seed, most)
        for self.round in range(1, c.dynamic_sampling + 1):
            taken = dict(zip(self.equal_slots(), new, strict=False))
            if not taken:
                return
            del new[: len(taken)]
            self.num_replaced += len(taken)
            self.slots = [slot for slot in self.own_slots if slot in taken]
            yield [taken[slot] for slot in self.slots], self.slots

    def equal_slots(self) -> list[int]:
        """The groups, of all processes, whose rewards are all equal."""
        G, records = self.config.group_size, self.records
        groups = [records[start : start + G] for start in range(0, len(records), G)]
        return [slot for slot, group in enumerate(groups) if len({record["reward"] for record in group}) == 1]

    def add(self, rollout: Rollout | None, records: list[dict]) -> None:
        """rollout: of this process's problems of the round, None without any. records: of all processes' rows."""
        self.num_tokens += sum(record["length"] for record in records)
        self.by_row |= {record["row"]: record for record in records}
        if rollout is not None:
            places = [self.own_slots.index(slot) for slot in self.slots]
            self.rollout = rollout if self.round == 0 else replace_groups(self.rollout, rollout, places)

    def cost(self) -> dict[str, float]:
        """What dynamic sampling cost, to log; nothing without it."""
        if self.config.dynamic_sampling == 0:
            return {}
        return {"replaced_groups": self.num_replaced, "sampled_tokens": self.num_tokens}


def step_seed(config, step: int) -> int:
    """The seed of a step's random numbers."""
    return config.seed * 1_000_003 + step


def replace_groups(rollout: Rollout, new: Rollout, places: list[int]) -> Rollout:
    """The rollout with its groups number places[0], places[1]... replaced by those of `new`, in order."""
    G = len(new.texts) // len(places)
    new_of_row = {place * G + n: i * G + n for i, place in enumerate(places) for n in range(G)}
    B = len(rollout.texts)
    T = max(rollout.completion_mask.shape[1], new.completion_mask.shape[1])

    def merge(old, own):
        if old is None:
            return None
        if not isinstance(old, torch.Tensor):
            return [own[new_of_row[row]] if row in new_of_row else old[row] for row in range(B)]
        merged = old.new_zeros(B, T, *old.shape[2:])
        merged[:, : old.shape[1]] = old
        rows = list(new_of_row)
        merged[rows] = 0
        merged[rows, : own.shape[1]] = own[list(new_of_row.values())]
        return merged

    columns = {name: merge(column, getattr(new, name)) for name, column in vars(rollout).items()}
    longest = int(columns["completion_mask"].sum(dim=1).max())
    return Rollout(**{k: v[:, :longest] if isinstance(v, torch.Tensor) else v for k, v in columns.items()})
