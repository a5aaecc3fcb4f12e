# SPDX-License-Identifier: Apache-2.0
"""Agents in this very process: one machine without a message bus, or a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from imagecache_lib.precache import client
from imagecache_lib.precache.agent import HostAgent


class InProcessClient(client.HostClient):
    """Reaches agents by calling them.

    :param agents: the agents, by the name of their host.
    :param idle: names of hosts that have no agent here, and are known to do nothing for any job.
    """

    def __init__(self, agents: Mapping[str, HostAgent], *, idle: Collection[str] = ()) -> None:
        self._agents = agents
        self._idle = frozenset(idle)

    def survey(self, host: str, image_ids: Sequence[str]) -> client.Survey:
        agent = self._agent(host)
        return dataclasses.replace(agent.survey(image_ids), agent=agent.info())

    def begin(self, host: str, task: client.HostTask) -> client.AgentInfo:
        agent = self._agent(host)
        agent.begin(task)
        return agent.info()

    def poll(self, host: str, job_id: str) -> client.TaskReport:
        agent = self._agent(host)
        try:
            return agent.poll(job_id)
        except client.UnknownTask as error:
            error.agent = agent.info()
            raise

    def cancel(self, host: str, job_id: str) -> None:
        if host not in self._idle:
            self._agent(host).cancel(job_id)

    def release(self, host: str, job_id: str) -> None:
        if host in self._agents:
            self._agents[host].release(job_id)

    def _agent(self, host: str) -> HostAgent:
        try:
            return self._agents[host]
        except KeyError:
            raise client.HostDown(f"there is no agent for host {host}", next_step="start one") from None
