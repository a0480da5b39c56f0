"""The import direction: app → deployments → {engine, ingress} → {policy, models} → shared files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("serve_app", "clients")
OWN = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}

# The files directly in serve_app that every layer may use, and that use no subpackage.
SHARED = {
    f"serve_app.{path.stem}" for path in (ROOT / "serve_app").glob("*.py") if path.stem not in ("app", "__init__")
}
PURE = {"serve_app.compiled", "serve_app.errors", "serve_app.spec", "serve_app.segment", "serve_app.frame"}
NOT_PURE = {"torch", "ray"}

# Module or package, the most specific first: what it may import of this repository, and which packages it may not.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "serve_app.app": (SHARED | {"serve_app"}, NOT_PURE),
    "serve_app.config": (SHARED | {"serve_app.models.registry", "serve_app.models.options"}, NOT_PURE),
    "serve_app.directory": (SHARED - {"serve_app.config"} | {"serve_app.policy"}, NOT_PURE),
    "serve_app.policy": (PURE | {"serve_app.policy"}, NOT_PURE),
    "serve_app.models": (SHARED | {"serve_app.models"}, {"ray"}),
    "serve_app.engine.scheduler": (SHARED | {"serve_app.engine", "serve_app.policy"}, NOT_PURE),
    "serve_app.engine.sessions": (SHARED | {"serve_app.engine", "serve_app.policy"}, NOT_PURE),
    "serve_app.engine.slots": (SHARED | {"serve_app.engine", "serve_app.policy"}, NOT_PURE),
    "serve_app.engine": (SHARED | {"serve_app.engine", "serve_app.policy", "serve_app.models"}, {"ray"}),
    "serve_app.ingress": (SHARED | {"serve_app.ingress", "serve_app.policy"}, NOT_PURE),
    "serve_app.deployments": (
        SHARED | {f"serve_app.{layer}" for layer in ("deployments", "engine", "ingress", "models", "policy")},
        {"torch"},
    ),
    **{
        module: (SHARED - {"serve_app.config"}, NOT_PURE)
        for module in SHARED - {"serve_app.config", "serve_app.directory"}
    },
    "clients.handle": (SHARED | {"clients", "serve_app.ingress", "serve_app.deployments.transport"}, {"torch"}),
    "clients": (SHARED | {"clients", "serve_app.ingress"}, NOT_PURE),
}
POLICY_PACKAGES = {*sys.stdlib_module_names, "numpy"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_modules() -> dict[str, Path]:
    return {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


MODULES = find_modules()


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(source: str, module: str, is_package: bool = False) -> list[tuple[int, str]]:
    """Line and full name of all that is imported, also within functions and under `if TYPE_CHECKING`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) + is_package - node.level]
                base = ".".join([*parents, base] if base else parents)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    rule = next((name for name in RULES if is_within(module, name)), None)
    if rule is None:
        return [] if is_package and not source.strip() else [f"{module}: no rule for it in {Path(__file__).name}"]
    own, forbidden = RULES[rule]
    wrong = []
    for line, name in imports(source, module, is_package):
        top = name.split(".")[0]
        if top in OWN:
            # `from serve_app.models import registry` is allowed where serve_app.models.registry is
            allowed = any(is_within(name, package) for package in own)
        else:
            allowed = top not in forbidden and (rule != "serve_app.policy" or top in POLICY_PACKAGES)
        if not allowed:
            wrong.append(f"{module}:{line} imports {name}")
    return wrong


def test_something_is_checked() -> None:
    layers = {name.split(".")[1] for name in MODULES if name.count(".") > 1}
    assert layers >= {"engine", "models", "policy"}
    assert {"serve_app.config", "serve_app.engine.scheduler", "serve_app.engine.slots", *PURE} <= MODULES.keys()
    assert "numpy" in {name for _, name in imports(MODULES["serve_app.frame"].read_text(), "serve_app.frame")}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    path = MODULES[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_package_files_are_empty(module: str) -> None:
    """So that importing a pure module stays cheap."""
    tree = ast.parse(MODULES[module].read_text())
    assert [node for node in tree.body if not isinstance(node, ast.Expr)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("serve_app.engine.engine", "import ray"),
        ("serve_app.engine.engine", "def f():\n    from ray import serve"),
        ("serve_app.engine.engine", "from serve_app.ingress.outbox import Outbox"),
        ("serve_app.engine.engine", "from ..deployments import recurrent"),
        ("serve_app.engine.scheduler", "import torch"),
        ("serve_app.engine.slots", "from torch import nn"),
        ("serve_app.engine.sessions", "from serve_app.models.interface import State"),
        ("serve_app.policy.batching", "import torch.nn"),
        ("serve_app.policy.batching", "import yaml"),
        ("serve_app.policy.batching", "from serve_app.config import EngineConfig"),
        ("serve_app.models.rnn", "from serve_app.engine import runner"),
        ("serve_app.models.rnn", "import ray.serve"),
        ("serve_app.ingress.http", "import serve_app.engine.engine"),
        ("serve_app.ingress.http", "from serve_app import models"),
        ("serve_app.ingress.http", "import torch"),
        ("serve_app.errors", "from serve_app.models.options import RnnOptions"),
        ("serve_app.frame", "from .policy import batching"),
        ("serve_app.config", "from serve_app.models.rnn import Rnn"),
        ("serve_app.app", "import ray"),
        ("serve_app.new.thing", "import os"),
        ("clients.session", "from serve_app.engine.engine import Engine"),
        ("clients.session", "import ray"),
        ("clients.handle", "from serve_app.deployments import recurrent"),
    ],
)
def test_a_violation_is_seen(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("serve_app.app", "from serve_app.deployments.recurrent import Recurrent"),
        ("serve_app.config", "from serve_app.models import registry"),
        ("serve_app.deployments.recurrent", "from ray import serve\nfrom serve_app.engine.engine import Engine"),
        ("serve_app.engine.engine", "import torch\nfrom serve_app.models.interface import State"),
        ("serve_app.policy.batching", "import math\nimport numpy as np\nfrom serve_app.spec import ModelSpec"),
        ("clients.handle", "import ray\nfrom serve_app.errors import LockstepError"),
        ("clients.session", "from serve_app.ingress.outbox import Outbox\nfrom .transport import Transport"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_pure_modules_load_neither_torch_nor_ray() -> None:
    pure = ("serve_app.engine.scheduler", "serve_app.engine.sessions", "serve_app.engine.slots")
    layers = ("serve_app.policy", "serve_app.ingress")
    shared = SHARED - {"serve_app.app"}
    names = [name for name in MODULES if name in {*pure, *shared} or any(is_within(name, layer) for layer in layers)]
    assert len(names) > len(layers) + len(pure)
    program = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "from serve_app.config import load_config\nload_config({})\n"
        "print(*sorted({'torch', 'ray'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
