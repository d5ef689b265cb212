"""Every alert fires when it should and not when it should not, by Prometheus's own tool, and leads to a page."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serve.cli import CLUSTER_COMMANDS, COMMANDS
from serve.cluster.controller import Counters
from serve.cluster.health import metrics
from serve.telemetry.instruments import ALL
from serve.telemetry.rules import ALERTS, RECORDINGS, WINDOWS, Alert, markdown_table, rules_yaml

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted((DOCS / "runbooks").glob("*.md"))
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not on PATH; it comes with Prometheus (Debian: the package prometheus)"
)
MODEL = {"namespace": "ns", "model": "a"}
NAMESPACE = {"namespace": "ns"}


class Firing(NamedTuple):
    """An alert that is expected: what labels it has besides its severity, and how its value is written."""

    labels: Mapping[str, str]
    value: str = ""
    severity: str = ""


class Case(NamedTuple):
    """Series by name and labels, each a value a minute, and what fires then."""

    alert: str
    minute: int
    series: Mapping[str, str]
    firing: tuple[Firing, ...] = ()


def requests(objective: str, *, met: str, missed: str, target: str) -> dict[str, str]:
    """Return the series of one objective."""
    labels = f'namespace="ns", model="a", pod="x", objective="{objective}"'
    told = "roundhouse_objective_requests_total"
    return {
        f'{told}{{{labels}, result="met"}}': met,
        f'{told}{{{labels}, result="missed"}}': missed,
        f"roundhouse_objective_target{{{labels}}}": target,
    }


def of_model(name: str, values: str, **labels: str) -> dict[str, str]:
    """Return one series of a model."""
    told = ", ".join(f'{key}="{value}"' for key, value in ({**MODEL, "pod": "x"} | labels).items())
    return {f"roundhouse_{name}{{{told}}}": values}


def of_controller(name: str, values: str) -> dict[str, str]:
    """Return one series of a controller."""
    return {f'roundhouse_controller_{name}{{namespace="ns", pod="c"}}': values}


def up(instance: str, values: str, job: str = "roundhouse") -> dict[str, str]:
    """Return whether a target answers."""
    return {f'up{{namespace="ns", job="{job}", instance="{instance}"}}': values}


BOTH = ("critical", "warning")
AVAILABILITY, LATENCY = "RoundhouseAvailabilityBurns", "RoundhouseLatencyBurns"
TARGET = {AVAILABILITY: ("availability", "0.999x200"), LATENCY: ("latency", "0.99x200")}


def burning(alert: str, minute: int, met: str, missed: str, firing: tuple[Firing, ...] = ()) -> Case:
    objective, target = TARGET[alert]
    return Case(alert, minute, requests(objective, met=met, missed=missed, target=target), firing)


def burns(alert: str, value: str, severities: tuple[str, ...]) -> tuple[Firing, ...]:
    labels = MODEL | {"objective": TARGET[alert][0]}
    return tuple(Firing(labels, value, severity) for severity in severities)


CASES = {
    "a quarter of the requests fails": burning(
        AVAILABILITY, 70, "0+30x200", "0+10x200", burns(AVAILABILITY, "25%", BOTH)
    ),
    "four of a thousand fail": burning(
        AVAILABILITY, 130, "0+249x200", "0+1x200", burns(AVAILABILITY, "0.4%", ("warning",))
    ),
    "one of two failed": burning(AVAILABILITY, 70, "0x5 1x195", "0x5 1x195"),
    "as few fail as may": burning(AVAILABILITY, 130, "0+1999x200", "0+1x200"),
    "many failed, and none in the last half hour": burning(
        AVAILABILITY, 160, "0+50x200", "0+1x120 120x80", burns(AVAILABILITY, "1.478%", ("warning",))
    ),
    "a model whose last replica is gone has still promised": Case(
        AVAILABILITY,
        100,
        requests("availability", met="0+1x200", missed="0+10x200", target="0.999x20 stale"),
        burns(AVAILABILITY, "90.91%", BOTH),
    ),
    "a replica that starts anew promises nothing yet": Case(
        AVAILABILITY,
        100,
        requests("availability", met="0+1x200", missed="0+10x200", target="0.999x20 0x180"),
        burns(AVAILABILITY, "90.91%", BOTH),
    ),
    "a quarter of the answers is late": burning(LATENCY, 70, "0+30x200", "0+10x200", burns(LATENCY, "25%", BOTH)),
    "four of a hundred are late": burning(LATENCY, 130, "0+24x200", "0+1x200", burns(LATENCY, "4%", ("warning",))),
    "one of two was late": burning(LATENCY, 70, "0x5 1x195", "0x5 1x195"),
    "no latency is promised": Case(LATENCY, 70, requests("latency", met="0+1x100", missed="0+10x100", target="0x100")),
    "two are wanted and none is ready": Case(
        "RoundhouseModelNotReady",
        20,
        of_model("scaling_replicas", "2x30", state="wanted") | of_model("model_phase", "0x30", phase="ready"),
        (Firing(MODEL, "2"),),
    ),
    "two are wanted and no process is there": Case(
        "RoundhouseModelNotReady",
        20,
        of_model("scaling_replicas", "2x30", state="wanted"),
        (Firing(MODEL, "2"),),
    ),
    "one of two is ready": Case(
        "RoundhouseModelNotReady",
        20,
        of_model("scaling_replicas", "2x30", state="wanted") | of_model("model_phase", "1x30", phase="ready"),
    ),
    "none is wanted": Case("RoundhouseModelNotReady", 20, of_model("scaling_replicas", "0x30", state="wanted")),
    "a load failed twice": Case(
        "RoundhouseModelFailsToLoad",
        30,
        of_model("model_load_failures_total", "0 1 2x40", reason="source"),
        (Firing(MODEL | {"reason": "source"}, "2"),),
    ),
    "a load failed once": Case(
        "RoundhouseModelFailsToLoad", 30, of_model("model_load_failures_total", "0 1x40", reason="model")
    ),
    "one replica became ready four times": Case(
        "RoundhouseReplicasRestart",
        60,
        of_model("cold_starts_total", "0 1 2 3 4x60") | of_model("model_phase", "1x64", phase="ready"),
        (Firing(MODEL, "4"),),
    ),
    "ten replicas became ready once": Case(
        "RoundhouseReplicasRestart",
        60,
        of_model("cold_starts_total", "0 10x60") | of_model("model_phase", "10x64", phase="ready"),
    ),
    "up four times and down four times": Case(
        "RoundhouseScalingFlaps",
        60,
        of_model("scaling_decisions_total", "0 1 2 3 4x60", direction="up", reason="load")
        | of_model("scaling_decisions_total", "0 0 1 2 3 4x60", direction="down", reason="idle"),
        (Firing(MODEL, "4"),),
    ),
    "up ten times": Case(
        "RoundhouseScalingFlaps",
        60,
        of_model("scaling_decisions_total", "0+1x60", direction="up", reason="load")
        | of_model("scaling_decisions_total", "0 1x60", direction="down", reason="idle"),
    ),
    "ever more items wait": Case(
        "RoundhouseQueueGrows", 25, of_model("queue_depth", "10+1x40", kind="item"), (Firing(MODEL, "25"),)
    ),
    "ever fewer items wait": Case("RoundhouseQueueGrows", 25, of_model("queue_depth", "90-1x40", kind="item")),
    "a few items wait": Case("RoundhouseQueueGrows", 25, of_model("queue_depth", "1+0.1x40", kind="item")),
    "a controller makes no pass": Case(
        "RoundhouseControllerStuck",
        20,
        of_controller("passes_total", "100x30") | of_controller("leads", "1x30"),
        (Firing(NAMESPACE),),
    ),
    "a controller is gone": Case(
        "RoundhouseControllerStuck", 40, of_controller("leads", "1x10 stale"), (Firing(NAMESPACE),)
    ),
    "a controller makes passes": Case(
        "RoundhouseControllerStuck", 20, of_controller("passes_total", "0+4x30") | of_controller("leads", "1x30")
    ),
    "every pass fails": Case(
        "RoundhouseControllerFails",
        40,
        of_controller("passes_total", "0+1x50") | of_controller("errors_total", "0+1x50"),
        (Firing(NAMESPACE, "100%"),),
    ),
    "a pass of four fails": Case(
        "RoundhouseControllerFails",
        40,
        of_controller("passes_total", "0+4x50") | of_controller("errors_total", "0+1x50"),
    ),
    "no node answers": Case(
        "RoundhouseNotScraped", 30, up("a", "1x10 0x30") | up("b", "1x10 stale"), (Firing(NAMESPACE),)
    ),
    "one node answers": Case("RoundhouseNotScraped", 30, up("a", "1x10 0x30") | up("b", "1x40")),
    "a platform that was never there is not missed": Case("RoundhouseNotScraped", 30, up("a", "1x40", job="other")),
    "a controller does not answer": Case(
        "RoundhouseTargetDown",
        30,
        up("c", "1x5 0x30", job="roundhouse-controller") | up("d", "0x40", job="other"),
        (Firing(NAMESPACE | {"job": "roundhouse-controller", "instance": "c"}, "0"),),
    ),
    "a node missed one scrape": Case("RoundhouseTargetDown", 30, up("a", "1x28 0 0 1x10")),
    "a tenth of the spans is dropped": Case(
        "RoundhouseSpansDropped",
        40,
        of_model("telemetry_spans_total", "0+90x50", result="exported")
        | of_model("telemetry_spans_total", "0+10x50", result="dropped"),
        (Firing(NAMESPACE, "10%"),),
    ),
    "few spans are dropped": Case(
        "RoundhouseSpansDropped",
        40,
        of_model("telemetry_spans_total", "0+1x50", result="exported")
        | of_model("telemetry_spans_total", "0+1x50", result="dropped"),
    ),
}


def told(template: str, firing: Firing) -> str:
    """Return what a template of an alert says."""
    text = re.sub(
        r"\{\{ with \$labels\.(\w+) \}\}(.*?)\{\{ \. \}\}\{\{ end \}\}",
        lambda found: found[2] + firing.labels[found[1]],
        template,
    )
    text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: firing.labels[found[1]], text)
    return re.sub(r"\{\{ \$value( \| \w+)? \}\}", firing.value, text)


def expected(alert: str, firing: Firing) -> dict[str, Any]:
    """Return an alert as promtool expects it."""
    [one] = [each for each in ALERTS if each.name == alert and each.severity in (firing.severity or BOTH)]
    annotations = one.as_rule(runbooks="https://pages/")["annotations"]
    return {
        "exp_labels": {**firing.labels, "severity": one.severity},
        "exp_annotations": {key: told(text, firing) for key, text in annotations.items()},
    }


def as_promtool_reads(case: Case) -> dict[str, Any]:
    series = [{"series": name, "values": values} for name, values in case.series.items()]
    alerts = [expected(case.alert, firing) for firing in case.firing]
    asked = {"alertname": case.alert, "eval_time": f"{case.minute}m", "exp_alerts": alerts}
    return {"interval": "1m", "input_series": series, "alert_rule_test": [asked]}


def promtool(*words: str) -> str:
    """Run promtool and return what it says; it must be pleased."""
    done = subprocess.run([str(PROMTOOL), *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(rules_yaml(runbooks="https://pages/"))
    return path


@needs_promtool
def test_prometheus_takes_the_rules(rules: Path):
    assert f"SUCCESS: {len(ALERTS) + len(RECORDINGS)} rules found" in promtool("check", "rules", str(rules))


@needs_promtool
@pytest.mark.parametrize("name", CASES)
def test_an_alert_fires_where_it_should_and_says_why(rules: Path, name: str):
    test = rules.with_name("test.yaml")
    wanted = {"rule_files": [rules.name], "evaluation_interval": "1m", "tests": [as_promtool_reads(CASES[name])]}
    test.write_text(yaml.safe_dump(wanted))
    promtool("test", "rules", str(test))


@needs_promtool
def test_what_is_recorded_of_an_objective_is_its_rate_and_share(rules: Path):
    series = requests("latency", met="0+54x100", missed="0+6x100", target="0.99x100")
    labels = '{model="a", namespace="ns", objective="latency"}'
    wanted = {
        f"namespace_model_objective:roundhouse_objective_requests:rate1h{labels}": 1,
        f"namespace_model_objective:roundhouse_objective_missed:ratio_rate1h{labels}": 0.1,
        f"namespace_model_objective:roundhouse_objective_target:last6h{labels}": 0.99,
    }
    asked = [
        {"expr": sample.partition("{")[0], "eval_time": "90m", "exp_samples": [{"labels": sample, "value": value}]}
        for sample, value in wanted.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = rules.with_name("test.yaml")
    tests = [{"interval": "1m", "input_series": inputs, "promql_expr_test": asked}]
    test.write_text(yaml.safe_dump({"rule_files": [rules.name], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(test))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert.name}-{alert.severity}")
def test_every_alert_has_a_case_that_fires_and_one_that_does_not(alert: Alert):
    cases = [case for case in CASES.values() if case.alert == alert.name]
    assert any(firing.severity in ("", alert.severity) for case in cases for firing in case.firing)
    assert any(not case.firing for case in cases)


def test_the_cases_are_of_alerts_that_are_there():
    assert {case.alert for case in CASES.values()} == {alert.name for alert in ALERTS}


# Names


def exposed() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return each series that Prometheus can know of us: its labels, and the values of those that are listed."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for one in ALL:
        ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[one.kind]
        found |= {one.exposed_name + end: {**one.labels, "model": (), "le": ()} for end in ends}
    controller: Any = SimpleNamespace(counters=Counters(phases={"Ready": 1}))
    for family in text_string_to_metric_families(metrics(controller, leads=True)):
        found |= {sample.name: dict.fromkeys(sample.labels, ()) for sample in family.samples}
    labels = {"model": (), "objective": ("availability", "latency"), "outcome": (), "quantile": ()}
    return found | {one.name: labels for one in RECORDINGS} | {"up": {"job": (), "instance": ()}}


def selectors(expression: str) -> Iterator[promql_parser.VectorSelector]:
    """Yield what an expression selects."""
    found: list[promql_parser.VectorSelector] = []

    def visit(part: promql_parser.Expr) -> None:
        if isinstance(part, promql_parser.VectorSelector):
            found.append(part)
        elif isinstance(part, promql_parser.MatrixSelector):
            found.append(part.vector_selector)

    promql_parser.walk(promql_parser.parse(expression), visit)
    yield from found


def check_names(expression: str) -> None:
    """Fail where an expression names a series, a label or a value that nobody exposes."""
    known = exposed()
    for selector in selectors(expression):
        assert selector.name in known, f"{selector.name} is no instrument"
        for matcher in selector.matchers.matchers:
            if matcher.name == "namespace":
                continue
            assert matcher.name in known[selector.name], f"{selector.name} has no label {matcher.name}"
            values = known[selector.name][matcher.name]
            assert not values or matcher.value in values, f"{selector.name} has no {matcher.name} {matcher.value}"


@pytest.mark.parametrize("rule", (*RECORDINGS, *ALERTS), ids=lambda rule: rule.name)
def test_rules_name_what_is_exposed(rule: Any):
    assert list(selectors(rule.expression))
    check_names(rule.expression)


def test_a_name_that_nobody_exposes_is_noticed():
    for wrong in ("roundhouse_none", 'roundhouse_rejected_total{why="x"}', 'roundhouse_rejected_total{reason="x"}'):
        with pytest.raises(AssertionError):
            check_names(f"rate({wrong}[5m])" if "total" in wrong else wrong)


def test_names_of_recordings_say_what_they_are_by():
    for one in RECORDINGS:
        level, metric, _ = one.name.split(":")
        assert level.startswith("namespace_model"), one.name
        assert metric.startswith("roundhouse_")
        assert (
            f"by ({level.replace('_', ', ')}" in one.expression
            or "histogram_quantile" in one.expression
            or ("ratio" in one.name)
        )


def test_each_window_is_recorded():
    names = {one.name for one in RECORDINGS}
    for window in WINDOWS:
        assert f"namespace_model_objective:roundhouse_objective_missed:ratio_rate{window}" in names


# Pages


def test_every_alert_leads_to_a_page_and_every_page_is_led_to():
    assert {page.name for page in PAGES} == {alert.page for alert in ALERTS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_what_it_means_who_notices_how_to_look_and_what_to_do(page: Path):
    text = page.read_text()
    [name] = {alert.name for alert in ALERTS if alert.page == page.name}
    assert text.startswith(f"# {name}\n")
    assert re.findall("^## (.*)$", text, re.MULTILINE) == [
        "What it means",
        "What users see",
        "How to look",
        "What to do",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_queries_and_commands_of_a_page_are_right(page: Path):
    text = page.read_text()
    queries = re.findall(r"```promql\n(.*?)```", text, re.DOTALL)
    assert queries
    for query in queries:
        for line in filter(None, query.splitlines()):
            check_names(line.replace("NAME", "a"))
    commands = {command.name for command in (*COMMANDS, *CLUSTER_COMMANDS)}
    assert set(re.findall(r"^roundhouse ([a-z-]+)", text, re.MULTILINE)) <= commands
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (page.parent / link).exists(), link


def test_the_page_of_alerts_holds_the_table():
    page = (DOCS / "alerts.md").read_text()
    begin, end = "<!-- table: serve.telemetry.rules.markdown_table() -->\n", "<!-- end of table -->"
    assert page[page.index(begin) + len(begin) : page.index(end)].strip() == markdown_table().strip(), (
        "put what `serve.telemetry.rules.markdown_table()` returns between the marks in docs/alerts.md"
    )
