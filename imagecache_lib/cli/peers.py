# SPDX-License-Identifier: Apache-2.0
"""Other hosts' caches as a second chance, and this host's for them. Off unless it is asked for."""

from __future__ import annotations

import argparse
import re
import ssl

from imagecache_lib import errors, manager
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
    group.add_argument("--serve-peers", metavar="HOST:PORT", help="serve this host's images there")
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
    """Return what keeps images for other hosts while they arrive, or None if the command line asks for none.

    :raises ConfigError: nothing would serve them.
    """
    if arguments.relay is None:
        return None
    if arguments.serve_peers is None:
        raise errors.ConfigError(
            "--relay passes images on, and nothing serves them", next_step="give --serve-peers, too"
        )
    return cache.spools()


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
    found = re.fullmatch(r"\[?([^\]]+?)\]?:(\d{1,5})", arguments.serve_peers)
    if found is None or int(found[2]) > 65535:
        raise errors.ConfigError(
            f"{arguments.serve_peers!r} is no HOST:PORT", next_step="write 192.0.2.7:9293"
        )
    address = found[1], int(found[2])
    return PeerServer(cache, address, token=_token(arguments), spools=kept, tls=_tls(arguments))


def _token(arguments: argparse.Namespace) -> str:
    path = arguments.peer_token_file
    if path is None:
        raise errors.ConfigError("peers need a secret", next_step="give --peer-token-file")
    try:
        with open(path, encoding="ascii") as stream:
            return stream.read().strip()
    except (OSError, ValueError) as error:
        raise errors.ConfigError(
            f"the peers' secret cannot be read: {error}", path=path, next_step="correct the file"
        ) from error


def _tls(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    if arguments.peer_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(arguments.peer_cert, arguments.peer_key)
    except (OSError, ssl.SSLError) as error:
        raise errors.ConfigError(
            f"the certificate cannot be used: {error}", path=arguments.peer_cert, next_step="correct it"
        ) from error
    return context
