# SPDX-License-Identifier: Apache-2.0
"""The OpenStack cloud that the environment names: who authenticates, and what names mean there.

``OS_CLOUD`` names an entry of clouds.yaml, which openstacksdk reads. Otherwise ``OS_AUTH_URL`` and the other
variables of OpenStack's clients say it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any

from imagecache_lib import errors
from imagecache_lib.cli import values

_DEFAULT_INTERFACE = "public"


def is_named(environment: Mapping[str, str]) -> bool:
    """Whether the environment is meant to say where to authenticate."""
    return any(environment.get(name) for name in ("OS_CLOUD", "OS_AUTH_URL", "OS_AUTH_TYPE"))


def session(environment: Mapping[str, str]) -> Any:
    """Return a keystoneauth session.

    :raises ConfigError: what it takes is not installed, or the environment does not say how to authenticate.
    """
    if environment.get("OS_CLOUD"):
        return _session_of_cloud(environment["OS_CLOUD"])
    try:
        from keystoneauth1 import exceptions, loading
        from keystoneauth1 import session as sessions
    except ImportError:
        raise errors.ConfigError(
            "OS_AUTH_URL is set, and keystoneauth1 is not installed",
            next_step="install imagecache-lib[glance], or give --glance-endpoint with OS_TOKEN",
        ) from None
    kind = environment.get("OS_AUTH_TYPE") or ("token" if "OS_TOKEN" in environment else "password")
    _require_user(kind, environment)
    try:
        loader: Any = loading.get_plugin_loader(kind)
        given = {option.dest: environment.get(f"OS_{option.dest.upper()}") for option in loader.get_options()}
        auth = loader.load_from_options(**{name: value for name, value in given.items() if value})
    except exceptions.ClientException as error:
        raise errors.ConfigError(
            f"the OS_ variables do not say how to authenticate: {error}", next_step="correct them"
        ) from error
    return sessions.Session(auth=auth, verify=environment.get("OS_CACERT") or True)


def interface(environment: Mapping[str, str]) -> str:
    """Return which of a service's endpoints is meant: ``public``, ``internal`` or ``admin``."""
    return environment.get("OS_INTERFACE") or _DEFAULT_INTERFACE


def hosts_of(aggregate: str) -> list[str]:
    """Return the hosts of a host aggregate, by its name or number, as the compute service has them.

    :raises ConfigError: there is no such aggregate, or this user may not see it.
    :raises SourceError: the compute service does not answer.
    """
    found = _get("compute", "/os-aggregates", "the compute service").get("aggregates", [])
    meant = [each for each in found if aggregate in (each.get("name"), str(each.get("id")))]
    if len(meant) != 1:
        raise errors.ConfigError(
            f"{len(meant) or 'no'} host aggregates are called {values.printable(aggregate)}",
            next_step="see: openstack aggregate list",
        )
    hosts = [str(name) for name in meant[0].get("hosts", ())]
    if not hosts:
        raise errors.ConfigError(
            f"the host aggregate {values.printable(aggregate)} has no hosts",
            next_step="see: openstack aggregate show",
        )
    return hosts


def image_of(said: str) -> str:
    """Return the id of the image that is meant: an id as it is, and a name if only one active image has it.

    :raises ImageNotFound: no image has that name, or several have.
    :raises SourceError: the image service does not answer.
    """
    try:
        return str(uuid.UUID(said))
    except ValueError:
        pass
    query = {"name": f"in:{_quoted(said)}", "status": "active"}
    found = _get("image", "/v2/images", "the image service", query).get("images", [])
    if len(found) == 1:
        return str(found[0]["id"])
    raise errors.ImageNotFound(
        "no image has that name" if not found else f"{len(found)} images or more have that name",
        image=values.printable(said),
        next_step="give its id; see: openstack image list",
    )


def _quoted(name: str) -> str:
    """Return a name as Glance's filter operator ``in:`` takes it."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _get(service: str, path: str, called: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
    from keystoneauth1 import exceptions

    filtered = {
        "service_type": service,
        "interface": interface(os.environ),
        "region_name": os.environ.get("OS_REGION_NAME") or None,
    }
    try:
        asked = session(os.environ).get(path, endpoint_filter=filtered, params=dict(query or {}))
        answer: dict[str, Any] = asked.json()
    except (exceptions.Unauthorized, exceptions.Forbidden) as error:
        raise errors.ConfigError(
            f"{called} refuses this user: {error}", next_step="check the OS_ variables and the user's roles"
        ) from error
    except (exceptions.EndpointNotFound, exceptions.MissingAuthPlugin) as error:
        raise errors.ConfigError(
            f"{called} is not in the catalog: {error}", next_step="check OS_REGION_NAME and OS_INTERFACE"
        ) from error
    except (exceptions.ClientException, ValueError) as error:
        raise errors.SourceError(f"{called} does not answer: {error}", next_step="try again later") from error
    return answer if isinstance(answer, dict) else {}


def _session_of_cloud(name: str) -> Any:
    try:
        from openstack import config, exceptions
    except ImportError:
        raise errors.ConfigError(
            "OS_CLOUD is set, and openstacksdk, which reads clouds.yaml, is not installed",
            next_step="pip install openstacksdk, or set OS_AUTH_URL and the other OS_ variables",
        ) from None
    try:
        return config.OpenStackConfig().get_one(cloud=name).get_session()
    except exceptions.SDKException as error:
        raise errors.ConfigError(
            f"clouds.yaml does not say how to authenticate at {name}: {error}", next_step="correct it"
        ) from error


def _require_user(kind: str, environment: Mapping[str, str]) -> None:
    """Refuse what no identity service can accept, before it is asked.

    :raises ConfigError: a variable is not set.
    """
    if kind not in ("password", "v3password", "v2password"):
        return
    for names in (("OS_AUTH_URL",), ("OS_USERNAME", "OS_USER_ID"), ("OS_PASSWORD",)):
        if not any(environment.get(name) for name in names):
            raise errors.ConfigError(
                f"{' or '.join(names)} is not set, which the identity service needs",
                next_step="source the file with the OS_ variables of your project",
            )
