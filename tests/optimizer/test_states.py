"""A saved state and a model that has changed: renamed, reordered, with layers more or fewer; other ways to save it."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gtddp_compile import CompiledOptimizer, CompileError, compile_optimizer
from support.networks import make
from support.noisy import LOSS, batch


def made(*names: str, curvature: str = "adam") -> tuple[Any, CompiledOptimizer]:
    """Layers of one size, so that a shape never tells them apart."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        for name in sorted(names):
            x = torch.tanh(getattr(net, name)(x))
        return x

    model = make(forward, **dict.fromkeys(names, (4, 4))).float()
    return model, compile_optimizer(model, batch()[0], loss=LOSS, curvature=curvature, lr=0.01)


def trained(model: nn.Module, opt: CompiledOptimizer, *steps: int) -> Any:
    for step in steps:
        torch.manual_seed(step)
        opt.step(*batch(step))
    return copy.deepcopy(model.state_dict()), by_name(model, opt)


def by_name(model: nn.Module, opt: CompiledOptimizer) -> dict[str, Any]:
    return {name: copy.deepcopy(opt.state.get(p, {})) for name, p in model.named_parameters()}


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("curvature", ["sgd", "adam", "foof", "kfac", "ekfac"])
def test_layers_in_another_order_find_their_state_by_name(curvature: str) -> None:
    model, opt = made("a", "b", "c", curvature=curvature)
    trained(model, opt, 0, 1)
    twin, other = made("c", "a", "b", curvature=curvature)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    same(by_name(twin, other), by_name(model, opt))
    same(trained(twin, other, 2)[1], trained(model, opt, 2)[1])


def test_a_layer_more_begins_without_state() -> None:
    model, opt = made("a", "b")
    _, before = trained(model, opt, 0)
    twin, other = made("a", "b", "c")
    with pytest.warns(UserWarning, match=r"no parameter groups \['c'\]: they begin without"):
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    same(by_name(twin, other), {**before, "c.weight": {}, "c.bias": {}})
    assert float(other.step(*batch())) == pytest.approx(float(LOSS(torch.zeros(1, 4), torch.tensor([0]))), 1)


def test_a_layer_fewer_and_a_layer_renamed_are_said() -> None:
    model, opt = made("a", "b")
    trained(model, opt, 0)
    saved = opt.state_dict()
    twin, other = made("a", "z")
    with pytest.raises(CompileError, match=r"parameter groups \['b'\].*Rename them in state_dict"):
        other.load_state_dict(copy.deepcopy(saved))
    assert not other.state
    for group in saved["param_groups"]:  # the remedy works
        group["name"] = {"b": "z"}.get(group["name"], group["name"])
    other.load_state_dict(copy.deepcopy(saved))
    same(list(by_name(twin, other).values()), list(by_name(model, opt).values()))
    _, fewer = made("a")
    saved["param_groups"] = [group for group in saved["param_groups"] if group["name"] == "a"]
    with pytest.raises(CompileError, match=r"entries .* of parameters that are in none of its groups"):
        fewer.load_state_dict(copy.deepcopy(saved))
    saved["state"] = {index: saved["state"][index] for index in saved["param_groups"][0]["params"]}
    fewer.load_state_dict(copy.deepcopy(saved))
    assert float(fewer.step(*batch())) > 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("curvature", ["adam", "foof", "ekfac"])
def test_distributed_checkpoints_resume_bit_for_bit(curvature: str, tmp_path: Path) -> None:
    """By torch.distributed.checkpoint, in one process; states by parameter index, as torch.save has them."""
    model, opt = made("a", "b", curvature=curvature)
    trained(model, opt, 0, 1)
    dcp.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, checkpoint_id=tmp_path)
    twin, other = made("a", "b", curvature=curvature)
    trained(twin, other, 3)
    found: dict[str, Any] = {"model": twin.state_dict(), "optimizer": other.state_dict()}
    dcp.load(found, checkpoint_id=tmp_path)
    twin.load_state_dict(found["model"])
    other.load_state_dict(found["optimizer"])
    same(trained(twin, other, 2), trained(model, opt, 2))


def test_options_are_those_that_were_saved_and_what_was_not_stays() -> None:
    def kfac(**options: Any) -> tuple[nn.Module, CompiledOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        return model, compile_optimizer(model, batch()[0], loss=LOSS, curvature="kfac", **options)

    model, opt = kfac(lr=0.02, damping=0.3)
    trained(model, opt, 0)
    twin, other = kfac(lr=0.1, inertia=0.9, lookahead=0.7)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    found = other.param_groups[0]
    assert (found["lr"], found["damping"], found["inertia"], found["lookahead"]) == (0.02, 0.3, 0.9, 0.7)
    trained(twin, other, 1)
    assert all("last_step" in state for state in other.state.values())
    saved = copy.deepcopy(other.state_dict())
    _, third = kfac(inertia=0.5)
    third.load_state_dict(saved)
    assert third.param_groups[0]["inertia"] == 0.9 and third.param_groups[0]["lookahead"] == 0.7
    third.load_state_dict(kfac(inertia=0.5)[1].state_dict())
    assert third.param_groups[0]["inertia"] == 0.5 and third.param_groups[0]["lookahead"] == 0.0
    for other, given, said in (
        (opt, saved, "compiled without inertia"),
        (third, kfac(momentum=0.5)[1].state_dict(), "inertia=0.5 beside kfac's own momentum 0.5"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(CompileError, match=said):
            other.load_state_dict(given)
        assert str(other.state_dict()) == str(before)
    del saved["param_groups"][0]["weight_decay"]
    with pytest.raises(CompileError, match="it has no weight_decay"):
        third.load_state_dict(saved)


def test_a_state_of_before_an_option_was_there_is_taken() -> None:
    """Saved or pickled before there was shrinkage: it begins where it is, and its averages begin anew."""
    model, opt = made("a", "b", curvature="foof")
    trained(model, opt, 0)
    for group in opt.param_groups:
        del group["shrinkage"]
    for state in opt.state.values():
        state.pop("doubt", None), state.pop("spread", None)
    again, old = copy.deepcopy((model, opt))
    twin, other = made("a", "b", curvature="foof")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    same(trained(twin, other, 1), trained(again, old, 1))
    assert old.param_groups[0]["shrinkage"] == other.param_groups[0]["shrinkage"] == 3.0
    assert any("doubt" in state for state in other.state.values())


@pytest.mark.parametrize(("saved", "into"), [("soap", "adam"), ("kfac", "ekfac"), ("sgd", "foof")])
def test_another_base_methods_state_is_refused(saved: str, into: str) -> None:
    """Also where it has all options of this one."""
    model, opt = made("a", "b", curvature=saved)
    trained(model, opt, 0)
    _, other = made("a", "b", curvature=into)
    with pytest.raises(CompileError, match=f"the state is of another base method than {into}"):
        other.load_state_dict(opt.state_dict())
    assert not other.state


@pytest.mark.parametrize("saved", [False, True])
def test_a_state_is_checked_by_the_options_that_come_with_it(saved: bool) -> None:
    def adam(amsgrad: bool) -> tuple[nn.Module, CompiledOptimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, compile_optimizer(model, batch()[0], loss=LOSS, curvature="adam", amsgrad=amsgrad)

    (model, opt), (twin, other) = adam(saved), adam(not saved)
    trained(model, opt, 0)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.param_groups[0]["amsgrad"] == saved
    same(trained(twin, other, 1), trained(model, opt, 1))


@pytest.mark.parametrize(("curvature", "option", "on"), [("adam", "amsgrad", True), ("rmsprop", "momentum", 0.9)])
def test_options_that_need_a_state_are_set_before_the_first_step(curvature: str, option: str, on: Any) -> None:
    model, opt = made("a", "b", curvature=curvature)
    trained(model, opt, 0)
    for group in opt.param_groups:
        group[option] = on
    with pytest.raises(CompileError, match=r"switched on after steps were made.*opt\.state\.clear\(\)"):
        opt.step(*batch(1))
    opt.state.clear()
    assert torch.isfinite(opt.step(*batch(1)))


def room(*values: Any) -> int:
    """What tensors take in a file, with some bytes of words about each."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() + 1000 for value in tensors) + 1000


@pytest.mark.parametrize("options", [{}, {"curvature": "kfac", "momentum": 0.9}, {"curvature": "ekfac"}], ids=str)
def test_a_state_is_saved_in_the_size_of_its_tensors(options: dict[str, Any]) -> None:
    """Whole or a parameter at a time, after steps of layers that are computed together; nobody loses what they hold."""
    width = 48
    model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(width, width), nn.Tanh())))
    x, y = torch.randn(8, width), torch.randn(8, width)
    opt = compile_optimizer(model, x, loss=nn.MSELoss(), **options)
    opt.step(x, y), opt.step(x, y)
    held, before = [dict(state) for state in opt.state.values()], copy.deepcopy(list(opt.state.values()))
    found = opt.state_dict()
    for own in (found, *found["state"].values()):
        torch.save(own, stream := io.BytesIO())
        assert len(stream.getvalue()) < room(own)
    same(list(opt.state.values()), before)
    for own, state in zip(opt.state.values(), held, strict=True):
        assert all(own[key] is value for key, value in state.items())
    opt.step(x, y)
    assert len(pickle.dumps(opt)) < room(list(opt.state.values()), list(model.parameters()))


def test_a_scheduler_that_writes_a_momentum_beside_inertia_is_refused() -> None:
    """torch's default of OneCycleLR, which would be two memories of one step."""
    model, x, y = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4), torch.randint(3, (8,))
    opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss())
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=3.0, total_steps=10)
    with pytest.raises(CompileError, match="cycle_momentum=False"):
        opt.step(x, y)


@pytest.mark.parametrize(("before", "after"), [(8, 128), (128, 8)])
def test_a_checkpoint_is_resumed_with_another_batch_size(before: int, after: int) -> None:
    """Γ of a convolution is sketched for one of them, exact for the other: each has a form of the factor of its own."""
    image = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Flatten())
    model, states = nn.Sequential(image, nn.Linear(1024, 10)), []
    for samples in (before, after):
        x, y = torch.randn(samples, 1, 8, 8), torch.randint(10, (samples,))
        opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss())
        for state in states:
            opt.load_state_dict(state)
        for _ in range(3):  # the fourth step is one in which nothing is inverted
            opt.step(x, y)
        states.append(copy.deepcopy(opt.state_dict()))
    forms = [{"map_x", "filters"} & state["state"][2].keys() for state in states]
    assert sorted(map(sorted, forms)) == [["filters"], ["map_x"]]
