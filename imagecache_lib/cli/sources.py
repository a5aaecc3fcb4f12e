# SPDX-License-Identifier: Apache-2.0
"""Where a command fetches from: Glance, a URL, a file, or what another package brings.

Secrets come from the environment only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from imagecache_lib import errors, model
from imagecache_lib.cli import openstack, parsing, values
from imagecache_lib.sources import file, glance, http, tables
from imagecache_lib.sources.interface import ImageSource

#: Entry points that are classes of :class:`~imagecache_lib.ImageSource`.
SOURCES = "imagecache_lib.sources"

#: Glance's names of those formats that can become a disk, and qemu's name for VHD.
_DISK_FORMATS = ("aki", "ami", "ari", "iso", "qcow2", "raw", "vdi", "vhd", "vhdx", "vmdk", "vpc")


def add_options(parser: argparse.ArgumentParser, *, one_image: bool = True) -> None:
    """Add the options that choose the source to a command.

    :param one_image: whether the command can be about one image, whose data an option may name.
    """
    group = parser.add_argument_group(
        "source",
        "Without any of these, the image service is found through OS_CLOUD, or OS_AUTH_URL and the other OS_ "
        "variables of OpenStack's clients. --glance-endpoint takes its token from OS_TOKEN.",
    )
    where = group.add_mutually_exclusive_group()
    where.add_argument("--glance-endpoint", metavar="URL", action="append", help="URL of Glance")
    if one_image:
        where.add_argument("--http", metavar="URL", help="URL of the image's data")
        where.add_argument("--file", type=values.path, metavar="PATH", help="file with the image's data")
    where.add_argument(
        "--source", metavar="NAME", help=f"a source by its entry point in {SOURCES}, such as http or glance"
    )
    group.add_argument(
        "--source-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of --source; the value env:NAME is that of an environment variable",
    )
    if not one_image:
        parser.set_defaults(http=None, file=None, digest=None, disk_format=None)
        return
    group.add_argument(
        "--digest", type=_digest, metavar="ALGORITHM:HEX", help="what --http and --file must have"
    )
    group.add_argument(
        "--disk-format",
        metavar="FORMAT",
        choices=_DISK_FORMATS,
        help=f"what --http and --file are said to be: {', '.join(_DISK_FORMATS)}",
    )


def is_cloud(arguments: argparse.Namespace) -> bool:
    """Whether images come from the OpenStack cloud that the environment names."""
    others = (arguments.glance_endpoint, arguments.http, arguments.file, arguments.source)
    return not any(others) and openstack.is_named(os.environ)


def chosen(arguments: argparse.Namespace, images: list[str], *, needed: bool = True) -> ImageSource:
    """Return the source that the command line names.

    :param needed: False if it may turn out that nothing has to be fetched: then a command line that names
        none is an error only once something has to.
    :raises ConfigError: it names none, or one that cannot work.
    """
    if arguments.source_option and not arguments.source:
        raise parsing.Misused(
            "--source-option is for --source", next_step="name the source, or leave the option out"
        )
    if arguments.http or arguments.file:
        if len(images) != 1:
            raise parsing.Misused(
                "--http and --file are the data of one image", next_step="name one image at a time"
            )
        if arguments.http:
            one = http.HttpImage(arguments.http, arguments.disk_format, arguments.digest)
            return http.HttpSource({images[0]: one}, verify=os.environ.get("OS_CACERT") or True)
        path = os.path.abspath(arguments.file)
        return file.FileSource({images[0]: file.FileImage(path, arguments.disk_format, arguments.digest)})
    if arguments.digest or arguments.disk_format:
        raise parsing.Misused(
            "--digest and --disk-format are for --http and --file",
            next_step="leave them out: Glance says both",
        )
    if arguments.source:
        return load(arguments.source, arguments.source_option, os.environ)
    if arguments.glance_endpoint:
        return glance.GlanceSource(
            arguments.glance_endpoint, token=os.environ.get("OS_TOKEN"), cafile=os.environ.get("OS_CACERT")
        )
    if not needed and not openstack.is_named(os.environ):
        return _NoSource()
    return _from_environment(os.environ, one_image=bool(images))


class _NoSource(ImageSource):
    """Has no image, and says what to name on the command line."""

    def describe(self, image_id: str) -> model.Image:
        raise _no_source(image_id)

    def open(self, image: model.Image, offset: int = 0) -> AbstractContextManager[Iterator[bytes]]:
        raise _no_source(image.id)


def _no_source(image_id: str | None = None, *, one_image: bool = True) -> errors.ConfigError:
    others = "--glance-endpoint, --http, --file or --source" if one_image else "--glance-endpoint or --source"
    return errors.ConfigError(
        "there is no source for images",
        image=image_id,
        next_step=f"set OS_CLOUD, or OS_AUTH_URL and the other OS_ variables, or give {others}",
    )


def load(name: str, options: Sequence[str], environment: Mapping[str, str]) -> ImageSource:
    """Return a source made by the class that an entry point names.

    :param options: as ``KEY=VALUE``. ``env:NAME`` stands for what a variable of the environment holds.
    :raises ConfigError: there is no entry point of that name, it cannot be loaded, or its options are wrong.
    """
    found = importlib.metadata.entry_points(group=SOURCES, name=name)
    if not found:
        names = sorted({point.name for point in importlib.metadata.entry_points(group=SOURCES)})
        raise errors.ConfigError(
            f"there is no entry point {name!r} in {SOURCES}",
            next_step=f"install the package that provides it, or use one of: {', '.join(names)}",
        )
    values = dict(_option(option, environment) for option in options)
    try:
        made = next(iter(found)).load().from_options(values)
    except errors.ImageCacheError:
        raise
    except Exception as error:  # another package's code
        raise errors.ConfigError(
            f"the source {name} cannot be made ({type(error).__name__}: {error})",
            next_step="correct its options, or report it to its author",
        ) from error
    if not isinstance(made, ImageSource):
        raise errors.ConfigError(
            f"the entry point {name!r} in {SOURCES} makes no image source",
            next_step="report it to its author",
        )
    return made


def _option(text: str, environment: Mapping[str, str]) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise parsing.Misused(f"--source-option {text!r} has no value", next_step="write it as KEY=VALUE")
    if not value.startswith("env:"):
        return key, value
    variable = value.removeprefix("env:")
    if variable not in environment:
        raise errors.ConfigError(
            f"--source-option {key} is to be read from {variable}, which is not set",
            next_step="set the environment variable",
        )
    return key, environment[variable]


def _from_environment(environment: Mapping[str, str], *, one_image: bool) -> ImageSource:
    if not openstack.is_named(environment):
        raise _no_source(one_image=one_image)
    return glance.GlanceSource(adapter=openstack.adapter(environment, "image"))


def _digest(text: str) -> model.Digest:
    try:
        return tables.parse_digest(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
