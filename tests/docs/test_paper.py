"""The paper's results: one tiny run of each part, loaders on small files, the page from the rows, and its oracles."""

import gzip
import pickle
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from gtddp_compile import compile_optimizer
from gtddp_compile.runtime.dense.backend import Sweeps
from gtddp_compile.runtime.dense.jacobians import Trajectory

ROOT = Path(__file__).parents[2]
PARTS = ("table2", "fig1", "fig4", "fig6", "fig7", "fig8", "feedback")
TINY = {"steps": "4", "width": "1", "trained": "2", "side": "closed", "batch": "1"}


@pytest.fixture(scope="module", autouse=True)
def _paper():
    folders = [str(ROOT / "examples" / "paper"), str(ROOT / "benchmarks")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


@pytest.mark.parametrize("name", PARTS)
def test_every_part_runs(name: str) -> None:
    import shared

    part, shared.SETTINGS.datasets = import_module(name), ("digits",)
    store = shared.Store(ROOT / "examples/paper/results" / f"{part.RESULTS}.csv")
    *_, job = part.jobs(store.rows)
    found = part.work({**job, **{key: value for key, value in TINY.items() if key in job}})
    assert {*job, *found, "measured", "machine"} == set(store.rows[0])


def test_the_page_is_written_from_the_rows(tmp_path: Path) -> None:
    import run

    stores = {name: run.Store(run.RESULTS / f"{name}.csv") for name in {import_module(p).RESULTS for p in PARTS}}
    run.write(stores, tmp_path / "paper.md")
    told = "run examples/paper/run.py --budget 0"
    assert (tmp_path / "paper.md").read_text(encoding="utf-8") == (run.DOCS / "paper.md").read_text(encoding="utf-8"), (
        told
    )
    assert {path.name for path in tmp_path.glob("*.svg")} == {path.name for path in run.DOCS.glob("paper-*.svg")}


def test_rows_are_kept_and_not_measured_again(tmp_path: Path) -> None:
    from shared import Store

    keys = [{"form": "a", "seed": str(seed)} for seed in range(3)]
    Store(tmp_path / "rows.csv").keep({**keys[1], "loss": "0.5"})
    again = Store(tmp_path / "rows.csv")
    again.keep({**keys[0], "loss": "0.1"})
    assert Store(tmp_path / "rows.csv").missing(keys) == keys[2:]


def idx(values: np.ndarray) -> bytes:
    """As the files of MNIST have it: a head, then bytes."""
    return bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def small_files(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Three images of every set, in torchvision's layout; what the first of the training images must be."""
    drawn, labels = np.random.default_rng(0), np.array([1, 0, 9], np.uint8)
    grey, colour = drawn.integers(0, 256, (3, 28, 28), np.uint8), drawn.integers(0, 256, (3, 3, 32, 32), np.uint8)
    for folder in ("MNIST/raw", "cifar-10-batches-py", "cifar-100-python"):
        (root / folder).mkdir(parents=True)
    for part, packed in (("train", False), ("t10k", True)):
        for kind, values in (("images-idx3", grey), ("labels-idx1", labels)):
            path, text = root / "MNIST/raw" / f"{part}-{kind}-ubyte", idx(values)
            (path.with_name(f"{path.name}.gz") if packed else path).write_bytes(gzip.compress(text) if packed else text)
        name = "train" if part == "train" else "test"
        savemat(
            root / f"{name}_32x32.mat", {"X": colour.transpose(2, 3, 1, 0), "y": np.array([[1], [10], [9]], np.uint8)}
        )
        row = {b"data": colour.reshape(3, -1), b"fine_labels": labels.tolist()}
        (root / "cifar-100-python" / name).write_bytes(pickle.dumps(row))
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        row = {b"data": colour.reshape(3, -1), b"labels": labels.tolist()}
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(row))
    return {"mnist": (grey[:1], labels), **dict.fromkeys(("svhn", "cifar10", "cifar100"), (colour[0], labels))}


def test_loaders_read_torchvisions_layout(tmp_path: Path) -> None:
    from shared import DATA, load

    for name, (image, labels) in small_files(tmp_path).items():
        (x, y), (valid, _) = load(name, tmp_path)
        count = 15 if name == "cifar10" else 3
        assert x.shape == (count, *DATA[name].shape) and len(valid) == 3 and y[:3].tolist() == labels.tolist()
        np.testing.assert_allclose(x[0].numpy() * 255, image, rtol=1e-6)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    from run import main
    from shared import MissingData, load
    from typer import Typer
    from typer.testing import CliRunner

    with pytest.raises(MissingData, match=r"--data-root .* train_32x32.mat"):
        load("svhn", None)
    app = Typer()
    app.command()(main)
    said = CliRunner().invoke(app, ["table2", "--datasets", "cifar10", "--data-root", str(tmp_path)], env={
        "MALLOC_TRIM_THRESHOLD_": "0"})  # fmt: skip
    assert said.exit_code == 1 and "cifar-10-batches-py/test_batch" in said.stderr and "put there" in said.stderr


@pytest.mark.parametrize("norm", [False, True])
def test_blocks_of_the_value_hessian_are_the_dense_backend_s(norm: bool) -> None:
    from fig4 import block_norms
    from shared import LOSS, PaperNet

    torch.manual_seed(0)
    model, x, y = PaperNet((1, 4, 4), 1, 2, norm=norm).double(), torch.randn(3, 1, 4, 4).double(), torch.arange(3)
    how = {"mixing": "exact"} if norm else {}
    optimizer = compile_optimizer(model, x, loss=LOSS, curvature="sgd", lr=0.3, backend="dense", **how)
    program = optimizer.program
    params, buffers, _ = optimizer._working_copy(program)
    m = optimizer._base_method(program, params, dict(params))
    m.samples = 3
    sweeps = Sweeps(program, m, Trajectory(program.graph, params, buffers, (x,)), y)
    sweeps.backward()
    ((_, dense),) = sweeps.groups[0].value_xx.items()
    blocks = dense.reshape(3, -1, 3, dense.shape[1] // 3).permute(0, 2, 1, 3).flatten(2).norm(dim=2)
    torch.testing.assert_close(block_norms(model, x, y, "full", 0.3)[0], blocks, rtol=1e-9, atol=1e-15)


def test_the_linearisation_s_error_is_of_second_order() -> None:
    import feedback
    from shared import LOSS, load

    (x, y), _ = load("digits", None)
    found = []
    for lr in (1e-3, 1e-4):
        torch.manual_seed(0)
        model = feedback.Net(3, "all", "tanh").double()
        optimizer = compile_optimizer(
            model, x[:8].double(), loss=LOSS, curvature="sgd", lr=lr, rollout="nonlinear", feedback_clip=None
        )
        optimizer.step(x[:8].double(), y[:8])
        found.append(feedback.linearisation(optimizer))
    assert len(found[0]) == 4
    assert all(large / small == pytest.approx(10, rel=0.1) for large, small in zip(*found, strict=True))


def test_intervals() -> None:
    from shared import paired, variance_change

    middle, half, count = paired({"0": 1.0, "1": 2.0, "2": 3.0, "7": 9.0}, {"0": 0.0, "1": 0.0, "2": 0.0})
    assert (middle, count) == (2.0, 3) and half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert variance_change([0.0, 2.0, 4.0, 6.0], [0.0, 1.0, 2.0, 3.0]) == pytest.approx((300.0, 300.0, 300.0))
