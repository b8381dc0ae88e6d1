"""Lightning with manual optimization: the step does its own forward and backward passes.

pip install lightning
python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from plain_loop import Residual, moons
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gtddp_compile import compile_optimizer


class Classifier(lightning.LightningModule):
    """A model that a compiled optimizer trains.

    Lightning counts the steps, calls ``on_before_optimizer_step`` and writes checkpoints as with any optimizer. Its
    gradient clipping and accumulation do not apply: there are no gradients in ``.grad``.
    """

    def __init__(self, model: nn.Module, lr: float = 0.02) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        # No example inputs: the optimizer is specialised at the first batch, on the device where Lightning has put it.
        return compile_optimizer(self.model, loss=nn.CrossEntropyLoss(), curvature="adam", lr=self.lr)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = self.optimizers().step(inputs=x, targets=y)
        self.log("train_loss", loss)
        return loss


def fit(module: lightning.LightningModule, batches: Any, checkpoint: str | None = None, **options: Any) -> Any:
    """Train; ``checkpoint`` is one to resume from."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(**{**quiet, **options})
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=checkpoint)
    return trainer


def main() -> None:
    torch.manual_seed(0)
    trainer = fit(Classifier(Residual()), moons(), max_epochs=20, enable_checkpointing=False)
    print(f"step {trainer.global_step}, loss {trainer.callback_metrics['train_loss']:.3f}")


if __name__ == "__main__":
    main()
