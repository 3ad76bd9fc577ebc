"""Packing of episodes into segments."""

import numpy as np
import pytest

from blpo_rllib.core.segments import layout_segments, pack_segments


def flat_batch(lengths, terminated):
    """Loss mask and terminated flags of episodes laid end to end, each with its extra item."""
    is_step = np.concatenate([[True] * n + [False] for n in lengths])
    ends = np.concatenate([[False] * (n - 1) + [t, False] if n else [False] for n, t in zip(lengths, terminated)])
    return is_step, ends.astype(bool)


@pytest.mark.parametrize("seed", range(20))
def test_every_step_is_packed_once_and_segments_are_nearly_equal(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 60, rng.integers(1, 40)).tolist() + [int(rng.integers(1, 700))]
    num_segments = int(rng.integers(1, max(2, sum(lengths) // 3)))
    rows = pack_segments(lengths, num_segments)
    packed = sorted((p.episode, t) for row in rows for p in row for t in range(p.start, p.start + p.length))
    assert packed == [(episode, t) for episode, n in enumerate(lengths) for t in range(n)]
    sizes = [sum(piece.length for piece in row) for row in rows]
    fair = sum(lengths) / num_segments
    assert min(sizes) >= min(0.9 * fair, fair - 1)
    assert max(sizes) <= 1.05 * fair + 1


def test_whole_rollouts_stay_whole():
    assert [[(p.start, p.length) for p in row] for row in pack_segments([128] * 4, 4)] == [[(0, 128)]] * 4
    rows = pack_segments([128, 40, 90, 37, 87, 128], 4)
    assert all(piece.start == 0 for row in rows for piece in row)


def test_too_few_steps_for_the_segments():
    with pytest.raises(ValueError, match="cannot fill 5 segments with 3 steps"):
        pack_segments([3], 5)


@pytest.mark.parametrize("seed", range(10))
def test_layout_puts_the_right_observation_behind_every_step(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 25, 12).tolist() + [40]
    is_step, terminated = flat_batch(lengths, rng.random(13) < 0.5)
    layout = layout_segments(is_step, terminated, 5)
    assert sorted(layout.index[layout.step]) == np.flatnonzero(is_step).tolist()
    for row in range(5):
        for t in np.flatnonzero(layout.step[row]):
            position = layout.index[row, t]
            if not terminated[position]:
                assert layout.index[row, t + 1] == position + 1
            if layout.continues[row, t]:
                assert layout.step[row, t + 1]
                assert is_step[position + 1]


@pytest.mark.parametrize(
    ("steps", "most", "width"), [(1, 32, 2), (13, 32, 14), (33, 32, 36), (250, 32, 256), (33, 1, 34)]
)
def test_segments_are_not_much_wider_than_their_slots(steps, most, width):
    is_step, terminated = flat_batch([steps], [False])
    assert layout_segments(is_step, terminated, 1, most).step.shape == (1, width)


def test_layout_by_hand():
    is_step, terminated = flat_batch([2, 3], [True, False])
    layout = layout_segments(is_step, terminated, 1)
    # The longer episode (items 3, 4, 5; truncated, so item 6 follows) comes first, then the terminated one (0, 1).
    assert layout.index.tolist() == [[3, 4, 5, 6, 0, 1]]
    assert layout.step.tolist() == [[True, True, True, False, True, True]]
    assert layout.continues.tolist() == [[True, True, False, False, True, False]]
