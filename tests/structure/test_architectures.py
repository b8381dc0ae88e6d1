"""Every architecture compiles; its graph, as text, is what a reader of the network would write; its update is right.

The texts lie in tests/golden; ``PYTHONPATH=tests python tests/structure/test_architectures.py`` writes them again,
to be reviewed as a diff.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from gtddp_compile import ControlGraph, compile_optimizer
from support.architectures import EXAMPLES, Example, example, resnet18_like
from support.compared import assert_base, trained
from support.networks import Case, conv, make

GOLDEN = Path(__file__).parents[1] / "golden"


def loss(outputs: Any, targets: Tensor) -> Tensor:
    """Squares of everything the network returns, one number a sample."""
    return sum((value - targets.reshape(-1, *(1,) * (value.dim() - 1))).square().flatten(1).mean(1)
               for value in pytree.tree_leaves(outputs))  # fmt: skip


def targets(given: Example) -> Tensor:
    return torch.linspace(-1, 1, given.inputs[0].shape[0]).double()


def compiled(given: Example, **options: Any) -> Any:
    return compile_optimizer(given.model, given.inputs, loss=loss, **{"curvature": "sgd", "lr": 0.05, **options})


@pytest.mark.parametrize("name", EXAMPLES)
def test_without_feedback_a_step_is_torchs_and_with_it_another(name: str) -> None:
    given = EXAMPLES[name]()
    case = Case(given.model, loss=loss, draw=lambda seed, size: (given.inputs, targets(given)))
    options = {"steps": 1, "curvature": "sgd", "lr": 0.05}
    base, found = assert_base(case, **options).parameters, trained(case, **options)
    assert torch.isfinite(found).all() and (found - base).abs().max() > 1e-6


def plain_network() -> Example:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(net.conv1(x)), 2)
        return net.fc2(torch.relu(net.fc1(x.flatten(1))))

    return example(make(forward, conv1=conv(1, 2), fc1=(8, 4), fc2=(4, 3)), (1, 4, 4))


def parameter_free_shortcut() -> Example:
    """ResNet's option A: the shortcut subsamples and pads with zero channels."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.relu(net.stem(x))
        y = net.conv2(torch.relu(F.max_pool2d(net.conv1(x), 2)))
        return net.head(torch.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))).mean((2, 3)))

    return example(make(forward, stem=conv(1, 2), conv1=conv(2, 4), conv2=conv(4, 4), head=(4, 3)), (1, 4, 4))


GRAPHS: dict[str, Callable[[], ControlGraph]] = {
    "plain": lambda: compiled(plain_network()).graph,
    "resnet18_like": lambda: compiled(resnet18_like()).graph,
    "resnet18_like_alap": lambda: compiled(resnet18_like(), schedule="alap").graph,
    "parameter_free_shortcut": lambda: compiled(parameter_free_shortcut()).graph,
    "attention_block": lambda: compiled(EXAMPLES["attention_block"]()).graph,
    "tied": lambda: compiled(EXAMPLES["tied"]()).graph,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_prints_as_golden(name: str) -> None:
    assert str(GRAPHS[name]()) + "\n" == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("schedule", ["asap", "alap", "sequential"])
def test_resnet_names_everything(schedule: str) -> None:
    """Read off the module tree: a stage for every layer of the main path, shortcuts by the kind of `short`."""
    given = resnet18_like()
    graph = compiled(given, schedule=schedule).graph
    layers = [name for name, module in given.model.named_modules() if next(module.parameters(recurse=False), None) is
              not None]  # fmt: skip
    assert sorted(player.name for player in graph.players) == sorted(layers)
    main = [name for name in layers if ".short." not in name]
    depth = {name: stage.index for stage in graph.stages for name in stage.players}
    assert [depth[name] for name in main] == sorted(depth[name] for name in main)
    if schedule != "sequential":
        assert [depth[name] for name in main] == list(range(len(main)))
    blocks = [name for name, module in given.model.named_children() if hasattr(module, "short")]
    found = {s.merge: s for s in graph.shortcuts}
    assert sorted(found) == [f"{name}.add" for name in blocks]
    for name in blocks:
        shortcut = found[f"{name}.add"]
        mapping = [layer for layer in layers if layer.startswith(f"{name}.short.")]
        assert (shortcut.kind, list(shortcut.players)) == ("parametric" if mapping else "identity", mapping)
        assert shortcut.regular and graph.op(shortcut.fork).kind == "relu"
        if mapping and schedule != "sequential":
            beside = {"asap": (f"{name}.a.0", f"{name}.a.1"), "alap": (f"{name}.b.0", f"{name}.b.1")}[schedule]
            assert [depth[layer] for layer in mapping] == [depth[layer] for layer in beside]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for title, make_graph in GRAPHS.items():
        (GOLDEN / f"{title}.txt").write_text(f"{make_graph()}\n", encoding="utf-8")
