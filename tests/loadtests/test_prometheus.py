from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from loadtests.observe.prometheus import HOW_TO_GET, PrometheusFailed, configuration, running_prometheus


def test_a_configuration_reads_one_target_and_keeps_exemplars():
    told = yaml.safe_load(configuration("127.0.0.1:8000", interval_s=0.5, rules=[Path("/rules.yml")]))
    assert told["global"]["scrape_interval"] == told["global"]["scrape_timeout"] == "500ms"
    assert told["storage"]["exemplars"]["max_exemplars"] > 0
    assert told["rule_files"] == ["/rules.yml"]
    assert told["scrape_configs"][0]["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]


def test_without_prometheus_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(PrometheusFailed, match=HOW_TO_GET),
        running_prometheus(tmp_path / "data", target="127.0.0.1:1", port=1, interval_s=1),
    ):
        pass
    assert not (tmp_path / "data").exists()
