"""Which part of the package may know which: imports go one way, and the core knows no family."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "alignprop_jax"
PROGRAMS = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "config", "errors"}
# Each may import those above it.
ORDER = (
    {"process"},
    {"errors"},
    {"inputs"},
    {"nn"},
    {"processes"},
    {"core"},
    {"loading"},
    {"lora", "prompts"},
    {"generators", "rewards"},
    {"algorithms"},
    {"devices"},
    {"config"},
    {"records"},
    {"runs"},
    {"evaluation"},
    {"planning", "trials", "timing"},
    {"pages"},
    PROGRAMS,
)
NETWORKS = ("generators", "nn.clip", "nn.owlvit", "nn.vae", "nn.blocks")
WITHOUT_FAMILIES = ("core", "processes", "algorithms", "records", "devices")
NAMES_OF_A_FAMILY = re.compile(r"\b(unet|vae|text_encoder)\b", re.IGNORECASE)


def imports():
    """Every import of the package within itself: file, importing and imported module."""
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            head, _, rest = node.module.partition(".")
            if head != "alignprop_jax":
                continue
            for alias in node.names:
                whole = f"{rest}.{alias.name}" if rest else alias.name
                is_module = (ROOT / whole.replace(".", "/")).with_suffix(".py").is_file()
                yield module, whole if is_module else rest


def rank(module):
    return next(rank for rank, parts in enumerate(ORDER) if module.partition(".")[0] in parts)


def test_every_part_has_its_place():
    parts = {path.name for path in ROOT.iterdir() if list(path.glob("*.py"))} | PROGRAMS
    assert parts | {"config", "errors"} == set.union(*ORDER)


def test_imports_go_one_way():
    against = [
        (module, imported)
        for module, imported in imports()
        if module != "__init__"
        and module.partition(".")[0] != imported.partition(".")[0]
        and rank(module) <= rank(imported)
    ]
    assert against == []


@pytest.mark.parametrize("part", WITHOUT_FAMILIES)
def test_the_core_imports_no_network(part):
    found = [
        (module, imported)
        for module, imported in imports()
        if module.startswith(f"{part}.") and imported.startswith(NETWORKS)
    ]
    assert found == []


@pytest.mark.parametrize("part", [part for part in WITHOUT_FAMILIES if part != "records"])
def test_the_core_names_no_part_of_a_family(part):
    found = [
        (str(path.relative_to(ROOT)), number, line.strip())
        for path in sorted((ROOT / part).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if NAMES_OF_A_FAMILY.search(line)
    ]
    assert found == []
