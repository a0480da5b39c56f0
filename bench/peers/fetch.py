"""Fetches what Lockstep is measured beside, from package registries alone, into .peers/: `python -m bench.peers.fetch`.

Triton's server comes out of the wheel of nvidia-pytriton (with the Python backend only), perf_analyzer out of that of
tritonclient 2.48, which still runs on glibc 2.35; the CUDA runtime that it links comes out of its own wheel, and libb64
out of Debian's package. Linux on x86-64, Debian or Ubuntu.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers"
TRITON = {"2.51": "nvidia-pytriton==0.7.0", "2.36": "nvidia-pytriton==0.4.0"}
"""Versions of the server, and where they are: the newest there is, and the last that does not crash on streams."""
ANALYZER = ("tritonclient==2.48.0", "nvidia-cuda-runtime-cu12==12.9.79")
LIBRARIES = {"libcudart.so.12", "libb64.so.0d"}


def fetch_analyzer() -> Path:
    """perf_analyzer, with the libraries that it needs beside it."""
    folder = PEERS / "perf_analyzer"
    program = folder / "perf_analyzer"
    if not program.exists():
        unpacked = folder / "unpacked"
        for package in ANALYZER:
            unpack(package, unpacked)
        deb = folder / "deb"
        deb.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", "libb64-0d"], cwd=deb, check=True)
        subprocess.run(["dpkg", "-x", *map(str, deb.glob("*.deb")), str(unpacked)], check=True)
        for file in list(unpacked.rglob("*")):
            if file.name in LIBRARIES:
                shutil.copy(file, folder / file.name)
        shutil.copy(next(unpacked.rglob("data/bin/perf_analyzer")), program)
        program.chmod(0o755)
        shutil.rmtree(unpacked)
    return program


def fetch_triton(version: str) -> Path:
    """The folder with bin/tritonserver and the Python backend."""
    folder = PEERS / f"triton-{version}"
    if not folder.exists():
        unpack(TRITON[version], folder)
    server: Path = folder / "pytriton" / "tritonserver"
    backend = server / "backends" / "python"
    stub = server / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
    if not (backend / stub.name).exists():
        shutil.copy(stub, backend / stub.name)
        for program in (server / "bin" / "tritonserver", backend / stub.name):
            program.chmod(0o755)
    return server


def unpack(package: str, folder: Path) -> None:
    """A wheel's files."""
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), package]
    subprocess.run(command, check=True)
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    shutil.rmtree(wheels)


@click.command()
def main() -> None:
    """Fetch perf_analyzer, and Triton's server in all versions that are measured."""
    click.echo(fetch_analyzer())
    for version in TRITON:
        click.echo(fetch_triton(version))


if __name__ == "__main__":
    main()
