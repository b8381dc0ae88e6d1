"""Wide layers of few pixels or tokens under FOOF: the metric is multiplied with their inputs, not their gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import FOOF, kernels
from support.compared import assert_equal, assert_union, flat, optimizer, train
from support.networks import Case

OPTIONS: dict[str, Any] = {"steps": 3, "size": 2, "gram": "exact", "inertia": 0.9,
                           "curvature": FOOF(lr=0.3, stat_decay=0.5, refresh=2, stat_every=1)}  # fmt: skip
MAPPED = {"narrow", "grouped", "strided", "tokens"}


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-sample gradients, which small weights keep, are made again; blocks of a token layer's inputs are small."""
    monkeypatch.setattr("gtddp_compile.lowering.costs.KEEP", 0.0)
    monkeypatch.setattr("gtddp_compile.lowering.cooperation.NARROW", 2)


def wide(bias: bool = True) -> Case:
    """Two by two pixels: the first layer has more of them than its gradient has rows, the others fewer."""
    layers = {
        "first": nn.Conv2d(1, 4, 1), "bend": nn.Tanh(), "narrow": nn.Conv2d(4, 6, 3, padding=1, bias=bias),
        "again": nn.Tanh(), "grouped": nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=bias), "more": nn.Tanh(),
        "strided": nn.Conv2d(8, 20, 2, stride=2, padding="valid", bias=bias), "flat": nn.Flatten(1),
        "lines": nn.Unflatten(1, (2, 10)), "last": nn.Tanh(), "narrower": nn.Linear(10, 6), "end": nn.Tanh(),
        "tokens": nn.Linear(6, 9, bias=bias), "all": nn.Flatten(1), "head": nn.Linear(18, 3),
    }  # fmt: skip
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return Case(model.double(), (1, 2, 2))


def mapped(opt: Any) -> set[str]:
    return {one.named["names"][0].split(".")[0] for one in opt.program.lowered.instructions
            if one.function == "m.descend_inputs"}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"inertia": 0.0}, {"coupling": 1}, {"rollout": "nonlinear", "inertia": 0.0}], ids=str,
)  # fmt: skip
def test_it_is_the_step_of_explicit_matrices(options: dict[str, Any], bias: bool) -> None:
    run = assert_equal(wide(bias), **{**OPTIONS, **options})
    assert mapped(run.optimizer) == MAPPED


def test_with_the_trajectory_run_again_it_is_the_same_step() -> None:
    kept, again = (train(wide(), memory=memory, **OPTIONS) for memory in ("keep", "recompute"))
    assert mapped(again.optimizer) == MAPPED
    torch.testing.assert_close(again.parameters, kept.parameters, rtol=0, atol=1e-12)


def test_where_a_decay_or_a_sum_over_parts_is_added_the_gradient_is_mapped() -> None:
    assert_union(wide(), 2, curvature="foof", gram="exact")
    decayed = assert_equal(wide(), **{**OPTIONS, "curvature": FOOF(lr=0.3, weight_decay=0.1)})
    assert not mapped(decayed.optimizer)


def test_a_larger_batch_than_was_compiled_for_has_its_gradients_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    case, found = wide(), []
    for size in (2, 50):
        asked = list[torch.Size]()

        def counted(gradient: Tensor, inverse: Tensor, asked: list[torch.Size] = asked) -> Tensor:
            asked.append(gradient.shape)
            return kernels.channel_step(gradient, inverse)

        monkeypatch.setattr("gtddp_compile.methods.curvature.blocks.channel_step", counted)
        model, opt = optimizer(case, size, curvature="foof", gram="exact")
        assert mapped(opt) == (MAPPED if size == 2 else set())
        opt.step(*case.batch(1, 50))
        assert len(asked) == len(MAPPED)  # "first" too, but not "tokens", whose step is one product
        found.append(flat(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
