"""Which rows make up the batch of step s: a pure function of (data spec, s).

One source and one language per batch. Every (task, language) group is an endless stream: one seeded
permutation of its rows per epoch, one after the other, so that the tail of an epoch is carried over
into the next batch and no row is dropped. Which group is next follows from the weights alone.
"""

import dataclasses

import numpy as np

from moe_embed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows [start, stop) of the token store: one task in one language."""

    task: str
    language: str
    start: int
    stop: int
    rate: float  # of the task in the mixture

    @property
    def name(self) -> str:
        return f"{self.task}/{self.language}"

    @property
    def rows(self) -> int:
        return self.stop - self.start


def mixture_groups(stored: list[dict], rates: dict[str, float] | None) -> list[Group]:
    """The groups of a token store, with the run's own `rates` where it gives some.

    Tasks that `rates` does not name are left out. Raises `UserError` for a task that is not there.
    """
    groups = [Group(**group) for group in stored]
    if rates is None:
        return groups
    tasks = sorted({group.task for group in groups})
    for task in rates:
        if task not in tasks:
            raise UserError(f"data.rates: there is no task {task}; tasks: {', '.join(tasks)}")
    return [
        dataclasses.replace(group, rate=float(rates[group.task]))
        for group in groups
        if group.task in rates
    ]


def group_weights(groups: list[Group], language_exponent: float) -> np.ndarray:
    """Share of the batches of each group: its task's rate times p ~ rows**exponent inside the task.

    An exponent of 1 samples every pair equally often; 0.3 is the paper's smoothing of languages in
    stage 1. Raises `UserError` for an empty group or rates that do not add up to anything.
    """
    for group in groups:
        if group.rows < 1:
            raise UserError(f"data: group {group.name} has no rows; remove it or prepare it again")
        if not group.rate >= 0:
            raise UserError(f"data: rate of task {group.task} is {group.rate}; it must be >= 0")
    tasks = {group.task: group.rate for group in groups}
    if sum(tasks.values()) <= 0:
        raise UserError(f"data: the rates of the mixture add up to 0: {tasks}")
    share = np.array([group.rows**language_exponent for group in groups], np.float64)
    for task in tasks:
        of_task = np.array([group.task == task for group in groups])
        share[of_task] *= tasks[task] / share[of_task].sum()
    return share / share.sum()


@dataclasses.dataclass(eq=False)
class Schedule:
    """The groups and rows of every step of a run.

    A group of weight w comes up every 1/w steps, each group from its own offset: shares are
    exact to one batch at any point of the run, and the first n steps do not depend on how many
    follow.
    """

    groups: list[Group]
    batch_size: int
    steps: int
    seed: int
    language_exponent: float = 1.0

    def __post_init__(self):
        groups, steps = self.groups, self.steps
        weights = group_weights(groups, self.language_exponent)
        offsets = np.random.Generator(np.random.Philox(self.seed)).random(len(groups))
        # Group g's j-th use is at time (j + offset) / weight; uses up to time t number t +- groups.
        horizon = steps + len(groups) + 1
        times, members = [], []
        for index, (weight, offset) in enumerate(zip(weights, offsets, strict=True)):
            if weight > 0:
                uses = np.arange(int(horizon * weight) + 2)
                times.append((uses + offset) / weight)
                members.append(np.full(uses.size, index))
        time, member = np.concatenate(times), np.concatenate(members)
        order = np.lexsort((member, time))[:steps]
        self._group_of_step = member[order]
        self._use_of_step = np.zeros(steps, np.int64)
        for index in np.unique(self._group_of_step):
            steps_of_group = np.flatnonzero(self._group_of_step == index)
            self._use_of_step[steps_of_group] = np.arange(steps_of_group.size)

    def group(self, step: int) -> Group:
        return self.groups[self._group_of_step[step]]

    def rows(self, step: int) -> np.ndarray:
        """int64 [batch_size] rows of the token store for step `step` (0-based)."""
        group_index = int(self._group_of_step[step])
        first = int(self._use_of_step[step]) * self.batch_size
        return stream(self.groups[group_index], group_index, self.seed, first, self.batch_size)


class MixedSchedule(Schedule):
    """A schedule whose batches hold rows of all groups.

    Row i of the run is what step i of a `Schedule` of batches of one row would be; it is found
    without walking through the rows before it.
    """

    def __post_init__(self):
        groups = self.groups
        self._weights = group_weights(groups, self.language_exponent)
        self._offsets = np.random.Generator(np.random.Philox(self.seed)).random(len(groups))
        self._mixed = Group(groups[0].task, "mixed", 0, max(group.stop for group in groups), 1.0)

    def group(self, step: int) -> Group:
        """A name for the batch: rows of all groups."""
        del step
        return self._mixed

    def rows(self, step: int) -> np.ndarray:
        """int64 [batch_size] rows of the token store for step `step` (0-based)."""
        first, count = step * self.batch_size, self.batch_size
        # Uses before a time are that time, more or less one per group.
        used = np.ceil(self._weights * (first - len(self.groups)) - self._offsets)
        used = np.maximum(used, 0).astype(np.int64)
        end = first + count + len(self.groups)
        times, members, uses = [], [], []
        for index, (weight, offset) in enumerate(zip(self._weights, self._offsets, strict=True)):
            if weight > 0:
                use = np.arange(used[index], int(end * weight) + 2)
                times.append((use + offset) / weight)
                members.append(np.full(use.size, index))
                uses.append(use)
        time, member, use = (np.concatenate(parts) for parts in (times, members, uses))
        skipped = first - int(used.sum())
        order = np.lexsort((member, time))[skipped : skipped + count]
        rows = np.zeros(count, np.int64)
        for index in np.unique(member[order]).tolist():
            places = np.flatnonzero(member[order] == index)
            first_use = int(use[order][places[0]])
            rows[places] = stream(self.groups[index], index, self.seed, first_use, len(places))
        return rows


def stream(group: Group, group_index: int, seed: int, first: int, count: int) -> np.ndarray:
    """Rows number `first` to `first + count - 1` of the endless stream of a group, int64."""
    # Here: grain brings Orbax along, and plans and reports draw no rows.
    from grain.experimental import index_shuffle

    rows = []
    while len(rows) < count:
        epoch, position = divmod(first + len(rows), group.rows)
        # 32 bits, different for every (run seed, group, epoch)
        epoch_seed = np.random.SeedSequence((seed, group_index, epoch)).generate_state(1)[0]
        end = min(group.rows, position + count - len(rows))
        for i in range(position, end):
            rows.append(index_shuffle(i, max_index=group.rows - 1, seed=int(epoch_seed), rounds=4))
    return group.start + np.array(rows, np.int64)
