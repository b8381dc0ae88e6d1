"""The loops in examples/loops: transformers' Trainer, and one of several processes, run as they stand."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.distributed.run import main as torchrun

from gtddp_compile import compile_optimizer

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "loops"


@pytest.fixture(autouse=True)
def examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def test_trainer_trains_accumulates_and_resumes(tmp_path: Path) -> None:
    """It goes through its epochs, and two of its micro-batches are one update; its own checkpoint goes on."""
    recipe = import_module("trainer")
    often = {"gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "epoch", "save_total_limit": 4}
    trained = recipe.train(str(tmp_path), num_train_epochs=4, **often)
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert trained.state.global_step == 16 and float(losses[-1]) < 0.5 * float(losses[0])
    again = recipe.train(str(tmp_path), num_train_epochs=4, resume=str(tmp_path / "checkpoint-8"), **often)
    pairs = zip(trained.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_trainer_s_step_is_the_plain_step(tmp_path: Path) -> None:
    recipe = import_module("trainer")
    fixed = {"lr_scheduler_type": "constant", "max_steps": 3, "save_strategy": "no"}
    trained = recipe.train(str(tmp_path), train_sampling_strategy="sequential", **fixed)
    model, rows = recipe.bert(), recipe.first_tokens()
    opt = compile_optimizer(model, loss=recipe.loss, curvature="adam", lr=0.01)
    model.train()
    for start in range(0, 96, 32):
        part = rows[start : start + 32]
        ids = torch.stack([row["input_ids"] for row in part])
        opt.step({"input_ids": ids}, torch.tensor([row["labels"] for row in part]))
    for mine, other in zip(trained.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Under torchrun; the checkpoint is whole and there is no part of another."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "run.pt"))
    torchrun(["--standalone", "--nproc-per-node=2", str(FOLDER / "several_processes.py")])
    before, after = (float(word) for word in capfd.readouterr().out.split() if word[0].isdigit())
    assert after < before
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    assert set(torch.load(tmp_path / "run.pt", weights_only=True)) == {"model", "optimizer"}


def test_a_process_that_ends_while_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before is whole."""
    recipe, path = import_module("several_processes"), tmp_path / "run.pt"
    model = torch.nn.Linear(2, 2)
    optimizer = compile_optimizer(model, torch.randn(3, 2), loss=torch.nn.CrossEntropyLoss())
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    recipe.save(path, model, optimizer)
    saved = path.read_bytes()

    def ends(found: object, part: Path) -> None:
        part.write_bytes(saved[: len(saved) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", ends)
    with pytest.raises(KeyboardInterrupt):
        recipe.save(path, model, optimizer)
    assert path.read_bytes() == saved
