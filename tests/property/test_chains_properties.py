# SPDX-License-Identifier: Apache-2.0
"""Chains of hosts: whatever joins, leaves and is slow, every host has a way to the image."""

from __future__ import annotations

import unittest
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from imagecache_lib.precache.chains import FEW, Chains, culprit
from imagecache_lib.precache.replan import Replanner

NAMES = st.sampled_from([f"host-{number}" for number in range(12)])
SITES = st.sampled_from(["", "north", "south"])


class ChainsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.chains = Chains(heads=2)
        self.replanner = Replanner(self.chains)
        self.sites: dict[str, str] = {}
        self.now = 0.0
        self.received: dict[str, int] = {}

    @rule(host=NAMES, site=SITES)
    def join(self, host: str, site: str) -> None:
        self.chains.join(host, site)
        self.sites.setdefault(host, site)

    @rule(host=NAMES)
    def leave(self, host: str) -> None:
        self.chains.leave(host)
        self.replanner.forget(host)
        self.sites.pop(host, None)

    @rule(host=NAMES)
    def move(self, host: str) -> None:
        before = [chain for chain in self.chains.all() if host in chain]
        moved = self.chains.move_to_end(host)
        if before:
            ((chain,),) = ([chain for chain in self.chains.all() if host in chain],)
            assert moved == (before[0][-1] != host)
            assert [each for each in before[0] if each != host] == chain[:-1]

    @rule(rates=st.lists(st.integers(0, 100), min_size=12, max_size=12), seconds=st.integers(1, 5))
    def report(self, rates: list[int], seconds: int) -> None:
        self.now += seconds
        for host, rate in zip(list(self.sites), rates, strict=False):
            self.received[host] = self.received.get(host, 0) + rate * seconds
            self.replanner.heard(host, self.received[host], now=self.now, is_over=False)
        before = {host: chain for chain in self.chains.all() for host in chain}
        moved = self.replanner.decide(self.now)
        for host in moved:
            assert before[host][-1] != host  # the last one holds up no other
        for chain in before.values():
            assert sum(host in moved for host in chain) <= 1

    @invariant()
    def every_host_has_a_way_to_the_image_service(self) -> None:
        for host in self.sites:
            seen = set()
            at = host
            while not self.chains.is_head(at):
                assert at not in seen
                seen.add(at)
                parent = self.chains.parent(at)
                assert parent is not None
                assert self.chains.child(parent) == at
                at = parent
            assert self.chains.route(at).origin

    @invariant()
    def chains_hold_each_host_once_and_stay_in_their_site(self) -> None:
        found = [host for chain in self.chains.all() for host in chain]
        assert sorted(found) == sorted(self.sites)
        assert len(self.chains) == len(found)
        for chain in self.chains.all():
            assert len({self.sites[host] for host in chain}) == 1

    @invariant()
    def few_ask_the_image_service(self) -> None:
        for site in ("", "north", "south"):
            assert len(self.chains.heads(site)) <= 2

    @invariant()
    def a_host_knows_those_before_it_and_never_itself(self) -> None:
        for chain in self.chains.all():
            for at, host in enumerate(chain):
                route = self.chains.route(host)
                assert list(route.parents[:3]) == chain[max(0, at - 3) : at][::-1]
                assert route.parents[-1:] in ((), (chain[0],)) or chain[0] in route.parents
                assert len(set(route.parents)) == len(route.parents) <= 4
                assert host not in route.parents
                assert route.origin == (at == 0)


TestChains = ChainsMachine.TestCase
TestChains.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class TestPlan(unittest.TestCase):
    @given(st.integers(1, 40), st.integers(1, 4))
    def test_chains_of_a_site_are_about_as_long(self, hosts: int, heads: int) -> None:
        chains = Chains(heads=heads)
        for number in range(hosts):
            chains.join(str(number), site_size=hosts)
        lengths = [len(chain) for chain in chains.all()]
        self.assertEqual(hosts if hosts <= FEW else min(heads, hosts), len(lengths))
        self.assertLessEqual(max(lengths) - min(lengths), 1)

    @given(st.integers(2, 30), st.data())
    def test_the_culprit_is_the_one_before_the_topmost_that_failed(
        self, hosts: int, data: st.DataObject
    ) -> None:
        chains = Chains(heads=1)
        for number in range(hosts):
            chains.join(str(number))
        wrong = data.draw(st.integers(0, hosts - 1))
        before = {str(number): chains.parent(str(number)) for number in range(wrong + 1, hosts)}
        chains.move_to_end(str(wrong))  # which changes nothing of what was
        self.assertLessEqual({culprit(host, before) for host in before}, {str(wrong)})
        before = {str(number): str(number - 1) if number else None for number in range(hosts)}
        self.assertEqual({None}, {culprit(host, before) for host in before})


def simulate(
    rate_of: Callable[[Chains, str], float], *, hosts: int = 16, seconds: int = 40, heads: int = 1
) -> tuple[Chains, list[str]]:
    """Let a chain receive for a while, one report a host every two seconds. Returns what was moved.

    :param rate_of: the most that a host can receive now, in bytes per second.
    """
    chains = Chains(heads=heads)
    names = [f"h{number:02}" for number in range(hosts)]
    for name in names:
        chains.join(name)
    replanner, received, moved = Replanner(chains), dict.fromkeys(names, 0.0), []
    for second in range(1, seconds):
        for chain in chains.all():
            for host in chain:
                parent = chains.parent(host)
                most = received[parent] - received[host] if parent is not None else 1e9
                received[host] += max(0.0, min(most, rate_of(chains, host)))
        if second % 2 == 0:
            for host in names:
                replanner.heard(host, int(received[host]), now=float(second), is_over=False)
            moved += replanner.decide(float(second))
    return chains, moved


class TestReplanning(unittest.TestCase):
    @settings(max_examples=30)
    @given(st.integers(1, 14))
    def test_a_host_that_receives_slowly_is_moved_and_no_other(self, slow: int) -> None:
        name = f"h{slow:02}"
        _chains, moved = simulate(lambda _chains, host: 10.0 if host == name else 100.0)
        self.assertEqual([name], moved)

    @settings(max_examples=30)
    @given(st.integers(0, 12))
    def test_a_host_that_sends_slowly_ends_where_it_sends_to_none(self, slow: int) -> None:
        name = f"h{slow:02}"
        chains, moved = simulate(
            lambda chains, host: 10.0 if chains.parent(host) == name else 100.0, seconds=60
        )
        self.assertIsNone(chains.child(name))
        self.assertLessEqual(len(moved), 3)

    @given(st.floats(0.6, 1.0), st.integers(0, 1000))
    def test_a_chain_in_order_is_left_alone(self, least: float, seed: int) -> None:
        _chains, moved = simulate(
            lambda _chains, host: 100.0 * (least + (1 - least) * (hash((host, seed)) % 100) / 100)
        )
        self.assertEqual([], moved)

    @given(st.lists(st.integers(0, 9), min_size=15, max_size=15))
    def test_hosts_that_begin_later_than_those_before_them_are_left_alone(self, waits: list[int]) -> None:
        begins = {f"h{number:02}": sum(waits[:number]) // 3 for number in range(16)}
        calls: dict[str, int] = {}

        def rate_of(_chains: Chains, host: str) -> float:
            calls[host] = calls.get(host, 0) + 1
            return 100.0 if calls[host] > begins[host] else 0.0

        _chains, moved = simulate(rate_of, seconds=60)
        self.assertEqual([], moved)

    def test_a_slow_head_is_replaced_when_there_is_another(self) -> None:
        chains, moved = simulate(lambda _chains, host: 10.0 if host == "h00" else 100.0, heads=2)
        self.assertEqual(["h00"], moved)
        self.assertNotIn("h00", chains.heads())


if __name__ == "__main__":
    unittest.main()
