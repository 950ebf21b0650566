import dataclasses

import numpy as np
import pytest

from moe_embed_jax.data.schedule import (
    Group,
    MixedSchedule,
    Schedule,
    group_weights,
    mixture_groups,
)
from moe_embed_jax.errors import UserError

GROUPS = [
    Group("translations", "de", 0, 100, 0.6),
    Group("translations", "fr", 100, 130, 0.6),
    Group("translations", "yo", 130, 137, 0.6),
    Group("api", "en", 137, 200, 0.4),
]


def test_one_group_per_batch_and_nothing_dropped():
    """Every group is read epoch by epoch without a gap: remainders are carried over."""
    schedule = Schedule(GROUPS, batch_size=16, steps=200, seed=1)
    seen = {group.name: [] for group in GROUPS}
    for step in range(200):
        group, rows = schedule.group(step), schedule.rows(step)
        assert rows.shape == (16,)
        assert ((rows >= group.start) & (rows < group.stop)).all()
        seen[group.name] += rows.tolist()
    for group in GROUPS:
        stream = seen[group.name]
        epochs = len(stream) // group.rows
        assert epochs >= 1
        for epoch in range(epochs):
            rows = stream[epoch * group.rows : (epoch + 1) * group.rows]
            assert sorted(rows) == list(range(group.start, group.stop))
    first, second = seen["translations/de"][:100], seen["translations/de"][100:200]
    assert first != second  # another permutation each epoch


def test_shares_follow_the_weights_at_any_time():
    schedule = Schedule(GROUPS, 8, steps=1000, seed=0)
    weights = group_weights(GROUPS, 1.0)
    np.testing.assert_allclose(weights, [0.6 * 100 / 137, 0.6 * 30 / 137, 0.6 * 7 / 137, 0.4])
    counts = np.zeros(4)
    for step in range(1000):
        counts[GROUPS.index(schedule.group(step))] += 1
        # Each group's uses are evenly spaced, up to the phases of the others.
        assert (np.abs(counts - (step + 1) * weights) < len(GROUPS)).all()


def test_language_exponent_smooths_within_a_task():
    weights = group_weights(GROUPS, 0.3)
    share = np.array([100, 30, 7]) ** 0.3
    np.testing.assert_allclose(weights[:3], 0.6 * share / share.sum())
    assert weights[3] == pytest.approx(0.4)


def test_the_first_steps_do_not_depend_on_how_many_follow():
    short, long = (Schedule(GROUPS, 8, steps, seed=5) for steps in (20, 5000))
    for step in range(20):
        assert short.group(step) == long.group(step)
        np.testing.assert_array_equal(short.rows(step), long.rows(step))


def test_a_run_may_have_rates_of_its_own():
    stored = [dataclasses.asdict(group) for group in GROUPS]
    assert mixture_groups(stored, None) == GROUPS
    groups = mixture_groups(stored, {"api": 2})
    assert groups == [Group("api", "en", 137, 200, 2.0)]
    with pytest.raises(UserError, match=r"there is no task apis; tasks: api, translations"):
        mixture_groups(stored, {"apis": 1})


def test_seed_changes_the_order():
    a, b = (Schedule(GROUPS, 8, 20, seed) for seed in (0, 1))
    assert any((a.rows(step) != b.rows(step)).any() for step in range(20))


@pytest.mark.parametrize("kind", [Schedule, MixedSchedule])
def test_groups_of_one_size_have_orders_of_their_own(kind):
    groups = [Group("api", "de", 0, 50, 1.0), Group("api", "fr", 50, 100, 1.0)]
    schedule = kind(groups, batch_size=10, steps=10, seed=1)
    rows = np.concatenate([schedule.rows(step) for step in range(10)])
    first, second = (rows[rows < 50], rows[rows >= 50] - 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert np.mean(first == second) < 0.2


def test_bad_groups_are_named():
    with pytest.raises(UserError, match="group api/en has no rows"):
        group_weights([Group("api", "en", 5, 5, 1.0)], 1.0)
    with pytest.raises(UserError, match="rate of task api is -1"):
        group_weights([Group("api", "en", 0, 5, -1.0)], 1.0)
    with pytest.raises(UserError, match="add up to 0"):
        group_weights([Group("api", "en", 0, 5, 0.0)], 1.0)
