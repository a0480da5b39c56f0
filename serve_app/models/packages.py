"""Files in installed packages, which are not imported: they may need much that is not there."""

import importlib.util
from pathlib import Path


def package_file(package: str, inside: str) -> Path | None:
    """The file `inside` the package; None where the package is not installed, or has no such file."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # the package around it
        return None
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        if (file := Path(folder, inside)).is_file():
            return file
    return None
