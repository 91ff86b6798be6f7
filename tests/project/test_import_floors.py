"""The floors of the package: imports go to lower floors or to siblings, and heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedeq_edge

PACKAGE = Path(fedeq_edge.__file__).parent
FLOORS = {
    0: ("__init__", "atomic", "errors", "finite", "kit", "structs"),
    1: ("deq", "consensus", "masking", "wire", "data"),
    2: ("training", "hardware", "protocol"),
    3: ("transport", "onnx", "storage", "modelfile", "modelform", "orders", "provision", "health", "backends"),
    4: (
        "settings",
        "logs",
        "serving",
        "agent",
        "trainer",
        "updater",
        "gateway",
        "audit",
        "chaos",
        "report",
        "demo",
        "flower",
        "simulation",
    ),
    5: ("cli", "__main__"),
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
TORCH = {"deq", "backends", "training/torch_step.py", "onnx/verify.py", "onnx/cross.py", "simulation/explicit.py"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_kit" not in path.parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_parts(path: Path) -> set[str]:
    """Parts of fedeq_edge that a module imports."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("fedeq_edge.")}
    return {name for name in names if name in FLOOR_OF}


def test_every_module_stands_on_a_floor() -> None:
    assert {part_of(path) for path in modules()} == set(FLOOR_OF)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_lower_floors_or_siblings(path: Path) -> None:
    here = FLOOR_OF[part_of(path)]
    above = {part for part in own_parts(path) if FLOOR_OF[part] > here}
    assert not above


@pytest.mark.parametrize("part", ["deq", "consensus"])
def test_the_mathematics_knows_nothing_of_messages(part: str) -> None:
    used = set().union(*(own_parts(path) for path in modules() if part_of(path) == part))
    assert used <= {"deq", "consensus", "errors"}


def users_of(library: str) -> set[str]:
    return {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }


def test_one_module_imports_the_mqtt_client() -> None:
    assert users_of("paho") == {"transport/mqtt.py"}


def test_one_folder_imports_onnx_and_one_module_onnxruntime() -> None:
    assert {name.split("/")[0] for name in users_of("onnx")} == {"onnx"}
    assert users_of("onnxruntime") == {"onnx/session.py"}


def test_one_folder_imports_flower() -> None:
    assert {name.split("/")[0] for name in users_of("flwr")} == {"flower"}


def test_torch_is_imported_by_the_model_the_local_step_and_the_check_of_exports_alone() -> None:
    users = users_of("torch")
    assert users
    assert {
        name for name in users if name not in TORCH and name.split("/")[0].removesuffix(".py") not in TORCH
    } == set()


@pytest.mark.parametrize(
    "module", ["agent", "trainer", "gateway", "cli", "protocol.aggregator", "settings", "modelfile"]
)
def test_programs_of_gateways_and_idle_agents_load_no_torch_no_onnxruntime_and_no_cryptography(module: str) -> None:
    heavy = {"torch", "onnxruntime", "onnx", "sklearn", "cryptography", "flwr"}
    code = f"import sys, fedeq_edge.{module}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_enrolling_loads_no_numpy() -> None:
    code = "import sys, fedeq_edge.provision.enrol; print({'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
