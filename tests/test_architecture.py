"""The house as drawn: who may import whom, written once as data and checked over the source of every file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("helix", "orchestration", "dashboards", "cluster")

#: Who may import which parts of the project. A part is a module or a package with all that is in it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "helix.addresses": (),
    "helix.registry": (),
    "helix.protocol": (),
    "helix.published": (),
    "helix.statistics": (),
    "helix.storage": ("helix.addresses", "helix.registry"),
    "helix.storage_s3": ("helix.addresses", "helix.storage", "helix.registry"),
    "helix.spec": ("helix.registry", "helix.protocol", "helix.storage"),
    "helix.data": ("helix.data", "helix.spec", "helix.registry", "helix.protocol", "helix.storage"),
    "helix.models": ("helix.models", "helix.spec", "helix.registry", "helix.protocol", "helix.out_of_memory"),
    "helix.training": ("helix",),
    "helix.doctor": ("helix.registry",),
    "helix.checks": ("helix.doctor", "helix.errors", "helix.models", "helix.registry", "helix.storage"),
    "helix.process": (),
    "helix.determinism": (),
    "helix.errors": (),
    "helix.out_of_memory": (),
    "helix.bench": ("helix.errors", "helix.registry"),
    "helix.loopback": (),
    "helix.peers": (),
    "helix.loader_peers": ("helix.peers",),
    "helix.training_peers": ("helix.models", "helix.peers"),
    "helix.gpu": (
        *("helix.bench", "helix.data", "helix.gpu", "helix.models", "helix.peers", "helix.process", "helix.protocol"),
        *(
            "helix.out_of_memory",
            "helix.published",
            "helix.spec",
            "helix.storage",
            "helix.training",
            "helix.training_peers",
        ),
    ),
    "helix.benches": (
        *(
            "helix.bench",
            "helix.models",
            "helix.peers",
            "helix.process",
            "helix.protocol",
            "helix.registry",
            "helix.spec",
        ),
        *("helix.training", "helix.data", "helix.gpu", "helix.loader_peers", "helix.loopback", "helix.storage"),
    ),
    "dashboards": ("dashboards", "helix", "orchestration.ledger"),
    "orchestration": ("orchestration", "dashboards", "helix"),
    "cluster.notice_daemon": (),
    "cluster.fetch_secret": (),
    "cluster.images.requirements": (),
}

#: Libraries that only these modules may import.
ONLY_IN = {
    "ray": {
        f"orchestration.{name}"
        for name in ("sweep", "guard", "worker", "preprocessing", "schedule", "connection", "bare", "scale", "metrics")
    },
    "mlflow": {
        f"orchestration.{name}" for name in ("tracking", "tracking_place", "from_mlflow", "model_store", "pyfunc_model")
    },
    "numba": {"helix.models.scan_numba"},
    "mamba_ssm": {"helix.models.scan_mamba_ssm"},
    "triton": {"helix.models.scan_triton", "helix.models.scan_triton_driver"},
    "boto3": {"helix.storage_s3", "helix.benches.data", "cluster.fetch_secret"},
}

#: Modules that are imported on first use, by importlib, because their library takes long to import and may be missing.
MAY_BE_MISSING = {
    "helix.models.scan_numba",
    "helix.models.scan_mamba_ssm",
    "helix.models.scan_triton",
    "helix.models.scan_triton_driver",
    "litdata",
    "litdata.streaming.writer",
    "mambapy.mamba",
    "pynvml",
    "torchaudio.transforms",
    "transformers.models.mamba.modeling_mamba",
    "webdataset",
}

#: Modules that plan and read: what they import, directly or not, holds no torch (a laptop answers at once).
WITHOUT_TORCH = (
    *(
        f"helix.{name}"
        for name in ("addresses", "spec", "registry", "protocol", "published", "statistics", "storage", "storage_s3")
    ),
    "helix.errors",
    "helix.out_of_memory",
    *(f"orchestration.{name}" for name in ("grid", "recovery", "ledger", "asked", "status", "money")),
    "orchestration.grids",
)

#: Words that say nothing about what a thing does.
EMPTY_WORDS = ("manager", "helper", "utils", "datadict")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def late_imports(tree: ast.AST) -> set[str | None]:
    """The modules that are imported by a call, None where the name is not written there."""
    return {
        node.args[0].value if isinstance(node.args[0], ast.Constant) else None
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
    }


def imports(name: str) -> set[str]:
    """What a module imports, in full: modules of the project as such, everything else by its dotted name."""
    found = {late for late in late_imports(TREES[name]) if late}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in SOURCES else str(node.module))
    return found


IMPORTS = {name: imports(name) for name in SOURCES}


def inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def reached(name: str) -> set[str]:
    """Everything that importing a module imports: packages on the way, and what those import."""
    seen: set[str] = set()
    open_ends = [name]
    while open_ends:
        current = open_ends.pop()
        if current in seen:
            continue
        seen.add(current)
        parents = [current[: dot.start()] for dot in re.finditer(r"\.", current)]
        open_ends += [*parents, *IMPORTS.get(current, ())]
    return seen


def the_part_of(name: str) -> str:
    """The row of MAY_IMPORT that rules a module."""
    rows = [part for part in MAY_IMPORT if inside(name, part)]
    return max(rows, key=len) if rows else ""


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_only_from_where_it_may(name: str):
    if SOURCES[name].name == "__init__.py":
        assert IMPORTS[name] == set(), "a package says what it is and imports nothing"
        return
    part = the_part_of(name)
    assert part, f"{name} stands in no row of MAY_IMPORT: where does it belong?"
    ours = {other for other in IMPORTS[name] if other.partition(".")[0] in PACKAGES}
    strangers = {other for other in ours if not any(inside(other, allowed) for allowed in MAY_IMPORT[part])}
    assert not strangers, f"{part} may import {', '.join(MAY_IMPORT[part]) or 'nothing of the project'}"


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_every_row_of_the_rules_is_about_something(part: str):
    assert part in SOURCES


@pytest.mark.parametrize(("part", "other"), [("helix.data", "helix.models"), ("helix.models", "helix.data")])
def test_data_and_models_do_not_meet_below_training(part: str, other: str):
    meeting = {name for name in SOURCES if inside(name, part) if any(inside(found, other) for found in reached(name))}
    assert meeting == set()


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_of_machinery_stands_in_its_own_files_only(library: str):
    users = {name for name, found in IMPORTS.items() if any(inside(other, library) for other in found)}
    assert users <= ONLY_IN[library]
    assert users, f"nobody uses {library}"


@pytest.mark.parametrize("name", [name for name in SOURCES if inside(name, "helix")])
def test_the_science_reaches_no_machinery(name: str):
    roots = {other.partition(".")[0] for other in reached(name)}
    assert not roots & {"ray", "mlflow", "orchestration", "dashboards"}


@pytest.mark.parametrize("name", [name for name in SOURCES if any(inside(name, part) for part in WITHOUT_TORCH)])
def test_planning_reaches_no_torch_and_no_ray(name: str):
    assert not {other.partition(".")[0] for other in reached(name)} & {"torch", "ray", "mlflow"}


@pytest.mark.parametrize("name", [name for name in SOURCES if inside(name, "dashboards")])
def test_what_people_look_at_is_drawn_without_torch_ray_and_mlflow(name: str):
    assert not {other.partition(".")[0] for other in reached(name)} & {"torch", "ray", "mlflow"}


def test_the_daemon_beside_ray_needs_python_alone():
    assert {other.partition(".")[0] for other in IMPORTS["cluster.notice_daemon"]} <= sys.stdlib_module_names


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("name", SOURCES)
def test_no_import_hides_in_a_function(name: str):
    hidden = [
        f"{SOURCES[name].relative_to(ROOT)}:{node.lineno}"
        for function in functions(TREES[name])
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert hidden == []


def test_only_the_registry_imports_by_a_name_that_it_puts_together():
    assert {name for name, tree in TREES.items() if None in late_imports(tree)} == {"helix.registry"}


@pytest.mark.parametrize("name", SOURCES)
def test_a_late_import_is_one_of_those_that_have_a_reason(name: str):
    assert late_imports(TREES[name]) - {None} <= MAY_BE_MISSING


def test_no_two_files_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(IMPORTS[name] & SOURCES.keys()):
                visit(other, (*way, name))
            done.add(name)

    for name in SOURCES:
        visit(name, ())


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_opens_with_a_sentence_that_says_what_it_is(name: str):
    said = ast.get_docstring(TREES[name])
    assert said, f"{SOURCES[name].relative_to(ROOT)} has no docstring"
    first = said.split("\n\n")[0].split("\n    ")[0].strip()
    assert re.search(r"[.?:)]$", first), first


def test_no_module_and_no_class_has_an_empty_name():
    names = {part for name in SOURCES for part in name.split(".")}
    names |= {node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    empty = {name for name in names for word in EMPTY_WORDS if word in name.lower().replace("_", "")}
    assert empty == set()


# What stands in files


def written() -> dict[str, str]:
    """Every text file that git knows or would take: its path and its contents."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    texts = {}
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():
            try:
                texts[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return texts


def lines_with(pattern: str) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in written().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(pattern, line)
    ]


def test_no_file_holds_a_path_of_somebodys_machine():
    assert lines_with(r"(?<![\w.}\-])/(?:home|root|Users|work)/") == []
