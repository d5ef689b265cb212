"""The dashboards ask for what the instruments expose, say what they show, and leave the package as files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import promql_parser as promql
import pytest

from serve.cli import main
from serve.telemetry.dashboards import dashboards
from serve.telemetry.instruments import ALL, Instrument
from tests.queries import OF_TARGETS, Panel, boards, metrics, panels, uses, whole

ASKING = [panel for panel in panels() if panel.queries]


def exposed() -> dict[str, tuple[Instrument, set[str]]]:
    """Return each series' name with its instrument and labels."""
    found = {}
    for one in ALL:
        labels = {"model", *one.labels, *OF_TARGETS}
        if one.kind == "histogram":
            found[f"{one.exposed_name}_bucket"] = one, labels | {"le"}
            found[f"{one.exposed_name}_sum"] = found[f"{one.exposed_name}_count"] = one, labels
        else:
            found[one.exposed_name + ("_total" if one.kind == "counter" else "")] = one, labels
    return found


@pytest.mark.parametrize("panel", ASKING, ids=str)
def test_every_query_asks_for_series_that_there_are(panel: Panel):
    known = exposed()
    for expr, _ in panel.queries:
        parsed = promql.parse(whole(expr))
        for metric in metrics(parsed):
            assert metric in known, f"no instrument exposes {metric}"
        for use in uses(parsed):
            one, labels = known[use.metric]
            assert use.label in labels, f"{use.metric} has no label {use.label}"
            if use.label in one.labels:
                assert set(use.values) <= set(one.labels[use.label]), use


@pytest.mark.parametrize("panel", ASKING, ids=str)
def test_a_counter_is_read_as_a_rate_and_a_gauge_is_not(panel: Panel):
    for expr, _ in panel.queries:
        for name in re.findall(r"(?:rate|increase)\((\w+)", expr):
            assert name.endswith(("_total", "_bucket", "_sum", "_count")), name
        for name, bracket in re.findall(r"(roundhouse_\w+_total)(?:\{[^}]*\})?(\[?)", expr):
            assert bracket, f"{name} as it stands tells nothing"


@pytest.mark.parametrize("panel", panels(), ids=str)
def test_every_panel_says_what_it_shows_in_a_unit(panel: Panel):
    if panel.is_marks:
        return
    assert panel.told["description"].endswith(".")
    assert panel.told["title"]
    if panel.told["type"] in ("timeseries", "stat"):
        assert panel.told["fieldConfig"]["defaults"]["unit"]
        assert len(panel.told["description"].split(". ")) > 1, "say what to do when it looks wrong"


@pytest.mark.parametrize("board", boards().values(), ids=list(boards()))
def test_a_dashboard_is_whole(board: dict[str, object]):
    text = json.dumps(board)
    assert re.fullmatch(r"roundhouse-[a-z]+", str(board["uid"]))
    assert board["tags"] == ["roundhouse"]
    variables = {one["name"] for one in board["templating"]["list"]}  # type: ignore[index]
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__range", "__all"}
    assert used <= variables
    assert {"datasource"} <= used
    shown = board["panels"]
    assert isinstance(shown, list)
    assert len({panel["id"] for panel in shown}) == len(shown)
    for panel in shown:
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("board", boards().values(), ids=list(boards()))
def test_panels_fill_their_lines_and_do_not_overlap(board: dict[str, list[dict[str, dict[str, int]]]]):
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & taken
        taken |= own
    for line in {y for _, y in taken}:
        assert {x for x, y in taken if y == line} == set(range(24))


def test_only_panels_of_gpus_may_be_empty():
    assert {panel.board for panel in panels() if panel.wants_gpu} == {"roundhouse-devices"}
    for panel in panels():
        read = {metric for expr, _ in panel.queries for metric in metrics(promql.parse(whole(expr)))}
        assert panel.wants_gpu == any(metric.startswith("roundhouse_device_") for metric in read), panel


def test_traces_are_drawn_beside_the_duration():
    (duration,) = (panel for panel in panels() if str(panel) == "roundhouse-model: Duration")
    assert [target["expr"][:24] for target in duration.told["targets"] if target["exemplar"]] == [
        "histogram_quantile(0.99,"
    ]


def test_export_writes_every_dashboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "new" / "folder"
    assert main(["dashboards", "export", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {entry["uid"] for entry in told} == set(boards())
    assert {entry["file"] for entry in told} == {str(path) for path in folder.iterdir()}
    for entry in told:
        assert json.loads(Path(entry["file"]).read_text())["title"] == entry["title"]


def test_export_replaces_an_earlier_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = dashboards()[0]
    (tmp_path / first.name).write_text(json.dumps({"uid": first.uid, "title": "as it was"}))
    assert main(["dashboards", "export", str(tmp_path)]) == 0
    assert (tmp_path / first.name).read_text() == first.text
    assert first.title in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"uid": "of-somebody-else"}', "[]", "not JSON", None])
def test_export_touches_no_file_of_others(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / dashboards()[-1].name
    path.mkdir() if content is None else path.write_text(content)
    assert main(["dashboards", "export", str(tmp_path)]) == 1
    assert str(path) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
    assert content is None or path.read_text() == content


def test_export_into_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "file"
    path.touch()
    assert main(["dashboards", "export", str(path)]) == 1
    assert f"{path}: cannot be written" in capsys.readouterr().err
