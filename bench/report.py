"""What every bench needs: the machine it ran on, figures into a file, a table onto the screen."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import click
import psutil

from serve_app.engine.host_env import REPLICA_ENV

ROOT = Path(__file__).parents[1]

json_option = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures into this file."
)


def use_replica_env() -> None:
    """Start this program again with a replica's environment, unless it has that: malloc reads it only at the start."""
    if any(os.environ.get(name) != value for name, value in REPLICA_ENV.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **REPLICA_ENV})


def hardware() -> dict[str, str | int | float]:
    """The machine, the versions that matter, and how malloc was set."""
    import torch  # here, so that benches without torch can write a table

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": _version("ray"),
        **{name: os.environ.get(name, "unset") for name in REPLICA_ENV},
    }


def commit() -> str:
    """The commit that is checked out, with `-dirty` behind it when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def save(figures: Mapping[str, float], json_file: Path | None, **more: object) -> None:
    """Write the figures, where and of what they are, and what else there is, into a file if one is wanted."""
    if json_file is not None:
        report = {"hardware": hardware(), "commit": commit(), "figures": dict(figures), **more}
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def show_hardware() -> None:
    """Print the machine and the commit."""
    for name, value in {**hardware(), "commit": commit()}.items():
        click.echo(f"{name}: {value}")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of text, the first to the left, the rest to the right, as `shown`."""
    cells = [list(head), *([shown(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def shown(value: object) -> str:
    """A value as it is in a table: floats with three digits that count."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
