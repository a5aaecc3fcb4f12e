# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

Names of images are their owners' to choose. Every text is escaped where it is put into the page, and a
content security policy forbids the page to load or run anything, should one be missed.
"""

from __future__ import annotations

import html
import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence

from imagecache_lib import dates
from imagecache_lib.cli import values
from imagecache_lib.cli.report_history import Look
from imagecache_lib.cli.treemap import Box, squarified
from imagecache_lib.diagnostics.survey import State, Survey, SurveyedBase

#: States with the colour of each, that those who see no red or no green can tell apart.
COLOURS = {
    "in_use": "#3b6ea5",
    "pinned": "#8a5fb0",
    "unknown": "#b8860b",
    "young": "#5b9aa0",
    "reclaimable": "#6f7a85",
    "damaged": "#b3341f",
}

_MEANINGS = {
    "in_use": "a disk, an instance, a guest or a lease needs it",
    "pinned": "somebody asked that it stays",
    "unknown": "something cannot be read that may need it",
    "young": "nothing needs it, and it is younger than its minimum age",
    "reclaimable": "nothing needs it: the next pass removes it",
    "damaged": "the disk changed it: no new disk is made from it",
}

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_WIDTH, _HEIGHT = 1000.0, 420.0
_HEADING = 17.0
#: Width of a letter of a label; a label that does not fit is left out.
_LETTER = 6.6
#: So many reasons are written out; a base image may have a thousand disks.
_MOST_REASONS = 12
#: So many points has the history's plot.
_MOST_POINTS = 400

_STYLE = """
:root { color-scheme: light dark; --line: #d0d5da; --soft: #5d6770; }
@media (prefers-color-scheme: dark) { :root { --line: #444c54; --soft: #9aa5b1; } }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1040px; margin: 1.5em auto; padding: 0 1em; }
h1 { font-size: 1.4em; margin: 0; } h2 { font-size: 1.1em; margin: 1.6em 0 .4em; }
p { margin: .3em 0; } .soft { color: var(--soft); }
.alarm { border-left: 5px solid #b3341f; padding: .4em .8em; margin: 1em 0; }
dl { display: flex; flex-wrap: wrap; gap: .6em 2em; margin: 1em 0; }
dt { color: var(--soft); font-size: .85em; } dd { margin: 0; font-size: 1.15em; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: #fff; }
svg .axis { fill: var(--soft); }
.key { display: flex; flex-wrap: wrap; gap: .2em 1.4em; padding: 0; margin: .6em 0; list-style: none; }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; min-width: 820px; }
th, td { text-align: left; vertical-align: top; padding: .35em .6em; border-bottom: 1px solid var(--line); }
th { font-size: .85em; color: var(--soft); } td.number, th.number { text-align: right; }
td.number, td.state { white-space: nowrap; }
td ul { margin: 0; padding-left: 1.1em; } code { font-size: .9em; overflow-wrap: anywhere; }
"""


def page(survey: Survey, history: Sequence[Look], *, host: str, path: str) -> str:
    """Return the page.

    :param history: what earlier reports saw, by time, this one included; empty for none.
    :param host: the host's name.
    :param path: of the directory of base images.
    """
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>Image cache of {_text(host)}</title>",
            f"<style>{_STYLE}{_colour_rules()}</style></head><body>",
            *_head(survey, host, path),
            *_alarms(survey),
            *_map(survey),
            *_history(history),
            *_table(survey),
            "</body></html>",
            "",
        ]
    )


def _text(text: object) -> str:
    """Return text to put into the page, whoever wrote it."""
    return html.escape(values.printable(str(text)), quote=True)


def _colour_rules() -> str:
    return "\n".join(
        f".{state} {{ background: {colour}; fill: {colour}; }}" for state, colour in COLOURS.items()
    )


def _head(survey: Survey, host: str, path: str) -> Iterator[str]:
    yield f"<h1>Image cache of {_text(host)}</h1>"
    version = importlib.metadata.version("imagecache-lib")
    made = dates.date(survey.now)
    yield f'<p class="soft">{_text(path)}, {_text(made)}, imagecache {_text(version)}</p>'
    free = f"{values.shown(survey.free)} of {values.shown(survey.size)}"
    share = f" ({survey.free * 100 // survey.size} %)" if survey.size else ""
    facts = {
        "Free on the filesystem": free + share,
        "Base images": f"{len(survey.bases)}, {values.shown(survey.allocated)}",
        "Reclaimable": values.shown(survey.bytes_of(State.RECLAIMABLE)),
        "In flight, reserved": f"{values.shown(survey.stage)}, {values.shown(survey.reserved)}",
        "Trash": values.shown(survey.trash),
        "Last scrub": "never" if survey.last_scrub is None else dates.date(survey.last_scrub),
    }
    yield "<dl>"
    for name, value in facts.items():
        yield f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
    yield "</dl>"


def _alarms(survey: Survey) -> Iterator[str]:
    told = [
        f"{_name(each)} is damaged on disk. Disks made from it may read wrong bytes."
        for each in survey.damaged
    ]
    for text in (*told, *survey.problems):
        yield f'<p class="alarm">{_text(text)}</p>'


def _name(each: SurveyedBase) -> str:
    return each.base.image_name or each.base.image_id or each.base.name


def _map(survey: Survey) -> Iterator[str]:
    yield "<h2>What takes the space</h2>"
    if not survey.bases:
        yield "<p>There are no base images.</p>"
        return
    by_state = _by_state(survey.bases)
    groups = sorted(by_state, key=lambda state: -_allocated(by_state[state]))
    yield (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="A treemap of base images by '
        'state. The table below has the same.">'
    )
    boxes = squarified([_allocated(by_state[state]) for state in groups], Box(0, 0, _WIDTH, _HEIGHT))
    for state, box in zip(groups, boxes, strict=True):
        yield from _group(state, by_state[state], box)
    yield "</svg>"
    yield '<ul class="key">'
    for state in groups:
        amount = values.shown(_allocated(by_state[state]))
        words = f"{state.replace('_', ' ')}, {amount}: {_MEANINGS[state]}"
        yield f'<li><span class="dot {state}"></span>{_text(words)}</li>'
    yield "</ul>"


def _by_state(bases: Iterable[SurveyedBase]) -> dict[str, list[SurveyedBase]]:
    found: dict[str, list[SurveyedBase]] = {}
    for each in sorted(bases, key=lambda each: -each.base.allocated):
        found.setdefault(each.shown_state, []).append(each)
    return found


def _allocated(bases: Iterable[SurveyedBase]) -> int:
    return sum(each.base.allocated for each in bases)


def _group(state: str, bases: Sequence[SurveyedBase], box: Box) -> Iterator[str]:
    inner = box.inset(by=1.5)
    for each, at in zip(bases, squarified([each.base.allocated for each in bases], inner), strict=True):
        if min(at.width, at.height) <= 0:
            continue
        shown = at.inset(by=0.75)
        told = f"{_name(each)}: {values.shown(each.base.allocated)}, {state.replace('_', ' ')}"
        yield (
            f'<g><title>{_text(told)}</title><rect class="{state}" x="{shown.x:.2f}" y="{shown.y:.2f}" '
            f'width="{shown.width:.2f}" height="{shown.height:.2f}" rx="2"/>'
        )
        yield from _labels(each, shown)
        yield "</g>"


def _labels(each: SurveyedBase, box: Box) -> Iterator[str]:
    fits = int((box.width - 10) / _LETTER)
    lines = [values.printable(_name(each)), values.shown(each.base.allocated)]
    for number, line in enumerate(lines):
        if fits < 4 or box.height < _HEADING * (number + 1):
            return
        shown = line if len(line) <= fits else line[: fits - 1] + "\u2026"
        yield f'<text x="{box.x + 5:.2f}" y="{box.y + 14 + number * 14:.2f}">{_text(shown)}</text>'


def _history(looks: Sequence[Look]) -> Iterator[str]:
    if len(looks) < 2 or looks[-1].at <= looks[0].at:
        return
    every = -(-len(looks) // _MOST_POINTS)
    looks = [*looks[:-1][::every], looks[-1]]
    top = max(sum(look.allocated.values()) for look in looks) or 1
    height = 180.0
    begin, length = looks[0].at, looks[-1].at - looks[0].at
    yield "<h2>Bytes on disk since the first report</h2>"
    yield (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {height + 20:.0f}" role="img" aria-label="Bytes on disk by state, '
        'over time.">'
    )
    below = [0.0] * len(looks)
    for state in State:
        above = [under + look.allocated[state.value] for under, look in zip(below, looks, strict=True)]
        if above != below:
            across = [(look.at - begin) / length * _WIDTH for look in looks]
            points = [
                *zip(across, above, strict=True),
                *reversed(list(zip(across, below, strict=True))),
            ]
            told = " ".join(f"{x:.1f},{height - y / top * height:.1f}" for x, y in points)
            yield f'<polygon class="{state.value}" points="{told}"/>'
        below = above
    first, last = dates.date(looks[0].at), dates.date(looks[-1].at)
    yield f'<text class="axis" x="0" y="{height + 15:.0f}">{_text(first)}</text>'
    yield f'<text class="axis" x="{_WIDTH:.0f}" y="{height + 15:.0f}" text-anchor="end">{_text(last)}</text>'
    yield f'<text class="axis" x="4" y="12" style="fill: #fff">{_text(values.shown(top))}</text></svg>'


def _table(survey: Survey) -> Iterator[str]:
    if not survey.bases:
        return
    yield '<h2>Base images</h2><div class="wide"><table><thead><tr>'
    for name, number in (
        ("Image", ""),
        ("State", ""),
        ("On disk", "number"),
        ("Size", "number"),
        ("Used by", "number"),
        ("Last use", "number"),
        ("Why it stays", ""),
    ):
        yield f'<th class="{number}">{name}</th>'
    yield "</tr></thead><tbody>"
    for each in sorted(survey.bases, key=lambda each: (-each.base.allocated, each.base.name)):
        yield from _table_row(each, survey.now)
    yield "</tbody></table></div>"


def _table_row(each: SurveyedBase, now: float) -> Iterator[str]:
    base, state = each.base, each.shown_state
    size = "" if base.virtual_size is None else values.shown(base.virtual_size)
    name = f"{_text(base.image_name)}<br>" if base.image_name else ""
    yield f'<tr><td>{name}<code class="soft">{_text(base.image_id or base.name)}</code></td>'
    yield f'<td class="state"><span class="dot {state}"></span>{_text(state.replace("_", " "))}</td>'
    for text in (
        values.shown(base.allocated),
        size,
        each.users or "",
        values.brief_span(now - base.last_use),
    ):
        yield f'<td class="number">{_text(text)}</td>'
    reasons = [reason.text for reason in each.reasons]
    if len(reasons) > _MOST_REASONS:
        reasons = [*reasons[:_MOST_REASONS], f"and {len(reasons) - _MOST_REASONS} more"]
    if not reasons:
        reasons = ["nothing keeps it"]
    yield f"<td><ul>{''.join(f'<li>{_text(reason)}</li>' for reason in reasons)}</ul></td></tr>"
