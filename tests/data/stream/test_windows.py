"""Windows against a plain loop over users and predictions."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from antdist import ragged
from antdist.data.stream.windows import concatenate_windows, prefix_windows, user_windows

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def _unpack(windows):
    """(user, tokens, [(position in the window, target)]) of each window."""
    unpacked = []
    for w, user in enumerate(windows.users.tolist()):
        begin, end = windows.offsets[w], windows.offsets[w + 1]
        p = slice(windows.first_prediction[w], windows.first_prediction[w + 1])
        assert ((windows.predict_at[p] >= begin) & (windows.predict_at[p] < end)).all()
        predictions = zip((windows.predict_at[p] - begin).tolist(), windows.targets[p].tolist(), strict=True)
        unpacked.append((user, windows.items[begin:end].tolist(), list(predictions)))
    return unpacked


def _naive_user(items, max_length):
    inputs, windows, start, predicted = items[:-1], [], 0, 0
    while predicted < len(inputs):
        tokens = inputs[start : start + max_length]
        windows.append((tokens, [(i - start, items[i + 1]) for i in range(predicted, start + len(tokens))]))
        predicted, start = start + len(tokens), start + max(1, max_length // 2)
    return windows


@given(lengths, st.integers(1, 12))
def test_user_windows_equal_a_loop(lengths, max_length):
    lengths = np.array(lengths)
    begin, items = ragged.offsets(lengths + 2)[:-1], np.arange(1000, 1000 + (lengths + 2).sum())
    users = np.arange(len(lengths)) * 10
    windows = user_windows(items, begin, lengths, users, max_length)
    expected = [
        (int(users[u]), tokens, predictions)
        for u, (b, n) in enumerate(zip(begin, lengths, strict=True))
        for tokens, predictions in _naive_user(items[b : b + n].tolist(), max_length)
    ]
    assert _unpack(windows) == expected
    assert np.diff(windows.first_window).tolist() == [sum(e[0] == u for e in expected) for u in users]


@given(lengths, st.integers(1, 12))
def test_predictions_occur_once_with_half_a_window_of_context(lengths, max_length):
    lengths = np.array(lengths)
    begin, items = ragged.offsets(lengths)[:-1], np.arange(lengths.sum())
    windows = user_windows(items, begin, lengths, np.arange(len(lengths)), max_length)
    made = [target for _, _, predictions in _unpack(windows) for _, target in predictions]
    assert sorted(made) == sorted(set(items.tolist()) - set(begin.tolist()))
    for user, tokens, predictions in _unpack(windows):
        assert len(tokens) <= max_length and predictions
        for position, target in predictions:
            assert tokens[: position + 1] == list(range(target - position - 1, target))
            assert position + 1 >= min(max_length / 2, target - begin[user])


@given(lengths, st.integers(1, 12), st.randoms())
def test_prefix_windows_are_the_last_items_before_the_target(lengths, max_length, random):
    lengths = np.array(lengths) + 1
    begin, items = ragged.offsets(lengths)[:-1], np.arange(lengths.sum()) * 3
    wanted = [(u, t) for u, n in enumerate(lengths) for t in range(1, n)]
    random.shuffle(wanted)
    user, position = np.array(wanted).T
    windows = prefix_windows(items, begin[user], position, user, max_length)
    expected = []
    for u, t in wanted:
        history = items[begin[u] : begin[u] + t][-max_length:].tolist()
        expected.append((u, history, [(len(history) - 1, int(items[begin[u] + t]))]))
    assert _unpack(windows) == expected


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=6))
def test_ranges(runs):
    begin, lengths = np.array(runs, dtype=np.int64).reshape(-1, 2).T
    assert ragged.ranges(begin, lengths).tolist() == [b + i for b, n in runs for i in range(n)]


def test_concatenate_joins_slices_of_pieces():
    first = user_windows(np.arange(30), np.array([0, 10]), np.array([9, 4]), np.array([1, 2]), 4)
    second = user_windows(np.arange(100, 130), np.array([0, 10]), np.array([3, 6]), np.array([3, 4]), 4)
    joined = concatenate_windows([(first, 1, 2), (second, 0, 1), (second, 1, 2)])
    assert joined["items"].tolist() == [10, 11, 12, 100, 101, 110, 111, 112, 113, 112, 113, 114]
    assert joined["offsets"].tolist() == [0, 3, 5, 9, 12]
    assert joined["predict_at"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 11]
    assert joined["targets"].tolist() == [11, 12, 13, 101, 102, 111, 112, 113, 114, 115]
    assert joined["users"].tolist() == [2, 3, 4, 4]
