"""`python -m serve_app configs/lstm.yaml`: `serve run`, with HAProxy in front instead of Serve's own proxy.

HAProxy leads clients straight to the ingress replicas: a message costs a tenth of what it costs through the proxy. It
has to be chosen before Ray starts, and its process can outlive Ray; so it is started here, and ended here.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import psutil

STOP_WITHIN_S = 10

SERVE_ENV = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",  # each turn takes 3 ms of a core
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",  # of each process; Prometheus asks more seldom
    # What the dashboard shows of nodes, and of itself: tens of ms of a core each time, for which sessions wait.
    "REPORTER_UPDATE_INTERVAL_MS": "15000",
    "METRICS_RECORD_INTERVAL_S": "15",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.2",  # after three in vain it is started again
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "500ms",  # of an ingress that stands still: so long to answer, then 250 ms
}
"""Of each node's processes, from before Ray starts. On a cluster it comes from cluster/Dockerfile."""


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--haproxy/--no-haproxy", default=True, show_default=True, help="--no-haproxy: Serve's own proxy.")
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
def main(*, haproxy: bool, arguments: tuple[str, ...]) -> None:
    """Run what ARGUMENTS of `serve run` say: a configuration file, or an import path and settings."""
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        environment = {**os.environ, **(haproxy_env(Path(folder)) if haproxy else {})}
        command = [sys.executable, "-m", "ray.serve.scripts", "run", *arguments]
        for end in (signal.SIGINT, signal.SIGTERM):
            signal.signal(end, interrupt)
        running = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            status = running.wait()
        except KeyboardInterrupt:
            running.send_signal(signal.SIGTERM)
            status = running.wait()
        end_haproxy(folder)
    sys.exit(status)


def interrupt(number: int, frame: object) -> None:
    """End the program, whether it was asked to by Control-C or by kill."""
    raise KeyboardInterrupt


def haproxy_env(folder: Path) -> dict[str, str]:
    """What Ray needs in its environment; HAProxy's files lie in `folder`, so that it can be told from others."""
    prefix = "RAY_SERVE_HAPROXY"
    return {
        **SERVE_ENV,
        f"{prefix}_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        f"{prefix}_SOCKET_PATH": str(folder / "admin.sock"),
        f"{prefix}_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        f"{prefix}_SERVER_STATE_BASE": str(folder),
        f"{prefix}_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def end_haproxy(folder: str) -> None:
    """End the HAProxy whose files lie there, if Ray has left it behind."""
    left = find_haproxy(folder)
    for process in left:
        process.terminate()
    _, left = psutil.wait_procs(left, STOP_WITHIN_S)
    for process in left:
        process.kill()


def find_haproxy(folder: str) -> list[psutil.Process]:
    """The processes of the HAProxy whose files lie there."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "haproxy" and any(folder in part for part in process.info["cmdline"] or ())
    ]


if __name__ == "__main__":
    main()
