"""What pip installs, and the shape of the tree: packages, layers, linters."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    "swiprctl.protocol": 0,
    "swiprctl.defaults": 0,
    "swiprd": 0,
    "swiprctl.images": 1,
    "swiprctl.session": 1,
    "swiprctl.connection": 2,
    "swiprctl.batch": 3,
    "swiprctl.client": 4,
    "swiprctl.aio": 3,
    "swiprctl": 5,
    "swiprctl.terminal": 1,
    "swiprctl.quick": 2,
    "swiprctl.commands.formats": 2,
    "swiprctl.commands.find": 2,
    "swiprctl.commands.progress": 2,
    "swiprctl.commands.scoring": 5,
    "swiprctl.commands.compute": 6,
    "swiprctl.commands.report": 6,
    "swiprctl.commands.status": 5,
    "swiprctl.commands": 0,
    "swiprctl.commands.run": 7,
    "swiprd.config": 1,
    "swiprd.systemd": 1,
    "swiprd.lock": 1,
    "swiprd.log": 1,
    "swiprd.listen": 2,
    "swiprd.detach": 2,
    "swiprd.files": 1,
    "swiprd.metrics": 1,
    "swiprd.safetensors": 1,
    "swiprd.sandbox": 1,
    "swiprd.bundle": 2,
    "swiprd.geometry": 3,
    "swiprd.userio": 2,
    "swiprd.channel": 3,
    "swiprd.efficientnet_lite": 2,
    "swiprd.architectures": 3,
    "swiprd.decode": 3,
    "swiprd.thumbnail": 1,
    "swiprd.compiled": 2,
    "swiprd.resample": 4,
    "swiprd.preprocess": 5,
    "swiprd.process": 4,
    "swiprd.supervisor": 5,
    "swiprd.connection": 4,
    "swiprd.server": 6,
    "swiprd.daemon": 7,
    "swiprd.network": 4,
    "swiprd.checkpoint": 5,
    "swiprd.engines": 5,
    "swiprd.compiler": 5,
    "swiprd.model": 6,
    "swiprd.fastai": 6,
    "swiprd.recognise": 7,
    "swiprd.worker": 7,
    "swiprd.commands.output": 7,
    "swiprd.commands.compile_": 8,
    "swiprd.commands.import_": 8,
    "swiprd.commands.show": 8,
    "swiprd.commands.verify": 8,
    "swiprd.commands": 9,
    "swiprctl.arguments": 6,
    "swiprctl.__main__": 9,
    "swiprd.__main__": 10,
}
"""Where each module stands; it may import only from floors below its own."""

TORCH_MODULES = {
    f"swiprd.{name}"
    for name in (
        "architectures",
        "checkpoint",
        "commands.compile_",
        "commands.import_",
        "compiled",
        "compiler",
        "efficientnet_lite",
        "engines",
        "fastai",
        "model",
        "network",
        "preprocess",
        "recognise",
        "resample",
        "worker",
    )
}
TORCHVISION_MODULES = {"swiprd.architectures"}
PILLOW_MODULES = {
    "swiprd.decode",
    "swiprd.resample",
    "swiprd.preprocess",
    "swiprd.model",
    "swiprd.thumbnail",
    "swiprd.worker",
    "swiprd.commands.import_",
}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("swiprctl", "swiprd")
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & FLOORS.keys() or {node.module}
    return found


def test_imports_point_down_only() -> None:
    """No module imports one of its own floor or above, and swiprctl never imports swiprd."""
    assert modules().keys() == FLOORS.keys()
    for name, path in modules().items():
        for imported in imports(path) & FLOORS.keys():
            assert FLOORS[imported] < FLOORS[name], f"{name} imports {imported}"
            assert not (name.startswith("swiprctl") and imported.startswith("swiprd"))


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("torch", TORCH_MODULES), ("torchvision", TORCHVISION_MODULES), ("PIL", PILLOW_MODULES)],
)
def test_heavy_packages_are_imported_by_few(package: str, allowed: set[str]) -> None:
    """Torch, torchvision and pillow have their known importers, and those alone."""
    importers = {
        name
        for name, path in modules().items()
        if any(imported.split(".")[0] == package for imported in imports(path))
    }
    assert importers == allowed


def test_the_client_works_without_the_requirements(folder: Path) -> None:
    """Installed with --no-deps, swiprctl runs; the wheel carries the model and the types."""
    tree = folder / "tree"  # a copy, because building writes beside the sources
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "tests", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(tree)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("swipr-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"swiprd/data/animal.safetensors", "swiprctl/py.typed", "swiprd/py.typed"} <= set(names)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "v"], check=True)
    install = ["--python", str(folder / "v"), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    command = [str(folder / "v" / "bin" / "swiprctl"), "--socket", str(folder / "none"), "ping"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert "no daemon at" in done.stderr


@pytest.mark.parametrize(
    "command", [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",)], ids=" ".join
)
def test_linters_and_types_are_content(command: tuple[str, ...]) -> None:
    """The linter, the formatter and the type checker find nothing."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
