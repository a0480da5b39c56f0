"""The documents name what is there."""

import re
from pathlib import Path

from bench import performance
from bench.readme import rendered

ROOT = Path(__file__).parents[2]


def test_structure_names_every_file_and_no_other() -> None:
    text = (ROOT / "docs/structure.md").read_text()
    named = set(re.findall(r"`((?:serve_app|clients|cluster)/[\w/]+\.py)`", text))
    there = {
        str(path.relative_to(ROOT))
        for package in ("serve_app", "clients", "cluster")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == there


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_readme_commands_are_there() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = re.findall(r"^make (\w+)", readme, re.M)
    assert targets
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    for config in re.findall(r"configs/\w+\.yaml", readme):
        assert (ROOT / config).exists()


def test_metrics_are_those_of_operations() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    files = ("metrics.py", "directory_metrics.py")
    source = "".join((ROOT / "serve_app/deployments" / file).read_text() for file in files)
    names = set(re.findall(r'"lockstep_(\w+)"', source)) | set(re.findall(r'^\s+"(\w+)": "', source, re.M))
    assert len(names) > 15
    assert [name for name in names if f"`{name}`" not in text] == []


def test_readme_has_the_figures_of_the_files() -> None:
    text = (ROOT / "README.md").read_text()
    assert "[vs_naive]" in text
    assert rendered(text) == text, "make bench, or python -m bench.readme, writes it anew"


def test_performance_has_the_figures_of_the_files() -> None:
    assert performance.rendered() == performance.DOCUMENT.read_text(), "python -m bench.performance writes it anew"
