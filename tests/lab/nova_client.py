# SPDX-License-Identifier: Apache-2.0
"""Nova's API as its users call it: over HTTP, and with nothing of Nova's own code."""

from __future__ import annotations

import dataclasses
from typing import Any

import requests

from tests.lab import glance, server

#: The newest that the tests want: servers without a network, hosts' requests, images cached for an aggregate.
_VERSION = "2.90"
_SECONDS = 240.0
#: Between two questions. The service answers each with some tens of milliseconds of the processors that its
#: work needs too.
_EVERY = 0.3


@dataclasses.dataclass(frozen=True)
class NovaClient:
    """Somebody who calls Nova.

    :param url: of the API, with its version.
    :param token: says who: ``user:project:role``.
    """

    url: str
    token: str = glance.ADMIN

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Make one call; return the JSON of its answer, if there is any.

        :raises AssertionError: it is refused, with what was said.
        """
        headers = {"X-Auth-Token": self.token, "OpenStack-API-Version": f"compute {_VERSION}"}
        answer = requests.request(method, self.url + path, json=body, headers=headers, timeout=_SECONDS)
        if answer.status_code >= 400:
            raise AssertionError(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json() if answer.content else None

    def flavor(self, *, disk: int = 1, swap: int = 0, ephemeral: int = 0) -> str:
        """Make a flavor and return its id.

        :param disk: GiB of the root disk.
        :param swap: MiB.
        :param ephemeral: GiB.
        """
        name = f"disk{disk}-swap{swap}-ephemeral{ephemeral}"
        fields = {"name": name, "ram": 64, "vcpus": 1, "disk": disk, "swap": swap}
        known = self.call("GET", "/flavors")["flavors"]
        found = [each["id"] for each in known if each["name"] == name]
        if found:
            return str(found[0])
        made = self.call("POST", "/flavors", {"flavor": fields | {"OS-FLV-EXT-DATA:ephemeral": ephemeral}})
        return str(made["flavor"]["id"])

    def boot(self, image: str, flavor: str, *, wait: bool = True, **fields: object) -> str:
        """Boot a guest without a network, and return its id when it is active."""
        request = {"name": "guest", "imageRef": image, "flavorRef": flavor, "networks": "none", **fields}
        found = str(self.call("POST", "/servers", {"server": request})["server"]["id"])
        if wait:
            self.wait(found, "ACTIVE")
        return found

    def show(self, guest: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/servers/{guest}")["server"]
        return found

    def act(self, guest: str, action: str, arguments: object = None, *, until: str | None = None) -> Any:
        """Ask for an action.

        :param until: the status to wait for.
        """
        answer = self.call("POST", f"/servers/{guest}/action", {action: arguments})
        if until is not None:
            self.wait(guest, until)
        return answer

    def wait(self, guest: str, status: str) -> None:
        """Wait until a guest has that status and nothing is being done to it.

        :raises AssertionError: it failed, with what Nova says.
        """

        def done() -> bool:
            found = self.show(guest)
            if found["status"] == "ERROR":
                raise AssertionError(f"{guest}: {found.get('fault')}")
            return bool(found["status"] == status and found["OS-EXT-STS:task_state"] is None)

        server.wait_until(done, f"{guest} is {status}", seconds=_SECONDS, every=_EVERY)

    def console(self, guest: str) -> str:
        """Return what the guest has said on its serial console."""
        return str(self.act(guest, "os-getConsoleOutput", {})["output"])

    def says(self, guest: str, words: str) -> None:
        """Wait until the guest has said this."""
        server.wait_until(
            lambda: words in self.console(guest), f"{guest} says {words}", seconds=_SECONDS, every=_EVERY
        )

    def delete(self, *guests: str) -> None:
        """Delete guests, and wait until Nova has forgotten them."""
        for guest in guests:
            self.call("DELETE", f"/servers/{guest}")

        def gone() -> bool:
            return not {each["id"] for each in self.call("GET", "/servers")["servers"]}.intersection(guests)

        server.wait_until(gone, f"{guests} are gone", seconds=_SECONDS, every=_EVERY)
