"""The recipes in examples/ and the loops in examples/loops, run as they stand: a user's own training loop,
checkpoints, Lightning, transformers' Trainer, and several processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, compile_optimizer
from support.architectures import EXAMPLES
from support.exported import targets_for

EXAMPLES_FOLDER = Path(__file__).resolve().parents[2] / "examples"
FOLDER = EXAMPLES_FOLDER / "loops"


@pytest.fixture(autouse=True)
def examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), str(EXAMPLES_FOLDER), *sys.path])


def test_plain_loop() -> None:
    recipe = import_module("plain_loop")
    torch.manual_seed(0)
    model, batches = recipe.Residual(), recipe.moons()
    before = recipe.accuracy(model, batches)
    history = recipe.train(model, batches, epochs=6)
    assert history[-1] < 0.6 * history[0] and recipe.accuracy(model, batches) > max(before, 0.8)


CURVATURES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.01}, "rmsprop": {"momentum": 0.5, "centered": True},
    "adam": {"amsgrad": True}, "adamw": {}, "kfac": {"refresh": 2, "momentum": 0.5, "damping": 0.1},
    "ekfac": {"refresh": 2, "damping": 0.1},
}  # fmt: skip


def run(curvature: str, seed: int) -> tuple[nn.Module, CompiledOptimizer, Callable[[int], list[Tensor]]]:
    """A model with dropout, its optimizer, and a function that makes some steps."""
    example = EXAMPLES["dropout_mlp"]()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in example.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    options = {"loss": nn.CrossEntropyLoss(), "curvature": curvature, "lr": 0.02, **CURVATURES[curvature]}
    opt = compile_optimizer(example.model, example.inputs, **options)
    return example.model, opt, lambda steps: [opt.step(example.inputs, targets_for(3, 4)) for _ in range(steps)]


@pytest.mark.parametrize("way", ["", "_tensors"], ids=["torch.save", "safetensors"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_resuming_continues_bit_for_bit(curvature: str, way: str, tmp_path: Path) -> None:
    """Three steps, saved, three more; a model that started elsewhere loads and makes the same three."""
    recipe = import_module("checkpoints")
    model, opt, steps = run(curvature, 0)
    steps(3)
    opt.param_groups[0]["lr"] *= 0.5
    getattr(recipe, f"save{way}")(tmp_path / "run", model, opt)
    wanted = steps(3)
    other, again, steps = run(curvature, 1)
    getattr(recipe, f"load{way}")(tmp_path / "run", other, again)
    assert all(torch.equal(a, b) for a, b in zip(wanted, steps(3), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert opt.state[mine].keys() == again.state[theirs].keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(again.state[theirs][k]))
                   for k, v in opt.state[mine].items())  # fmt: skip


def test_the_recipe_itself(capsys: pytest.CaptureFixture[str]) -> None:
    import_module("checkpoints").main()
    assert "three runs, one training" in capsys.readouterr().out


def test_lightning_trains_counts_and_resumes(tmp_path: Path) -> None:
    """As the plain loop step for step; Lightning's own checkpoint goes on bit for bit."""
    recipe, plain = import_module("lightning_module"), import_module("plain_loop")
    batches = plain.moons()

    def started() -> Any:
        torch.manual_seed(0)
        return recipe.Classifier(plain.Residual())

    called = []

    class Hooked(recipe.Classifier):  # type: ignore[name-defined,misc]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            called.append(optimizer)

    torch.manual_seed(0)
    whole = Hooked(plain.Residual())
    trainer = recipe.fit(whole, batches, max_epochs=4, default_root_dir=tmp_path, enable_checkpointing=False)
    assert trainer.global_step == 4 * len(batches) == len(called)
    assert float(trainer.callback_metrics["train_loss"]) < 0.6

    by_hand = started().model
    opt = compile_optimizer(by_hand, loss=nn.CrossEntropyLoss(), curvature="adam", lr=0.02)
    for _ in range(4):
        for x, y in batches:
            opt.step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), by_hand.parameters(), strict=True))

    first = recipe.fit(started(), batches, max_epochs=2, default_root_dir=tmp_path)
    path = first.checkpoint_callback.best_model_path
    resumed = started()
    trainer = recipe.fit(resumed, batches, path, max_epochs=4, default_root_dir=tmp_path, enable_checkpointing=False)
    assert trainer.global_step == 4 * len(batches)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


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


def test_several_processes(tmp_path: Path) -> None:
    """Under torchrun; the checkpoint is whole and there is no part of another."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    told = {**os.environ, "OMP_NUM_THREADS": "1", "CHECKPOINT": str(tmp_path / "run.pt")}
    done = subprocess.run([*run, str(FOLDER / "several_processes.py")], env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = (float(word) for word in done.stdout.split() if word[0].isdigit())
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
