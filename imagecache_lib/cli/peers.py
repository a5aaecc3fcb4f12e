# SPDX-License-Identifier: Apache-2.0
"""Other hosts' caches as a second chance, and this host's for them. Off unless it is asked for."""

from __future__ import annotations

import argparse
import os
import ssl

from imagecache_lib import errors, manager
from imagecache_lib.cli import parsing, values
from imagecache_lib.precache.passing_on import PassingOn
from imagecache_lib.precache.peer import PeerServer
from imagecache_lib.sources.parents import Parents
from imagecache_lib.sources.peer import PeerSource
from imagecache_lib.store.spool import Spools


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about peers to the agent's command."""
    group = parser.add_argument_group(
        "peers", "For images that are gone from the image service, and for passing on those that arrive."
    )
    group.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="URL",
        help="another host's agent, such as https://node-1:9293; may be given several times",
    )
    group.add_argument(
        "--trust-peers",
        action="store_true",
        help="believe the peers' digests (default: what they send is an image like any other)",
    )
    group.add_argument(
        "--serve-peers",
        type=values.address,
        metavar="HOST:PORT",
        help="serve this host's images there, such as 192.0.2.7:9293",
    )
    group.add_argument(
        "--relay",
        metavar="URL",
        help="pass images on to other hosts while they arrive, and receive them so: where another host's "
        "agent serves, such as https://{host}:9293; needs --serve-peers",
    )
    group.add_argument("--peer-token-file", metavar="PATH", help="file with the secret that all peers share")
    group.add_argument("--peer-cafile", metavar="PATH", help="CA certificates that vouch for peers")
    group.add_argument("--peer-cert", metavar="PATH", help="certificate to serve with, and its chain")
    group.add_argument("--peer-key", metavar="PATH", help="the certificate's key")


def check(arguments: argparse.Namespace) -> None:
    """Refuse options about peers that would have no effect, since whoever gave them relies on it.

    :raises Misused: an option lacks the one that it belongs to.
    :raises ConfigError: the peers' CA certificates are not there.
    """
    lacking = (
        ("--peer-key", arguments.peer_key, "--peer-cert", arguments.peer_cert),
        ("--peer-cert", arguments.peer_cert, "--serve-peers", arguments.serve_peers),
        ("--relay", arguments.relay, "--serve-peers", arguments.serve_peers),
        ("--trust-peers", arguments.trust_peers, "--peer", arguments.peer),
        *(
            (name, value, "--peer or --serve-peers", arguments.peer or arguments.serve_peers)
            for name, value in (
                ("--peer-token-file", arguments.peer_token_file),
                ("--peer-cafile", arguments.peer_cafile),
            )
        ),
    )
    for name, value, other, theirs in lacking:
        if value and not theirs:
            raise parsing.Misused(
                f"{name} has no effect without {other}", next_step="give both, or leave it out"
            )
    if arguments.peer_cafile and not os.path.exists(arguments.peer_cafile):
        raise errors.ConfigError(
            "--peer-cafile names no file", path=arguments.peer_cafile, next_step="correct it"
        )


def chosen(arguments: argparse.Namespace) -> tuple[PeerSource, ...]:
    """Return the peers that the command line names.

    :raises ConfigError: one of the peers cannot work.
    """
    if not arguments.peer:
        return ()
    token = _token(arguments)
    verify = arguments.peer_cafile or True
    return tuple(
        PeerSource(url, token=token, trusted=arguments.trust_peers, verify=verify) for url in arguments.peer
    )


def spools(arguments: argparse.Namespace, cache: manager.ImageCacheManager) -> Spools | None:
    """Return what keeps images for other hosts while they arrive, or None without ``--relay``."""
    return None if arguments.relay is None else cache.spools()


def passing_on(
    arguments: argparse.Namespace, cache: manager.ImageCacheManager, kept: Spools | None
) -> PassingOn | None:
    """Return what receives images from other hosts and keeps them for others, or None without ``--relay``.

    :param kept: what :func:`spools` returned.
    :raises ConfigError: the URL cannot work.
    """
    if kept is None:
        return None
    verify = arguments.peer_cafile or True
    return PassingOn(cache, kept, Parents(arguments.relay, token=_token(arguments), verify=verify))


def server(
    arguments: argparse.Namespace, cache: manager.ImageCacheManager, kept: Spools | None
) -> PeerServer | None:
    """Return the server of this host's images, or None if the command line asks for none.

    :param kept: what :func:`spools` returned.
    :raises ConfigError: the server cannot work.
    """
    if arguments.serve_peers is None:
        return None
    address: tuple[str, int] = arguments.serve_peers
    return PeerServer(cache, address, token=_token(arguments), spools=kept, tls=_tls(arguments))


def _token(arguments: argparse.Namespace) -> str:
    path = arguments.peer_token_file
    if path is None:
        raise parsing.Misused("peers need a secret", next_step="give --peer-token-file")
    try:
        with open(path, encoding="ascii") as stream:
            return stream.read().strip()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it has letters that are not ASCII"
        raise errors.ConfigError(
            f"the peers' secret cannot be read: {why}", path=path, next_step="correct the file"
        ) from error


def _tls(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    if arguments.peer_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(arguments.peer_cert, arguments.peer_key)
    except ssl.SSLError as error:
        raise errors.ConfigError(
            "the certificate cannot be used: it is no PEM file with a certificate, or the key is not its own",
            path=arguments.peer_cert,
            next_step="correct --peer-cert and --peer-key",
        ) from error
    except OSError as error:  # it does not say which of the two
        paths = (path for path in (arguments.peer_cert, arguments.peer_key) if path)
        raise errors.ConfigError(
            f"the certificate or its key cannot be read: {error.strerror}",
            path=next((path for path in paths if not os.access(path, os.R_OK)), arguments.peer_cert),
            next_step="correct --peer-cert and --peer-key",
        ) from error
    return context
