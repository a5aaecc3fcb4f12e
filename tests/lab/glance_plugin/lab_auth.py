# SPDX-License-Identifier: Apache-2.0
"""A paste filter that Glance loads instead of Keystone's: the token says who asks, and requests are logged.

The token ``user:project:role`` becomes the request's context, so that tenants and roles can be tested without
an identity service. The log has a line of JSON per request, written when the request arrives: a test that has
read an answer finds its request there, which a log written after the answer would not promise.
"""

import json
import os

import glance.context
import webob.exc
from glance.api.middleware import context


class LabAuth(context.BaseContextMiddleware):
    """Turn the token into a context."""

    def process_request(self, req):
        _log(req)
        token = req.headers.get("X-Auth-Token", "")
        try:
            user, project, role = token.split(":")
        except ValueError:
            raise webob.exc.HTTPUnauthorized() from None
        req.context = glance.context.RequestContext(
            user_id=user,
            project_id=project,
            # Keystone's implied roles: who may do more may do less.
            roles=["admin", "member", "reader"] if role == "admin" else [role, "reader"],
            is_admin=role == "admin",
            auth_token=token,
        )


def _log(req):
    entry = {
        "method": req.method,
        "path": req.path,
        "range": req.headers.get("Range"),
        "token": req.headers.get("X-Auth-Token"),
    }
    # One write to a descriptor in append mode: threads do not mix their lines.
    log = os.open(os.environ["LAB_REQUEST_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(log, json.dumps(entry).encode() + b"\n")
    finally:
        os.close(log)
