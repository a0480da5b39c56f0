"""The dashboard for Grafana: `python -m cluster.grafana` writes cluster/grafana.json, which Grafana imports."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import click

DASHBOARD = Path(__file__).with_name("grafana.json")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
HEIGHT, WIDTH, COLUMNS = 8, 8, 3

OF_REPLICAS = 'application=~"$application",model=~"$model"'
OF_DIRECTORY = 'model=~"$model"'
"""Its metrics have no application."""

Query = tuple[str, str]
"""An expression, and what its lines are called."""
Panel = tuple[str, str, list[Query]]
"""Title, unit, queries."""


def gauge(name: str, of: str = OF_REPLICAS, aggregate: str = "sum") -> Query:
    """What there is now."""
    return f"{aggregate} by (model) (ray_lockstep_{name}{{{of}}})", f"{{{{model}}}} {name}"


def rate(name: str, *by: str, of: str = OF_REPLICAS) -> Query:
    """A counter's increase in a second."""
    legend = " ".join(["{{model}}", name, *(f"{{{{{tag}}}}}" for tag in by)])
    return f"sum by ({', '.join(('model', *by))}) (rate(ray_lockstep_{name}_total{{{of}}}[$__rate_interval]))", legend


def quantiles(name: str) -> list[Query]:
    """Median and 99th percentile of a histogram."""
    buckets = f"sum by (model, le) (rate(ray_lockstep_{name}_bucket{{{OF_REPLICAS}}}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {buckets})", f"{{{{model}}}} {name} p{100 * q:.0f}") for q in (0.5, 0.99)]


ROWS: dict[str, list[Panel]] = {
    "Sessions": [
        ("Sessions", "short", [gauge("sessions_open"), gauge("sessions_running"), gauge("sessions_evicted")]),
        ("Slots in use, of all replicas", "short", [gauge("slots_used")]),
        ("Share of the slots in use, of the fullest replica", "percentunit", [gauge("slot_use", aggregate="max")]),
        ("Sessions ended, by reason", "cps", [rate("session_ends", "reason")]),
        ("Entries refused, by error", "cps", [rate("refusals", "code")]),
        ("Bytes of inputs and of outputs that wait", "bytes", [gauge("pending_bytes"), gauge("retained_bytes")]),
    ],
    "Steps": [
        ("Timesteps", "cps", [rate("timesteps")]),
        ("Segments", "cps", [rate("segments")]),
        ("Sessions of a step", "short", quantiles("batch_size")),
        ("Longest wait of a step's sessions", "s", quantiles("queue_delay_s")),
        ("Time of a step", "s", quantiles("step_time_s")),
        ("Load, of the busiest replica", "percentunit", [gauge("load", aggregate="max")]),
        ("Longest wait now, of any session", "s", [gauge("longest_wait_s", aggregate="max")]),
        ("Steps, replays of CUDA graphs, failures", "cps", [rate("steps"), rate("graph_steps"), rate("failed_steps")]),
    ],
    "States": [
        ("States that move between device and host", "cps", [rate("evictions"), rate("restores")]),
        ("Checkpoints", "cps", [rate("checkpoints")]),
    ],
    "Directory (of all applications)": [
        ("Sessions that wait for a place", "short", [gauge("sessions_waiting", of=OF_DIRECTORY)]),
        ("Sessions opened", "cps", [rate("sessions_opened", of=OF_DIRECTORY)]),
        ("Sessions moved to another replica", "cps", [rate("sessions_moved", of=OF_DIRECTORY)]),
        ("Sessions refused, by error", "cps", [rate("sessions_refused", "code", of=OF_DIRECTORY)]),
    ],
    "Stateless models": [
        ("Rows and requests", "cps", [rate("rows"), rate("requests")]),
        ("Batches", "cps", [rate("batches")]),
        ("Rows of a batch", "short", quantiles("batch_rows")),
        ("Longest wait of a batch's rows", "s", quantiles("rows_delay_s")),
        ("Time of a batch", "s", quantiles("batch_time_s")),
        ("Rows that wait", "short", [gauge("rows_waiting")]),
        ("Rows that failed, or waited too long", "cps", [rate("failed_rows"), rate("timed_out_rows")]),
    ],
}


def rendered() -> str:
    """The file, out of the rows above."""
    ids, panels, top = count(1), [], 0
    for title, row in ROWS.items():
        position = {"x": 0, "y": top, "w": COLUMNS * WIDTH, "h": 1}
        panels.append({"id": next(ids), "type": "row", "title": title, "gridPos": position, "panels": []})
        for i, panel in enumerate(row):
            x, y = i % COLUMNS * WIDTH, top + 1 + i // COLUMNS * HEIGHT
            panels.append({"id": next(ids), **_graph(*panel), "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT}})
        top += 1 + -(-len(row) // COLUMNS) * HEIGHT
    dashboard = {
        "title": "Lockstep",
        "uid": "lockstep",
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # the same time in all panels
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                _variable("application"),
                _variable("model", 'application=~"$application"'),
            ]
        },
        "panels": panels,
    }
    return json.dumps(dashboard, indent=1) + "\n"


def _graph(title: str, unit: str, queries: list[Query]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": title,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 10}}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(queries)
        ],
    }


def _variable(label: str, *within: str) -> dict[str, Any]:
    """All that the replicas of models with and without sessions have as `label`."""
    selector = ",".join(['__name__=~"ray_lockstep_(sessions_open|rows_waiting)"', *within])
    return {
        "name": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({{{selector}}}, {label})", "refId": label},
        "refresh": 2,  # whenever the time range changes
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


@click.command()
def main() -> None:
    """Write the dashboard."""
    DASHBOARD.write_text(rendered())


if __name__ == "__main__":
    main()
