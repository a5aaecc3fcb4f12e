# SPDX-License-Identifier: Apache-2.0
"""The model of power cuts: it leaves what was synced, may lose anything else, and tears nothing atomic."""

from __future__ import annotations

import random
import unittest

from hypothesis import given
from hypothesis import strategies as st

from tests.support.crash_states import (
    PIECE,
    ROOT,
    Attribute,
    Data,
    File,
    Mark,
    Names,
    Recording,
    Size,
    State,
    Step,
    SyncDirectory,
    SyncFile,
    pieces,
)

FILE, OTHER, DIRECTORY = 10, 11, 20

STEPS = st.one_of(
    st.builds(
        lambda name, node: Names(((ROOT, name, node),)),
        st.sampled_from("abc"),
        st.sampled_from((FILE, OTHER)),
    ),
    st.builds(lambda name: Names(((ROOT, name, None),)), st.sampled_from("abc")),
    st.builds(
        Data, st.sampled_from((FILE, OTHER)), st.sampled_from((0, PIECE)), st.binary(min_size=1, max_size=2)
    ),
    st.builds(Size, st.sampled_from((FILE, OTHER)), st.integers(0, 3), st.booleans()),
    st.builds(Attribute, st.sampled_from((FILE, OTHER)), st.just("user.a"), st.sampled_from((b"1", None))),
    st.builds(SyncFile, st.sampled_from((FILE, OTHER)), st.booleans()),
    st.just(SyncDirectory(ROOT)),
)


def recording(*steps: Step) -> Recording:
    return Recording({ROOT: {}}, {}, steps)


def states(made: Recording, cut: int | None = None) -> list[State]:
    last = len(made.steps) if cut is None else cut
    return [made.state(present) for present in made.all_states(last)]


def content(state: State, path: str) -> bytes:
    found = state[path]
    assert found is not None
    return found[1].data


class TestRules(unittest.TestCase):
    def test_a_synced_file_without_a_synced_name_may_be_gone_but_is_never_torn(self) -> None:
        data = bytes(range(256)) * 32
        made = recording(Names(((ROOT, "a", FILE),)), *pieces(FILE, 0, data), SyncFile(FILE))
        self.assertEqual([{}, {"a": (FILE, File(data))}], states(made))

    def test_a_synced_name_of_a_file_that_was_not_synced_may_hold_any_of_its_pieces(self) -> None:
        made = recording(Names(((ROOT, "a", FILE),)), *pieces(FILE, 0, b"x" * 2 * PIECE), SyncDirectory(ROOT))
        empty, zeros = b"", bytes(PIECE)
        piece = b"x" * PIECE
        self.assertEqual(
            {empty, zeros + zeros, piece + zeros, zeros + piece, piece + piece},
            {content(state, "a") for state in states(made)},
        )

    def test_a_rename_is_there_or_not_and_never_loses_both_names(self) -> None:
        before = Recording(
            {ROOT: {"a": FILE}}, {FILE: File(b"x")}, [Names(((ROOT, "b", FILE), (ROOT, "a", None)))]
        )
        self.assertEqual([["a"], ["b"]], [sorted(state) for state in states(before)])

    def test_a_move_into_a_directory_brings_the_directory_with_it(self) -> None:
        made = Recording(
            {ROOT: {"a": FILE}},
            {FILE: File(b"x")},
            [
                Names(((ROOT, "d", DIRECTORY),), makes=DIRECTORY),
                Names(((DIRECTORY, "b", FILE), (ROOT, "a", None))),
            ],
        )
        self.assertEqual({("a",), ("a", "d"), ("d", "d/b")}, {tuple(sorted(state)) for state in states(made)})

    def test_a_directory_that_is_not_empty_stays(self) -> None:
        made = Recording(
            {ROOT: {"d": DIRECTORY}, DIRECTORY: {"a": FILE}},
            {FILE: File(b"x")},
            [Names(((ROOT, "a", FILE), (DIRECTORY, "a", None))), Names(((ROOT, "d", None),))],
        )
        found = {tuple(sorted(state)) for state in states(made)}
        self.assertEqual({("d", "d/a"), ("a", "d"), ("a",)}, found)

    def test_fdatasync_leaves_attributes_behind(self) -> None:
        first = Recording({ROOT: {"a": FILE}}, {FILE: File(b"")}, [Attribute(FILE, "user.a", b"1")])
        for attributes, expected in ((False, 2), (True, 1)):
            made = Recording(first.directories, first.files, [*first.steps, SyncFile(FILE, attributes)])
            self.assertEqual(expected, len(states(made)))

    def test_what_was_said_before_a_moment_is_known(self) -> None:
        made = recording(Mark("one"), Names(((ROOT, "a", FILE),)), Mark("two"))
        self.assertEqual([set(), {"one"}, {"one", "two"}], [set(made.marks(cut)) for cut in (0, 2, 3)])


class TestProperties(unittest.TestCase):
    @given(st.lists(STEPS, max_size=9))
    def test_everything_and_nothing_are_among_the_states_of_a_moment(self, steps: list[Step]) -> None:
        made = recording(*steps)
        durable, waiting = made.parts(len(steps))
        found = states(made)
        self.assertIn(made.state(durable | frozenset(waiting)), found)
        self.assertIn(made.state(durable), found)

    @given(st.lists(STEPS, max_size=9), st.integers())
    def test_what_is_chosen_at_random_is_among_all_states(self, steps: list[Step], seed: int) -> None:
        made = recording(*steps)
        for cut in made.cuts():
            present = made.some_state(cut, random.Random(seed))
            self.assertIn(made.state(present), states(made, cut))

    @given(st.lists(STEPS, max_size=7))
    def test_the_moments_have_the_states_of_every_other_moment(self, steps: list[Step]) -> None:
        made = recording(*steps)
        found = [state for cut in made.cuts() for state in states(made, cut)]
        for cut in range(len(steps) + 1):
            for state in states(made, cut):
                self.assertIn(state, found)

    @given(st.lists(STEPS, max_size=9))
    def test_after_syncing_everything_one_state_is_left(self, steps: list[Step]) -> None:
        made = recording(*steps, SyncFile(FILE), SyncFile(OTHER), SyncDirectory(ROOT))
        self.assertEqual(1, len(states(made)))
        self.assertEqual(1, made.count(len(made.steps)))
