"""The documents a new user reads are true: code runs, pictures are what the scripts draw, tables match the source."""

import contextlib
import html
import importlib.util
import inspect
import io
import json
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gtddp_compile
from gtddp_compile import compile_optimizer, passes
from gtddp_compile.methods.curvature import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ("tutorial", "own-layer", "own-loss", "micro-batches")
PAGES = (
    "usage",
    "training",
    "architecture",
    "physics",
    "index",
    "install",
    "supported",
    "several-processes",
    *NOTEBOOKS,
)
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{page}.md" for page in PAGES)]
PATH = r"`((?:tests|passes|gtddp_compile|examples|docs|benchmarks)/[\w/]+(?:\.\w+)?)`"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # inspect looks for it there
    spec.loader.exec_module(module)
    return module


def test_the_readmes_code_runs_and_trains() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    model, x, y = names["model"], names["x"], names["y"]
    assert isinstance(model, torch.nn.Module) and isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    assert torch.nn.functional.cross_entropy(model(x), y) < 0.9 * float(names["loss"].new_tensor(3.0).log())  # type: ignore[attr-defined]
    for text in ("Control graph of Sequential", "stage 1: 2", "def step("):
        assert text in printed.getvalue()


def hidden(name: str) -> ModuleType:
    """A script of .ci/, with or without a suffix."""
    path = str(ROOT / ".ci" / name)
    loader = SourceFileLoader(f"ci_{Path(name).stem}", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_shows_what_came_of_it(name: str) -> None:
    notebook = hidden("notebook.py")
    assert set(notebook.PAGES) == {f"{page}.md" for page in NOTEBOOKS}
    found = notebook.executed(f"{name}.md")
    shown, stored = notebook.as_page(found), json.loads(notebook.as_notebook(found))
    source = read(f"docs/{name}.md")
    assert re.sub(r"\n\n(``` \{ \.text.*?^```|<img [^>]*>)$", "", shown, flags=re.DOTALL | re.MULTILINE) == source
    if name == "tutorial":
        drawn = [output["data"]["image/svg+xml"] for cell in stored["cells"] for output in cell.get("outputs", ())
                 if "data" in output]  # fmt: skip
        assert len(drawn) == 2 and "second" in drawn[0] and "nothing tuned" in drawn[1]
        assert "Q_ux = " in shown and "singular values [" in shown and "w = solve(" in shown and "held out" in shown


def test_names_of_files_outside_of_the_pages_are_links_on_the_site() -> None:
    repository = hidden("repository.py")
    page = repository.examples()
    assert "examples/checkpoints.py" in repository.SCRIPTS and "as they lie" in page.lower()
    for script in repository.SCRIPTS:
        link = f"[`{script}`](examples.md#{repository.anchor(script)})"
        assert repository.linked(f"See `{script}`.") == f"See {link}." and f"{{ #{repository.anchor(script)} }}" in page
    kept = "```python\n`CHANGELOG.md`\n```\n"
    assert repository.linked(f"[a](../CHANGELOG.md)\n{kept}") == f"[a](changes.md)\n{kept}"


@pytest.mark.parametrize("name", ["docs/physics.md", "docs/index.md", "docs/training.md"])
def test_the_code_of_a_page_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a page saves something
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", read(name), re.DOTALL):
        exec(compile(code, name, "exec"), names)
    assert isinstance(loss := names["loss"], torch.Tensor) and loss.isfinite()


def test_the_picture_is_what_the_script_draws() -> None:
    assert script("control_graph").graph().to_svg() == read("docs/control_graph.svg")


def test_the_picture_of_a_program_is_what_the_compiler_prints() -> None:
    picture = script("program_picture")
    drawn, printed = picture.picture(), str(picture.program())
    assert drawn == read("docs/program.svg")
    assert html.escape(picture.program().derivation(picture.STAGE).splitlines()[-1].split("   (")[0].strip()) in drawn
    assert all(html.escape(line) in drawn for line in printed.splitlines() if line.startswith("joint, "))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!http|#)([^)#]+)", read(name))
    found = {(ROOT / name).parent.joinpath(link).resolve() for link in links}
    missing = {str(path.relative_to(ROOT)) for path in found if not path.exists()}
    assert not missing


def test_paths_that_are_named_exist() -> None:
    for name in DOCUMENTS:
        for path in re.findall(PATH, read(name)):
            assert (ROOT / path).exists() or "NN_" in path or "KIND" in path, f"{name} names {path}"


def test_the_architecture_lists_the_passes() -> None:
    rows = re.findall(r"^\| `(p\d\d_\w+)` \|", read("docs/architecture.md"), re.MULTILINE)
    assert rows == [function.__module__.rpartition(".")[2] for function in passes.PIPELINE]


def test_the_options_in_the_usage_exist() -> None:
    """Options of the compiler itself; those of a curvature are torch's."""
    table = re.findall(r"^\| (`.*?) \|", read("docs/usage.md"), re.MULTILINE)
    named = set(re.findall(r"`(\w+)", " ".join(table))) - {"lr"}
    assert named and named <= set(inspect.signature(compile_optimizer).parameters)


def test_every_test_named_there_exists() -> None:
    text = (ROOT / "docs" / "derivations.md").read_text(encoding="utf-8")
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"`(?:tests/(?:\w+/)?)?(test_\w+\.py)", text))
    assert named and named <= set(sources)
    functions = set(re.findall(r"`(?:test_\w+\.py::)?(test_\w+)`", text))
    defined = {name for source in sources.values() for name in re.findall(r"^def (test_\w+)", source, re.M)}
    assert len(functions) > 10 and functions <= defined, functions - defined


def test_the_page_on_installing_says_what_was_tried() -> None:
    release = hidden("release")
    tried, project = json.loads(release.DATA.read_text(encoding="utf-8")), read("pyproject.toml")
    assert release.table() in read("docs/install.md"), "run .ci/release --page"
    needed = project.partition("dependencies")[2].partition("]")[0]
    bounds = re.findall(r'^  "([\w-]+)>=([\w.]+)",$', needed, re.MULTILINE)
    assert [f"{name}=={version}" for name, version in bounds] == tried["lowest"], "run .ci/release"
    (version,) = re.findall(r'^version = "(.*)"', project, re.MULTILINE)
    assert read("CHANGELOG.md").split("\n## ")[1].splitlines()[0] == version


def test_the_api_page_has_every_public_name() -> None:
    named = set(re.findall(r"^::: gtddp_compile\.(\w+)$", read("docs/api.md"), re.MULTILINE))
    assert set(gtddp_compile.__all__) == named - {"pde"}
    assert {method.__name__ for method in REGISTRY.values()} <= named
