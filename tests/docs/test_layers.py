"""The layout rules: nothing imports upward, no cycles, no long files, and the pipeline is what ``ls passes/`` shows."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest

ORDER = (
    "errors", "wording", "kernels", "pde", "terms", "graph_batches", "graph", "algebra", "methods", "options",
    "lowering", "frontends", "passes", "runtime", "optimizer", "api", "tools", "__main__",
)  # fmt: skip


LAYERS = {name: height for height, name in enumerate(ORDER)}

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "gtddp_compile"
LONGEST = 420

# The folders' order is ORDER below. The same among the modules of lowering/: what a layer is, what is decided,
# what is written, and what writes it.
LOWERING = (
    "layers", "segments", "uses", "plan", "costs", "decide", "cooperation", "operations", "instructions", "formulas",
    "builder", "printing", "write", "lowered", "shared", "traffic",
)  # fmt: skip
TOP = max(LAYERS.values()) + 1


@dataclass(frozen=True)
class Import:
    """One import of one of our modules by another."""

    importer: str
    imported: str
    line: int
    for_types: bool


def sources(root: Path) -> dict[str, Path]:
    """Every module of the package as it is installed, with the file it is in."""
    found = {}
    for directory, package in ((root / PACKAGE, PACKAGE), (root / "passes", f"{PACKAGE}.passes")):
        for path in directory.rglob("*.py"):
            parts = path.relative_to(directory).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def statements(node: ast.AST, for_types: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below a node, wherever it stands, and whether ``if TYPE_CHECKING`` guards it."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, for_types
    elif isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
        for guarded in node.body:
            yield from statements(guarded, True)
        for other in node.orelse:
            yield from statements(other, for_types)
    else:
        for child in ast.iter_child_nodes(node):
            yield from statements(child, for_types)


def targets(statement: ast.Import | ast.ImportFrom, importer: str, is_package: bool, modules: set[str]) -> set[str]:
    """The modules of ours that a statement imports: a submodule where a name is one, else the module it comes from."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names if alias.name.split(".")[0] == PACKAGE}
    parts = importer.split(".")
    base = parts[: len(parts) - statement.level + is_package] if statement.level else []
    source = ".".join([*base, *(statement.module or "").split(".")]).rstrip(".")
    if source.split(".")[0] != PACKAGE:
        return set()
    names = {f"{source}.{alias.name}" for alias in statement.names}
    return {name if name in modules else source for name in names}


def imports(root: Path) -> list[Import]:
    """Every import between modules of the package."""
    files = sources(root)
    return [
        Import(module, target, statement.lineno, for_types)
        for module, path in sorted(files.items())
        for statement, for_types in statements(ast.parse(path.read_text(encoding="utf-8")))
        for target in sorted(targets(statement, module, path.name == "__init__.py", set(files)))
    ]


def part(module: str) -> str | None:
    """The entry of LAYERS a module belongs to; none for the package itself."""
    return module.split(".")[1] if "." in module else None


def layer(module: str) -> float:
    """The height of a module."""
    name = part(module)
    if name != "lowering" or module.count(".") == 1:
        return TOP if name is None else LAYERS[name]
    return LAYERS[name] + LOWERING.index(module.split(".")[2]) / len(LOWERING)


def unlisted(root: Path) -> list[str]:
    """Top-level modules and packages that LAYERS does not know."""
    return sorted({name for name in map(part, sources(root)) if name is not None} - set(LAYERS))


def upward(root: Path) -> list[str]:
    """Imports from a higher layer, those for types only included."""
    return [
        f"{i.importer}:{i.line} (layer {layer(i.importer)}) imports {i.imported} (layer {layer(i.imported)})"
        for i in imports(root)
        if layer(i.imported) > layer(i.importer)
    ]


def cycles(root: Path) -> list[list[str]]:
    """Groups of modules that need each other at run time."""
    graph: nx.DiGraph[str] = nx.DiGraph((i.importer, i.imported) for i in imports(root) if not i.for_types)
    loops = [[module] for module in nx.nodes_with_selfloops(graph)]
    return loops + [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def test_every_module_has_a_layer() -> None:
    assert not unlisted(ROOT), f"add {unlisted(ROOT)} to ORDER in test_layers.py, as low as their imports allow"


def test_nothing_imports_upward() -> None:
    assert not upward(ROOT), "\n".join(upward(ROOT))


def test_no_import_cycles() -> None:
    assert not cycles(ROOT), "\n".join(" <-> ".join(group) for group in cycles(ROOT))


def test_the_reference_does_without_the_code_generator() -> None:
    """What the generated program is compared with takes nothing from what writes it."""
    writers = ("lowering.write", "lowering.builder", "lowering.formulas", "passes.p09", "passes.p10", "passes.p11")
    reference = [i for i in imports(ROOT) if i.importer.startswith(f"{PACKAGE}.runtime.dense")]
    assert len(reference) > 15
    assert not [i for i in reference if i.imported.removeprefix(f"{PACKAGE}.").startswith(writers)]


def test_no_long_files() -> None:
    places = PACKAGE, "passes", "tests", "examples", "benchmarks"
    paths = [path for name in places for path in (ROOT / name).rglob("*.py")]
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    long = sorted(f"{path}: {length} lines" for path, length in lengths.items() if length > LONGEST)
    assert not long, f"over {LONGEST} lines, split by what the parts do: {long}"


def test_the_pipeline_is_the_directory() -> None:
    files = sorted(path.stem for path in (ROOT / "passes").glob("p[0-9][0-9]_*.py"))
    passes = importlib.import_module(f"{PACKAGE}.passes")
    assert [function.__module__.rpartition(".")[2] for function in passes.PIPELINE] == files
    assert [f"p{index:02}_{function.__name__}" for index, function in enumerate(passes.PIPELINE, 1)] == files


# The checks above pass on a tree without faults; these show that they see the faults.
FAULTS = [
    ("graph/ops.py", "from gtddp_compile.api import x", "up"),
    ("graph/ops.py", "from gtddp_compile import api", "up"),
    ("graph/ops.py", "import gtddp_compile.api", "up"),
    ("graph/ops.py", "from ..api import x", "up"),
    ("graph/__init__.py", "from ..api import x", "up"),
    ("graph/ops.py", "def f():\n    from gtddp_compile.passes.p01_a import x", "up"),
    ("graph/ops.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gtddp_compile.api import x", "up"),
    ("errors.py", "import gtddp_compile", "up"),
    ("graph/__init__.py", "from .ops import x", "cycle"),
    ("graph/ops.py", "from gtddp_compile.graph.ops import x", "cycle"),
    ("graph/__init__.py", "if TYPE_CHECKING:\n    from .ops import x", "none"),
    ("api.py", "from gtddp_compile.graph.ops import x\nfrom gtddp_compile.passes import p01_a", "none"),
    ("surprise.py", "", "unlisted"),
]


@pytest.mark.parametrize(("file", "text", "fault"), FAULTS)
def test_faults_are_seen(tmp_path: Path, file: str, text: str, fault: str) -> None:
    tree = dict.fromkeys(("gtddp_compile/api.py", "gtddp_compile/errors.py", "gtddp_compile/graph/__init__.py"), "") | {
        "gtddp_compile/__init__.py": "from gtddp_compile.api import x",
        "gtddp_compile/graph/ops.py": "from gtddp_compile.errors import x\nfrom gtddp_compile.graph import y",
        "passes/__init__.py": "from gtddp_compile.passes.p01_a import a",
        "passes/p01_a.py": "from gtddp_compile.graph import x\nimport torch",
    }
    edited = f"{PACKAGE}/{file}"
    tree[edited] = f"{tree.get(edited, '')}\n{text}\n"
    for name, content in tree.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    if fault == "unlisted":
        assert unlisted(tmp_path) == ["surprise"]
        return
    assert not unlisted(tmp_path)
    assert bool(upward(tmp_path)) == (fault == "up"), upward(tmp_path)
    if fault != "up":
        assert bool(cycles(tmp_path)) == (fault == "cycle"), cycles(tmp_path)


def test_the_architecture_lists_the_layers() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (`.*?) \|", text, re.MULTILINE)
    assert {name: int(layer) for layer, names in rows for name in re.findall(r"`(\w+)`", names)} == LAYERS


def test_a_first_step_imports_nothing_that_it_has_no_use_for() -> None:
    """In a new process: torch.compile's machinery and what only pictures and tables need take longer than compiling."""
    script = """
import sys, torch
from gtddp_compile import compile_optimizer
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
compile_optimizer(model, x, loss=torch.nn.CrossEntropyLoss()).step(x, y)
print({"torch._dynamo", "rich"} & {*sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
