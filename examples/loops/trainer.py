"""transformers' Trainer: two methods of it, and its schedule, logging, accumulation and checkpoints as they are.

pip install transformers accelerate
python examples/loops/trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from gtddp_compile import compile_optimizer


def loss(outputs: Any, labels: Tensor) -> Tensor:
    """One loss a sample."""
    return F.cross_entropy(outputs.logits, labels, reduction="none")


class CompiledTrainer(Trainer):
    """A Trainer whose optimizer runs the forward and backward passes itself.

    A batch is taken in where the Trainer would call ``backward()``, and the update is made where it calls
    ``optimizer.step()``: ``gradient_accumulation_steps`` are micro-batches of one update. Its gradient clipping has
    nothing to clip: ``max_grad_norm=0`` there, and ``compile_optimizer(max_grad_norm=…)`` where it is wanted.
    """

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = compile_optimizer(self.model, loss=loss, curvature="adam", lr=self.args.learning_rate)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        model.train()
        compiled = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper has no accumulate
        found = compiled.accumulate(self._prepare_inputs(inputs), None)
        return found / self.args.gradient_accumulation_steps  # what is logged is their sum


def first_tokens(samples: int = 256, length: int = 8) -> list[dict[str, Any]]:
    """Sequences of tokens, whose class is whether the first is in the upper half of the vocabulary."""
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (samples, length), generator=source)
    return [{"input_ids": row, "labels": int(row[0] >= 10)} for row in tokens]


def bert() -> BertForSequenceClassification:
    """A small one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes, **rates))


def train(folder: str, resume: str | None = None, **options: Any) -> Trainer:
    """Train it; ``resume``: a checkpoint of an earlier run."""
    quiet = {"report_to": "none", "disable_tqdm": True, "max_grad_norm": 0.0, "learning_rate": 0.01}
    usual = {**quiet, "use_cpu": True, "logging_steps": 8, "per_device_train_batch_size": 32}
    arguments = TrainingArguments(folder, **{**usual, **options})
    trainer = CompiledTrainer(bert(), arguments, train_dataset=first_tokens())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(folder, num_train_epochs=6, save_strategy="no")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"step {trainer.state.global_step}, loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
