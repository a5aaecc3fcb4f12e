# SPDX-License-Identifier: Apache-2.0
"""What callers pass, checked where they pass it: a value of the wrong type is named before any harm."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from imagecache_lib import errors, model


def require_disk(disk: object) -> None:
    """Refuse what is no disk.

    :raises ConfigError: it is anything else than a :class:`~imagecache_lib.Disk`, such as a path.
    """
    if not isinstance(disk, model.Disk):
        raise _wrong("the disk", disk, "a Disk, as create_disk or inspect_disk returns it")


def require_request(request: object) -> None:
    """Refuse what is neither a request nor None.

    :raises ConfigError: it is.
    """
    if request is not None and not isinstance(request, model.Request):
        raise _wrong("the request", request, "a Request or None")


def require_token(cancel: object) -> None:
    """Refuse what is neither a token nor None.

    :raises ConfigError: it is.
    """
    if cancel is not None and not model.is_token(cancel):
        raise _wrong("cancel", cancel, "a threading.Event, or something else with is_set()")


def require_size(size: object) -> None:
    """Refuse what can be no size of a disk.

    :raises BackendError: it is no whole number, or below zero, or larger than any file.
    """
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= model.MOST_BYTES:
        raise errors.BackendError(
            f"{errors.shown(size)} can be no size of a disk", next_step="give bytes, as an int"
        )


def require_text(name: str, value: object) -> None:
    """Refuse what is neither text nor None.

    :raises BackendError: it is.
    """
    if value is not None and not isinstance(value, str):
        raise errors.BackendError(
            f"{name} is {errors.shown(value)}, and must be text or None", next_step=_CORRECT
        )


def require_number(name: str, value: object, *, whole: bool = False) -> None:
    """Refuse what is no number of at least zero.

    :param whole: it must be an ``int``.
    :raises ConfigError: it is no such number.
    """
    if not model.is_number(value) or (whole and not isinstance(value, int)) or not value >= 0:  # type: ignore[operator]
        raise _wrong(name, value, f"a{' whole' if whole else ''} number of at least 0")


def require_several(name: str, values: object) -> None:
    """Refuse text, whose letters would be taken for the values, and what is not several.

    :raises ConfigError: it is that.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise _wrong(name, values, "a tuple, a list or a set")


def require_table(name: str, table: object, kind: type) -> None:
    """Refuse what is no mapping whose values are all of a class. No value is shown: a URL may hold a secret.

    :raises ConfigError: it is none.
    """
    wrong = [table]
    if isinstance(table, Mapping):
        wrong = [value for value in table.values() if not isinstance(value, kind)]
    if wrong:
        raise errors.ConfigError(
            f"{name} is or has a {type(wrong[0]).__name__}, and must be a mapping of {kind.__name__} by id",
            next_step=_CORRECT,
        )


def in_utf8(text: str) -> str:
    """Return text such that a program is given its UTF-8 bytes, whatever this process's locale is.

    :raises UnicodeEncodeError: the text has half a surrogate pair.
    """
    return os.fsdecode(text.encode())


def require_arguments(words: Iterable[str], subject: str) -> None:
    """Refuse a command that no program can be given.

    :param subject: path of the file that the error is about.
    :raises BackendError: a word has a NUL, or a character that the locale's encoding lacks.
    """
    for word in words:
        try:
            possible = b"\0" not in os.fsencode(word)
        except UnicodeEncodeError:
            possible = False
        if not possible:
            raise errors.BackendError(
                f"{errors.shown(word)} can be no argument of a program", path=subject, next_step=_CORRECT
            )


_CORRECT = "correct the caller"


def _wrong(name: str, value: object, must: str) -> errors.ConfigError:
    return errors.ConfigError(f"{name} is {errors.shown(value)}, and must be {must}", next_step=_CORRECT)
