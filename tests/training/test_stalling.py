"""When a silence of the training's process is told of, and when it is ended."""

import pytest

from autofit.training.stalling import ENDED_SECONDS, TOLD_SECONDS, Listener, Silence


class Watched:
    """A listener with a clock of its own, asked once a second."""

    def __init__(self):
        self.now = 0.0
        self.listener = Listener(lambda: self.now)

    def __call__(self, record, seconds, every=1.0):
        """What is said while the record stays the same for so long: (when, what)."""
        said = []
        for _ in range(int(seconds / every)):
            self.now += every
            what = self.listener.hears(record)
            if what is not None:
                said.append((self.listener.seconds, what))
        return said


def test_a_silence_is_told_of_once_and_then_ended():
    watched = Watched()
    for step in range(1, 5):
        assert not watched({"phase": "train", "step": step}, 20)
    said = watched({"phase": "train", "step": 5}, ENDED_SECONDS + 1)
    assert said == [(TOLD_SECONDS, Silence.TELL), (ENDED_SECONDS, Silence.END)]


def test_each_silence_is_told_of():
    watched = Watched()
    watched({"phase": "train", "step": 1}, 1)
    assert len(watched({"phase": "train", "step": 2}, TOLD_SECONDS + 20)) == 1
    # Ten times as long as the longest so far.
    assert not watched({"phase": "train", "step": 3}, TOLD_SECONDS + 20)
    assert watched({"phase": "train", "step": 4}, TOLD_SECONDS * 11)[0][0] == pytest.approx(
        10 * (TOLD_SECONDS + 20), 0.01
    )


def test_slow_steps_are_no_silence():
    watched = Watched()
    for step in range(1, 10):
        assert not watched({"phase": "train", "step": step}, TOLD_SECONDS - 1)
    assert not watched({"phase": "eval", "step": 10}, TOLD_SECONDS * 9, every=5)
    (told,) = watched({"phase": "train", "step": 11}, ENDED_SECONDS * 10 * 9, every=5)[:1]
    assert told[1] is Silence.TELL


def test_before_the_first_step_it_is_only_told_of():
    watched = Watched()
    assert watched({}, TOLD_SECONDS * 20) == [(TOLD_SECONDS, Silence.TELL)]
    assert watched({"phase": "build"}, TOLD_SECONDS * 20) == [(TOLD_SECONDS, Silence.TELL)]
    assert not watched({"phase": "train", "step": 1}, 100)
    # What the start took says nothing about steps.
    assert watched({"phase": "train", "step": 2}, ENDED_SECONDS * 2)[-1][1] is Silence.END


def test_what_was_asleep_with_the_listener_is_not_counted():
    watched = Watched()
    watched({"phase": "train", "step": 1}, 10)
    watched({"phase": "train", "step": 2}, 10)
    watched.now += 10 * ENDED_SECONDS
    assert not watched({"phase": "train", "step": 2}, 10)
