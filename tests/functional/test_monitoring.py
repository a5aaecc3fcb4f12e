# SPDX-License-Identifier: Apache-2.0
"""The alert rules and the dashboard that the project ships, evaluated by a real Prometheus.

Grafana itself is not run: what is tried is that each of its expressions is understood, and has data on a day
on which everything that it shows happens.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.lab.prometheus import Prometheus, promtool, running_prometheus
from tests.support import needs, recorded_series

MONITORING = pathlib.Path(__file__).parents[2] / "examples/monitoring"
RULES = MONITORING / "rules.yml"
DASHBOARD = json.loads((MONITORING / "grafana.json").read_text())

#: What Grafana puts in the place of its variables.
VARIABLES = {"$__rate_interval": "20m", "$__range": "24h", "$instance": ".*"}


@pytest.fixture(scope="module")
def day() -> tuple[float, float]:
    """When the recorded day begins and ends, epoch seconds."""
    end = time.time() - time.time() % 60
    return end - recorded_series.DAY, end


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, day: tuple[float, float]) -> Iterator[Prometheus]:
    """A Prometheus that knows the recorded day."""
    needs.program("prometheus")
    home = tmp_path_factory.mktemp("prometheus")
    series = recorded_series.record(home / "caches", day[1])
    with running_prometheus(home, series, RULES) as running:
        yield running


def expressions() -> list[tuple[str, str]]:
    """Return each of the dashboard's expressions with its panel's title."""
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def plain(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(("title", "expression"), expressions(), ids=[title for title, _e in expressions()])
def test_each_expression_of_the_dashboard_has_data(
    prometheus: Prometheus, day: tuple[float, float], title: str, expression: str
) -> None:
    found = prometheus.range(plain(expression), *day, recorded_series.STEP)
    values = [float(value) for series in found for _when, value in series["values"]]
    assert any(value == value for value in values), title  # something else than NaN


def test_the_dashboard_knows_each_host(prometheus: Prometheus, day: tuple[float, float]) -> None:
    query = next(
        each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"
    )
    assert query == "label_values(imagecache_build_info, instance)"
    found = prometheus.at("imagecache_build_info", day[1])
    assert {each["metric"]["instance"] for each in found} == {"compute-1:9471", "compute-2:9471"}


@pytest.mark.parametrize(
    ("alert", "hosts"),
    [
        ("ImageCachePassOverdue", {"compute-1:9471"}),
        ("ImageCacheDamaged", {"compute-1:9471"}),
        ("ImageCacheFetchesFail", {"compute-1:9471"}),
        ("ImageCacheImageRejected", {"compute-1:9471"}),
        ("ImageCacheNoSpace", set()),
        ("ImageCacheAgentDown", set()),
        ("ImageCacheNotScrubbed", set()),
    ],
)
def test_a_bad_day_is_told_and_a_good_one_is_not(
    prometheus: Prometheus, day: tuple[float, float], alert: str, hosts: set[str]
) -> None:
    expression = next(rule["expr"] for rule in rules() if rule["alert"] == alert)
    # The first pass of the day comes in its first hour.
    found = prometheus.range(expression, day[0] + 3600, day[1], recorded_series.STEP)
    assert {each["metric"]["instance"] for each in found} == hosts


def test_prometheus_loads_all_rules(prometheus: Prometheus) -> None:
    loaded = prometheus.rules()
    assert {rule["name"] for rule in loaded} == {rule["alert"] for rule in rules()}
    assert {rule["health"] for rule in loaded} <= {"ok", "unknown"}


def test_promtool_finds_no_fault_with_the_rules_and_their_tests() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)
    promtool("test", "rules", MONITORING / "rules_test.yml")


def test_each_rule_is_tested_and_says_what_to_do() -> None:
    tested = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    fired = {each["alertname"] for test in tested for each in test["alert_rule_test"] if each["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules()}
    assert all({"summary", "action"} <= set(rule["annotations"]) for rule in rules())
