# SPDX-License-Identifier: Apache-2.0
"""A paste filter for Nova's API instead of Keystone's: the token ``user:project:role`` says who asks."""

import os

#: Keystone's implied roles: who may do more may do less.
_ROLES = {"admin": "admin,manager,member,reader", "member": "member,reader"}


class LabIdentity:
    """Put into a request what ``keystonemiddleware`` puts there."""

    def __init__(self, application):
        self._application = application
        with open(os.environ["LAB_SERVICE_CATALOG"]) as file:
            self._catalog = file.read()

    @classmethod
    def factory(cls, _everywhere, **_here):
        return cls

    def __call__(self, environ, start_response):
        try:
            user, project, role = environ.get("HTTP_X_AUTH_TOKEN", "").split(":")
        except ValueError:
            start_response("401 Unauthorized", [("Content-Length", "0")])
            return [b""]
        environ |= {
            "HTTP_X_IDENTITY_STATUS": "Confirmed",
            "HTTP_X_USER_ID": user,
            "HTTP_X_PROJECT_ID": project,
            "HTTP_X_ROLES": _ROLES.get(role, role),
            "HTTP_X_SERVICE_CATALOG": self._catalog,
        }
        return self._application(environ, start_response)
