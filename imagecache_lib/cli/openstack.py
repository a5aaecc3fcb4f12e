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
from imagecache_lib.sources import exchange

_DEFAULT_INTERFACE = "public"

#: What each type of login cannot do without: one variable of each group. Other types say so themselves.
_NEEDED = {
    "password": (("OS_AUTH_URL",), ("OS_USERNAME", "OS_USER_ID"), ("OS_PASSWORD",)),
    "token": (("OS_AUTH_URL",), ("OS_TOKEN",)),
    "admin_token": (("OS_ENDPOINT",), ("OS_TOKEN",)),
    "http_basic": (("OS_ENDPOINT",), ("OS_USERNAME",), ("OS_PASSWORD",)),
    "none": (("OS_ENDPOINT",),),
}
_URLS = ("OS_AUTH_URL", "OS_ENDPOINT")


def is_named(environment: Mapping[str, str]) -> bool:
    """Whether the environment is meant to say where to authenticate."""
    return any(environment.get(name) for name in ("OS_CLOUD", "OS_AUTH_URL", "OS_AUTH_TYPE"))


def adapter(environment: Mapping[str, str], service: str) -> Any:
    """Return a keystoneauth adapter, which asks one service of the cloud with the user's token.

    :param service: its type in the catalog, such as ``image``.
    :raises ConfigError: what it takes is not installed, or the environment does not say how to authenticate.
    """
    if environment.get("OS_CLOUD"):
        return _adapter_of_cloud(environment, service)
    try:
        from keystoneauth1 import adapter as adapters
    except ImportError:
        raise errors.ConfigError(
            "OS_AUTH_URL is set, and keystoneauth1 is not installed",
            next_step="install imagecache-lib[glance], or give --glance-endpoint with OS_TOKEN",
        ) from None
    return adapters.Adapter(
        _session(environment),
        service_type=service,
        interface=environment.get("OS_INTERFACE") or _DEFAULT_INTERFACE,
        region_name=environment.get("OS_REGION_NAME") or None,
    )


def _session(environment: Mapping[str, str]) -> Any:
    from keystoneauth1 import exceptions, loading
    from keystoneauth1 import session as sessions

    kind = environment.get("OS_AUTH_TYPE") or ("token" if environment.get("OS_TOKEN") else "password")
    _require_variables(kind, environment)
    try:
        loader: Any = loading.get_plugin_loader(kind)
        given = {option.dest: environment.get(f"OS_{option.dest.upper()}") for option in loader.get_options()}
        auth = loader.load_from_options(**{name: value for name, value in given.items() if value})
    except exceptions.ClientException as error:
        raise errors.ConfigError(
            f"the OS_ variables do not say how to authenticate: {error}", next_step="correct them"
        ) from error
    except TypeError as error:  # what a plugin cannot do without, and does not declare as required
        known = ", ".join(sorted(f"OS_{name.upper()}" for name in given))
        raise errors.ConfigError(
            f"the OS_ variables do not say all that OS_AUTH_TYPE={kind} needs",
            next_step=f"set more of: {known}",
        ) from error
    return sessions.Session(auth=auth, verify=environment.get("OS_CACERT") or True)


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
    query = {"name": f"eq:{said}", "status": "active"}
    # Without an operator, what stands before a colon in the name would be taken for one.
    told = _get("image", "/v2/images", "the image service", query).get("images", [])
    # Its database may find names that differ in upper and lower case.
    found = [each for each in told if each.get("name") == said]
    if len(found) == 1:
        return str(found[0]["id"])
    raise errors.ImageNotFound(
        "no image has that name" if not found else f"{len(found)} images or more have that name",
        image=values.printable(said),
        next_step="give its id; see: openstack image list",
    )


def _get(service: str, path: str, called: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
    asked = adapter(os.environ, service)
    from keystoneauth1 import exceptions

    try:
        answer: dict[str, Any] = asked.get(path, params=dict(query or {})).json()
    except (exceptions.Unauthorized, exceptions.Forbidden) as error:
        raise errors.ConfigError(
            f"{called} refuses this user: {error}", next_step="check the OS_ variables and the user's roles"
        ) from error
    except exceptions.AuthorizationFailure as error:
        raise errors.ConfigError(
            f"there is no login for {called}: {error}", next_step="check the OS_ variables"
        ) from error
    except (exceptions.EndpointNotFound, exceptions.MissingAuthPlugin) as error:
        raise errors.ConfigError(
            f"{called} is not in the catalog", next_step="check OS_REGION_NAME and OS_INTERFACE"
        ) from error
    except (exceptions.HttpError, ValueError) as error:
        why = str(error) if isinstance(error, exceptions.HttpError) else "its answer is no JSON"
        raise errors.SourceError(f"{called} does not answer: {why}", next_step="try again later") from error
    except exceptions.ClientException as error:
        raise exchange.failure(error, called, None) from error
    return answer if isinstance(answer, dict) else {}


def _adapter_of_cloud(environment: Mapping[str, str], service: str) -> Any:
    name = environment["OS_CLOUD"]
    try:
        from keystoneauth1 import adapter as adapters
        from openstack import config
    except ImportError:
        raise errors.ConfigError(
            "OS_CLOUD is set, and openstacksdk, which reads clouds.yaml, is not installed",
            next_step="pip install openstacksdk, or set OS_AUTH_URL and the other OS_ variables",
        ) from None
    said = {"region_name": environment.get("OS_REGION_NAME"), "interface": environment.get("OS_INTERFACE")}
    chosen: dict[str, Any] = {option: value for option, value in said.items() if value}
    try:
        region = config.OpenStackConfig().get_one(cloud=name, **chosen)
        return adapters.Adapter(
            region.get_session(),
            service_type=service,
            interface=region.get_interface(service) or _DEFAULT_INTERFACE,
            region_name=region.get_region_name(service),
            endpoint_override=region.get_endpoint(service),
        )
    except Exception as error:  # another package's, and what reads its file has errors of its own
        raise errors.ConfigError(
            f"clouds.yaml does not say how to authenticate at {values.printable(name)}: "
            f"{' '.join(str(error).split())}",
            next_step="correct it, or OS_CLOUD",
        ) from error


def _require_variables(kind: str, environment: Mapping[str, str]) -> None:
    """Refuse what no service can accept, before it is asked.

    :raises ConfigError: a variable is not set, is no URL, or names no file.
    """
    for names in _NEEDED.get(kind.removeprefix("v3").removeprefix("v2"), ()):
        if not any(environment.get(name) for name in names):
            raise errors.ConfigError(
                f"{' or '.join(names)} is not set, which a login by {kind} needs",
                next_step="source the file with the OS_ variables of your project",
            )
    for name in _URLS:
        if environment.get(name):
            try:
                exchange.check_url(environment[name])
            except errors.ConfigError:
                raise errors.ConfigError(
                    f"{name} is no http or https URL", next_step="write it as https://keystone.example/v3"
                ) from None
    bundle = environment.get("OS_CACERT")
    if bundle and not os.path.exists(bundle):
        raise errors.ConfigError("OS_CACERT names no file", path=bundle, next_step="correct it")
