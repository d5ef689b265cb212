"""The words that dashboards are written in: one way to make each kind of panel, so that all look and read alike."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import common as build_common
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, stat, table, text, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

from serve.telemetry import instruments

DATASOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
#: What stands in a panel that has no data where there is no GPU; the checks let such panels be empty.
NO_GPU = "No GPU, no data"
TAG = "roundhouse"
_SMALLEST_AXES = {"none": 1, "percentunit": 0.01, "reqps": 1, "ops": 1}
COLUMNS = 24

#: Outcomes that the caller is not to blame for.
FAULTS = "|".join(outcome for outcome in instruments.OUTCOMES if outcome in instruments.FAULTS)


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel.

    Args:
        expr: PromQL.
        legend: Name of each series, with its labels as `{{label}}`; in a table, the column of the values.
        exemplars: Whether single traced requests are drawn beside the series.
    """

    expr: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """How one series of a panel differs from its neighbours.

    Args:
        color: Grafana's name of it.
        line: `area` is filled and, in a stacked panel, stacked; the others are neither.
    """

    color: str
    line: str = "area"

    def properties(self) -> list[models.DynamicConfigValue]:
        """Return it in Grafana's words."""
        told: dict[str, Any] = {"color": {"mode": "fixed", "fixedColor": self.color}}
        if self.line != "area":
            told["custom.lineStyle"] = {"fill": self.line, "dash": [10, 6] if self.line == "dash" else [2, 6]}
            told["custom.stacking"] = {"mode": "none", "group": "A"}
            told["custom.fillOpacity"] = 0
            told["custom.lineWidth"] = 2
        return [models.DynamicConfigValue(id_val=name, value=value) for name, value in told.items()]


@dataclass(frozen=True, slots=True)
class Step:
    """From which value on a single value takes a colour."""

    value: float
    color: str


def series(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    width: int = 12,
    stacked: bool = False,
    steps: bool = False,
    bars: bool = False,
    most: float | None = None,
    empty: str | None = None,
    looks: Mapping[str, Look] | None = None,
) -> timeseries.Panel:
    """Return a panel of lines over time.

    Args:
        description: What it shows, and what to do when it looks wrong.
        unit: Grafana's.
        width: Of 24 columns.
        stacked: Whether the series add up.
        steps: Whether a value holds until the next, as a count of replicas does.
        bars: Whether each value is a bar, as what happened in an interval, a minute at least, is.
        most: Upper end of the axis.
        empty: What stands there when there is no data.
        looks: Name of a series -> how it differs.
    """
    panel = timeseries.Panel().title(title).description(description).datasource(DATASOURCE).unit(unit)
    panel = panel.span(width).height(8).min(0).line_width(1).show_points(common.VisibilityMode.NEVER)
    panel = panel.fill_opacity(80 if bars else 40 if stacked else 8)
    panel = panel.draw_style(common.GraphDrawStyle.BARS if bars else common.GraphDrawStyle.LINE)
    panel = panel.line_interpolation(common.LineInterpolation.STEP_AFTER if steps else common.LineInterpolation.LINEAR)
    mode = common.StackingMode.NORMAL if stacked or bars else common.StackingMode.NONE
    panel = panel.stacking(build_common.StackingConfig().mode(mode).group("A"))
    panel = panel.legend(
        build_common.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.LIST)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    panel = panel.tooltip(
        build_common.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    )
    panel = panel.color_scheme(build.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))
    for name, look in (looks or {}).items():
        panel = panel.override_by_name(name, look.properties())
    # A flat zero needs an axis of its own, or it is drawn under a hundred of nothing.
    panel = panel if unit not in _SMALLEST_AXES else panel.axis_soft_max(_SMALLEST_AXES[unit])
    panel = panel if not bars else panel.interval("1m")
    panel = panel if most is None else panel.max(most)
    panel = panel if empty is None else panel.no_value(empty)
    return panel.targets([_target(index, query) for index, query in enumerate(queries)])


def single(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    steps: Sequence[Step] = (),
    empty: str | None = None,
    decimals: int | None = None,
) -> stat.Panel:
    """Return a panel of the newest value of each query, with its recent past behind it.

    Args:
        steps: Ascending; below the first it is green.
        empty, unit: As in `series`.
        decimals: Digits after the point; None leaves it to Grafana.
    """
    panel = stat.Panel().title(title).description(description).datasource(DATASOURCE).unit(unit).span(4).height(4)
    panel = panel.reduce_options(build_common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    panel = panel.graph_mode(common.BigValueGraphMode.AREA).color_mode(common.BigValueColorMode.VALUE)
    panel = panel.color_scheme(build.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
    colors = [models.Threshold(value=None, color="green")]
    colors += [models.Threshold(value=step.value, color=step.color) for step in steps]
    panel = panel.thresholds(build.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(colors))
    panel = panel if empty is None else panel.no_value(empty)
    panel = panel if decimals is None else panel.decimals(decimals)
    return panel.targets([_target(index, query) for index, query in enumerate(queries)])


@dataclass(frozen=True, slots=True)
class Column:
    """A column of values in a table.

    Args:
        unit: Grafana's.
        decimals: Digits after the point; None leaves it to Grafana.
    """

    query: Query
    unit: str
    decimals: int | None = None

    def properties(self) -> list[models.DynamicConfigValue]:
        """Return it in Grafana's words."""
        told = {"unit": self.unit} | ({} if self.decimals is None else {"decimals": self.decimals})
        return [models.DynamicConfigValue(id_val=name, value=value) for name, value in told.items()]


def rows_of(
    title: str, description: str, *columns: Column, labels: Sequence[str], empty: str | None = None
) -> table.Panel:
    """Return a table with a row for each combination of labels, as it is at the end of the time range.

    Args:
        labels: The first columns.
        empty: As in `series`.
    """
    panel = table.Panel().title(title).description(description).datasource(DATASOURCE).span(COLUMNS).height(8)
    letters = [_letter(index) for index in range(len(columns))]
    values = {
        (f"Value #{letter}" if len(columns) > 1 else "Value"): one for letter, one in zip(letters, columns, strict=True)
    }
    ranks = {name: rank for rank, name in enumerate((*labels, *values))}
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel = panel.with_transformation(
        models.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": {"Time": True},
                "indexByName": ranks,
                "renameByName": {name: one.query.legend for name, one in values.items()},
            },
        )
    )
    for one in columns:
        panel = panel.override_by_name(one.query.legend, one.properties())
    panel = panel if empty is None else panel.no_value(empty)
    return panel.targets([_target(index, one.query, tabular=True) for index, one in enumerate(columns)])


def note(title: str, content: str) -> text.Panel:
    """Return a panel of text, in Markdown, which is its own description."""
    panel = text.Panel().title(title).description(content).span(COLUMNS).height(3)
    return panel.mode(TextMode.MARKDOWN).content(content)


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _target(index: int, query: Query, *, tabular: bool = False) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(_letter(index)).expr(query.expr).legend_format(query.legend)
    target = target.datasource(DATASOURCE).exemplar(query.exemplars)
    return target.instant().format(PromQueryFormat.TABLE) if tabular else target.range()


def event(name: str, expr: str, text: str, *, color: str, step: str) -> build.AnnotationQuery:
    """Return marks on every panel of a dashboard where an expression has a value.

    Args:
        text: Of a mark, with the labels as `{{label}}`.
        step: Between evaluations, such as `30s`.
    """
    told = build.AnnotationQuery().name(name).datasource(DATASOURCE).enable(True).icon_color(color)
    return told.expr(expr).title_format(text).text_format("").step(step)


def model_variable(*, with_all: bool) -> build.QueryVariable:
    """Return the variable `$model`: each model that has a replica, and with `with_all` all of them together."""
    variable = build.QueryVariable("model").label("Model").datasource(DATASOURCE)
    variable = variable.query("label_values(roundhouse_model_phase, model)").sort(models.VariableSort.ALPHABETICAL_ASC)
    variable = variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).multi(with_all).include_all(with_all)
    return variable.all_value(".+").current(models.VariableOption(text="All", value="$__all")) if with_all else variable


Panel = timeseries.Panel | stat.Panel | table.Panel | text.Panel


def board(
    name: str,
    description: str,
    rows: Mapping[str, Sequence[Panel]],
    *,
    variables: Sequence[build.QueryVariable] = (),
    events: Sequence[build.AnnotationQuery] = (),
) -> models.Dashboard:
    """Return a dashboard.

    Args:
        name: In its title and, in small letters, in its uid, which is what links and upgrades know it by.
        rows: Title -> panels, whose widths come to whole lines.
    """
    made = build.Dashboard(f"Roundhouse / {name}").uid(f"{TAG}-{name.lower()}").description(description)
    made = made.tags([TAG]).timezone("browser").time("now-1h", "now").refresh("30s")
    made = made.tooltip(models.DashboardCursorSync.CROSSHAIR)
    made = made.with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    for variable in variables:
        made = made.with_variable(variable)
    for one in events:
        made = made.annotation(one)
    links = build.DashboardLink("Roundhouse").type(models.DashboardLinkType.DASHBOARDS).tags([TAG])
    made = made.link(links.include_vars(True).keep_time(True).as_dropdown(False))
    numbers = itertools.count(1)
    for title, panels in rows.items():
        made = made.with_row(build.Row(title).id(next(numbers)))
        for panel in panels:
            made = made.with_panel(panel.id(next(numbers)))
    return made.build()
