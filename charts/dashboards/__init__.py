"""The Grafana dashboards as code; what they come to is committed in the package and in the chart."""

from __future__ import annotations

import json

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from charts.dashboards.devices import devices
from charts.dashboards.model import model
from charts.dashboards.overview import overview
from charts.dashboards.scaling import scaling


def files() -> dict[str, str]:
    """Return each dashboard's file name and text."""
    boards = {"overview": overview(), "scaling": scaling(), "model": model(), "devices": devices()}
    return {f"{name}.json": json.dumps(board, cls=JSONEncoder, indent=2) + "\n" for name, board in boards.items()}
