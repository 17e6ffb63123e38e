# SPDX-License-Identifier: Apache-2.0
"""The budgets of the house: sizes, the direction of imports, what may be depended on and named."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxllm"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
}
# Imports run downward, from a later line to the same or an earlier one; a package's own `__init__`
# may import what is in it.
FLOORS = (
    ("errors", "libraries"),
    ("paths",),
    ("untrusted", "lock"),
    ("config",),
    ("best", "run_folder"),
    (
        "compilation",
        "rendezvous",
        "dist",
        "watch",
        "signals",
        "mesh",
        "files",
        "topologies",
        "hlo",
        "hlo_memory",
    ),
    ("collectives",),
    ("ops",),
    ("model",),
    ("peft", "tokenizer", "data", "mxfp4", "fp8", "hf_config", "passthrough", "monitor", "report"),
    ("arguments",),
    ("objectives", "optim"),
    ("hf", "hub", "checkpoint", "step", "identity", "finite"),
    ("run", "sampling", "chat", "evaluate", "reference", "rl", "tasks"),
    ("program", "rows"),
    ("card",),
    ("evaluations", "pretokenize", "saving", "timetable"),
    ("preview",),
    (
        "training",
        "compare",
        "export_check",
        "exports",
        "launch",
        "plan",
        "serve",
        "verify_resume",
        "doctor",
        "parity",
    ),
    ("plan_search",),
    ("cli", "__main__"),
)
FILE_LINES, FUNCTION_LINES, TRAIN_LINES, PACKAGE_LINES = 500, 80, 120, 40_690
# Modules that are imported under another name than the one they are installed by.
DISTRIBUTION = {
    "annotated_types": "annotated-types",
    "orbax": "orbax-checkpoint",
    "yaml": "pyyaml",
}
# Imported by the function that needs it alone, when a user asks for it.
EXTRAS = {"wandb", "tensorboardX", "swanlab", "trackio", "mlflow", "tensorflow_datasets"}
EXTRAS |= {"datasketch"}  # of `jaxllm preview`
EXTRAS |= {"starlette", "uvicorn"}  # of `jaxllm serve`
EXTRAS |= {"lm_eval", "evaluate"}  # of `jaxllm eval --tasks`
EXTRAS |= {"torch", "trl", "peft"}  # of `jaxllm parity`


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def tracked(*patterns: str) -> list[Path]:
    """Files under version control, and not what a run left beside them."""
    command = ["git", "ls-files", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Dotted names a module imports; with `lazy` also those inside functions."""
    module = tree(path)
    found: set[str] = set()
    for node in ast.walk(module) if lazy else module.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in MODULES} or {node.module}
    return found


def floor(name: str) -> int:
    part = name.split(".")[1]
    place = [i for i, names in enumerate(FLOORS) if part in names]
    assert place, f"{name} stands on no floor; add it to FLOORS"
    return place[0]


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES.keys())
def test_files_and_functions_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            is_train = path.name == "training.py" and node.name == "train"
            limit = TRAIN_LINES if is_train else FUNCTION_LINES
            lines = node.end_lineno - node.lineno + 1
            assert lines <= limit, f"{node.name} has {lines} lines"


def test_imports_run_downward():
    for name, path in MODULES.items():
        if name == "jaxllm":
            continue
        for other in imports(path):
            if other.startswith("jaxllm."):
                assert floor(other) <= floor(name), f"{name} imports {other}"


def test_the_model_knows_nothing_of_data_training_or_files():
    for name, path in MODULES.items():
        if name.startswith("jaxllm.model"):
            for other in imports(path):
                assert not re.match(r"jaxllm\.(data|hf|train|optim|objectives)\b", other), name


def test_no_imports_make_a_circle_not_even_those_inside_functions():
    graph = {
        name: {other for other in imports(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
        if name not in ("jaxllm", "jaxllm.cli", "jaxllm.__main__")
    }
    done = {"jaxllm"}
    while ready := {n for n, needs in graph.items() if n not in done and needs <= done}:
        done |= ready
    assert done >= set(graph), f"in a circle: {sorted(set(graph) - done)}"


def test_the_package_stays_small():
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES.values())
    assert lines <= PACKAGE_LINES


def code(path: Path) -> str:
    """The source without docstrings and comments."""
    return ast.unparse(tree(path))


def test_only_ops_and_reports_ask_for_the_platform():
    for name, path in MODULES.items():
        text = code(path)
        assert "default_backend" not in text, name
        if name.split(".")[1:2] not in (["ops"], ["mesh"], ["collectives"]) and name != "jaxllm":
            assert not re.search(r"\bplatform\(", text), name


def test_only_dist_asks_for_the_process():
    for name, path in MODULES.items():
        if name != "jaxllm.dist":
            assert not re.search(r"process_(index|count)|device_get\(", code(path)), name


def test_only_the_tables_compare_the_name_of_an_objective():
    for name, path in MODULES.items():
        if name not in ("jaxllm.config.verbs", "jaxllm.objectives.table"):
            assert not re.search(r"\.objective (==|!=|in|not in) [\"'(]", code(path)), name


def test_the_table_of_sweeps_names_tests_that_exist():
    text = (ROOT / "tests" / "conftest.py").read_text()
    swept = set(re.findall(r'^    "(test_\w+)":', text, re.MULTILINE))
    defined = {
        name
        for path in tracked("tests/*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert swept and swept <= defined, f"renamed or gone: {sorted(swept - defined)}"


def test_every_source_file_names_its_licence():
    for path in tracked("*.py"):
        first = path.read_text(encoding="utf-8").splitlines()[:2]
        assert "# SPDX-License-Identifier: Apache-2.0" in first, path


def test_no_file_names_a_machine_or_a_registry():
    # Written in pieces, so that this file does not name what it forbids.
    places = ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/op" + "t/", "fi" + "le://")
    registries = ("pypi" + ".org", "python" + "hosted", "registry" + ".npmjs", "index" + "-url")
    forbidden = re.compile("|".join(map(re.escape, places + registries)))
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            assert not forbidden.search(line), f"{path}:{number}: {line.strip()}"


def requirements(extra: str | None = None) -> dict[str, str]:
    """{name in lower case: requirement} of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {re.split(r"[^\w.-]", line)[0].lower(): line for line in lines}


def test_dependencies_are_what_is_imported():
    ours = {"jaxllm", *sys.stdlib_module_names}
    found = {n.split(".")[0] for p in MODULES.values() for n in imports(p)} - ours - EXTRAS
    assert {DISTRIBUTION.get(name, name).lower() for name in found} == set(requirements())


def test_the_core_brings_neither_torch_nor_tensorflow():
    """Follows the installed packages' own requirements, as pip does, without their extras."""
    from packaging.requirements import Requirement

    seen: set[str] = set()
    waiting = [Requirement(line) for line in requirements().values()]
    while waiting:
        requirement = waiting.pop()
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        for extra in ("", *requirement.extras):
            if f"{key}[{extra}]" in seen:
                continue
            seen.add(f"{key}[{extra}]")
            for line in metadata.requires(requirement.name) or ():
                inner = Requirement(line)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    waiting.append(inner)
    names = {name.split("[")[0] for name in seen}
    assert {"jax", "numpy", "transformers"} <= names
    assert not names & {"torch", "tensorflow", "tensorflow-cpu", "keras", "torchvision"}


def test_pins_give_versions_without_addresses():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for line in lines:
        assert re.fullmatch(r'[\w.-]+==[\w.]+ ; python_version < "3\.12"', line), line
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    direct = {name.replace("_", "-") for name in requirements()}
    assert direct <= pinned, f"not pinned: {sorted(direct - pinned)}"
    assert requirements("test")["torch"].split("==")[1] in "\n".join(lines)
