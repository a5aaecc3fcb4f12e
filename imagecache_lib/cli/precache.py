# SPDX-License-Identifier: Apache-2.0
"""``imagecache precache``: images on every host of an aggregate, before they are needed."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from imagecache_lib import errors, opts
from imagecache_lib.cli import base, job_hosts, values
from imagecache_lib.cli.conducting import HostsCommand
from imagecache_lib.precache import chains, client, job

if TYPE_CHECKING:
    from imagecache_lib.precache.precacher import AggregatePrecacher

#: More hosts than this, one after the other, are most likely not what is meant.
_MANY_HOSTS = 10

#: Seconds by which a host's clock may differ without being worth a word.
_SKEW = 60.0


class Plan(HostsCommand):
    """Ask all hosts what they have, and say what would be fetched. Changes nothing."""

    #: How many hosts could not be asked, since the message bus took no message.
    _without_bus = 0

    examples = (
        "precache plan 318ac4fb-a140-4405-8167-ad782f983e48 --hosts-file racks.txt",
        "precache plan ubuntu-24.04 --aggregate rack-7 --timeout 5s",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_what(parser)
        parser.add_argument(
            "--timeout",
            type=values.duration,
            metavar="DURATION",
            help="wait so long for each host's answer (default: 25s; an agent asks the image service itself)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        hosts, images = [host.name for host in self.hosts(parsed_args)], self.images(parsed_args)
        with self.conductor(parsed_args, images, hosts) as conductor:
            plan = conductor.plan(hosts, images, learned=self._learned(len(hosts)))
        rows = [self._row(name, plan.surveys.get(name), plan.unreachable.get(name, "")) for name in hosts]
        self.note(f"{values.shown(plan.bytes_to_fetch)} would be fetched in all")
        if any(row[-1] for row in rows):
            # Of one host or more something is known, or nothing of any of them.
            self.exit_code = base.BUS if self._without_bus == len(hosts) else base.ATTENTION
        return ["host", "present", "missing", "to_fetch", "free", "problem"], rows

    def _learned(self, total: int) -> Callable[[str, client.Survey | errors.ImageCacheError], None]:
        """Return a callback that tells what each host answers as soon as it does, or that it does not."""
        answered = itertools.count(1)

        def learned(name: str, answer: client.Survey | errors.ImageCacheError) -> None:
            number = next(answered)
            self._without_bus += isinstance(answer, client.BusDown)
            if isinstance(answer, errors.ImageCacheError):
                self.note(f"{number} of {total} hosts: {name}: {' '.join(str(answer).split())}")
            elif self.app.options.verbose_level > 0 and total > 1:
                size = values.shown(sum(size or 0 for size in answer.missing.values()))
                missing = values.counted(len(answer.missing), "image")
                self.note(f"{number} of {total} hosts: {name}: {missing} missing, {size} to fetch")

        return learned

    def _row(self, name: str, survey: client.Survey | None, problem: str) -> tuple[Any, ...]:
        if survey is None:
            return (name, None, None, values.Bytes(None), values.Bytes(None), problem)
        wanted = sum(size or 0 for size in survey.missing.values())
        problems = list(survey.problems.values())
        if survey.agent is not None and abs(skew := survey.agent.clock - time.time()) > _SKEW:
            problems.append(f"its clock is {skew:+.0f} s off this one's")
        if wanted > survey.free:
            problems.append("there is not enough room")
        return (
            name,
            len(survey.present),
            len(survey.missing),
            values.Bytes(wanted),
            values.Bytes(survey.free),
            "; ".join(problems),
        )


class Start(HostsCommand):
    """Have images on hosts, and watch until they are there. What is left can be resumed."""

    examples = (
        "precache start 318ac4fb-a140-4405-8167-ad782f983e48 --hosts-file racks.txt --concurrency 20",
        "precache start ubuntu-24.04 --aggregate rack-7 --rate 50M --deadline 6h --pin-until 30d",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_what(parser)
        parser.add_argument(
            "--concurrency",
            type=int,
            metavar="N",
            help="how many hosts fetch at a time (default: precache_concurrency)",
        )
        parser.add_argument(
            "--rate",
            type=values.size,
            default=0,
            metavar="SIZE",
            help="bytes that one host may fetch a second, such as 50M",
        )
        parser.add_argument(
            "--total-rate",
            type=values.size,
            default=0,
            metavar="SIZE",
            help="bytes that all hosts together may fetch a second",
        )
        parser.add_argument(
            "--deadline",
            type=values.future,
            metavar="WHEN",
            help="give up what is not done by then: 2026-11-27T18:00, or 6h from now",
        )
        parser.add_argument(
            "--pin-until",
            type=values.future,
            metavar="WHEN",
            help="keep the images on the hosts until then, used or not",
        )
        parser.add_argument(
            "--retries",
            type=int,
            default=3,
            metavar="N",
            help="how often a host tries an image again after a failure that may pass (default: %(default)s)",
        )
        parser.add_argument(
            "--jitter",
            type=values.duration,
            default=0,
            metavar="DURATION",
            help="let hosts begin within so long, at random",
        )
        parser.add_argument(
            "--relay",
            action="store_true",
            help="let hosts pass the images on to each other while they receive them, where their agents can",
        )
        parser.add_argument(
            "--heads",
            type=int,
            default=chains.HEADS,
            metavar="N",
            help="with --relay, how many hosts of each site ask the image service (default: %(default)s)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        hosts, images = self.hosts(parsed_args), self.images(parsed_args)
        names = [host.name for host in hosts]
        with self.conductor(parsed_args, images, names) as conductor:
            self._prune(conductor)
            terms = self._terms(parsed_args, hosts)
            if terms.concurrency == 1 and terms.relay is None and len(hosts) > _MANY_HOSTS:
                self.note(
                    f"the {len(hosts)} hosts fetch one after the other: --concurrency, or "
                    "precache_concurrency in the configuration, lets more of them fetch at a time"
                )
            work = conductor.start(parsed_args.aggregate, names, images, terms)
            return self.follow(work, conductor, lambda leave: conductor.run(work.id, leave=leave))

    def _prune(self, conductor: AggregatePrecacher) -> None:
        age = opts.from_files(self.app.options.config_file)[0].precache_job_age_seconds
        if age and (pruned := conductor.prune(age)):
            self.note(f"{pruned} old jobs are forgotten: precache_job_age_seconds is {age}")

    def _terms(self, arguments: argparse.Namespace, hosts: Sequence[job_hosts.Placed]) -> job.Terms:
        concurrency = arguments.concurrency
        if concurrency is None:
            concurrency = opts.from_files(self.app.options.config_file)[0].precache_concurrency
        return job.Terms(
            concurrency=concurrency,
            host_rate=arguments.rate,
            total_rate=arguments.total_rate,
            deadline=arguments.deadline,
            pin_until=arguments.pin_until,
            retries=arguments.retries,
            jitter=arguments.jitter,
            relay=None
            if not arguments.relay
            else job.RelayTerms(heads=arguments.heads, sites=job_hosts.sites_of(hosts)),
        )


class Resume(HostsCommand):
    """Go on with a job that was left, and try again what failed."""

    examples = ("precache resume --last",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_job(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        work = self.named_job(parsed_args)
        left = [name for name, cells in work.cells.items() if any(map(_is_tried, cells.values()))]
        with self.conductor(parsed_args, list(work.image_ids), left) as conductor:
            return self.follow(work, conductor, lambda leave: conductor.resume(work.id, leave=leave))


class Cancel(HostsCommand):
    """Stop a job. Its hosts stop too, and what is not done ends as skipped."""

    examples = ("precache cancel --last",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_job(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        job_id = self.job_of(parsed_args)
        with self.conductor(parsed_args, None) as conductor:
            return self.table(conductor.cancel(job_id))


def _is_tried(cell: job.Cell) -> bool:
    """Return whether a resume tries a cell."""
    return cell.result is None or cell.result in job.RETRIED
