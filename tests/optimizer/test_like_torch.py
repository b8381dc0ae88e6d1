"""Each behaviour of torch.optim's that docs/torch_optim.md has, and the table itself."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import lr_scheduler, optimizer, swa_utils

from gtddp_compile import CompiledOptimizer, CompileError, compile_optimizer
from support import networks
from support.compared import torch_step
from support.noisy import LOSS, Noisy, batch

PAGE = Path(__file__).parents[2] / "docs" / "torch_optim.md"


def made(model: nn.Module | None = None, **options: Any) -> tuple[Any, CompiledOptimizer]:
    torch.manual_seed(0)
    model = Noisy() if model is None else model
    return model, compile_optimizer(model, batch()[0], loss=LOSS, **{"curvature": "adam", "lr": 0.01, **options})


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def trained(model: nn.Module, opt: CompiledOptimizer, steps: int = 2) -> Any:
    """Two steps, from the same random numbers; all there is then."""
    for step in range(steps):
        torch.manual_seed(step)
        opt.step(*batch(step))
    return copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))


def test_the_table_has_these_tests() -> None:
    listed = re.findall(r"\| `(\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [f"test_{name}" for name in listed] == [name for name in globals() if name.startswith("test_")][1:]


def test_step_hooks() -> None:
    model, opt = made()
    seen: list[str] = []

    def before(own: Any, args: Any, kwargs: Any) -> Any:
        seen.append("before")
        return (own, batch(1)[0], batch(1)[1]), kwargs

    opt.register_step_pre_hook(before)
    opt.register_step_post_hook(lambda own, args, kwargs: seen.append("after"))
    twin, other = made()
    torch.manual_seed(1)
    found = opt.step(*batch(0))
    torch.manual_seed(1)
    same(found, other.step(*batch(1)))
    same(model.state_dict(), twin.state_dict())
    assert seen == ["before", "after"]
    opt.register_step_pre_hook(lambda own, args, kwargs: ((own, "text", None), kwargs))
    with pytest.raises(CompileError):
        opt.step(*batch(0))
    assert seen == ["before", "after", "before"]


def test_hooks_of_all_optimizers() -> None:
    _, opt = made()
    seen: list[str] = []
    handles = [
        optimizer.register_optimizer_step_pre_hook(lambda own, args, kwargs: seen.append("before")),
        optimizer.register_optimizer_step_post_hook(lambda own, args, kwargs: seen.append("after")),
    ]
    opt.step(*batch())
    for handle in handles:
        handle.remove()
    assert seen == ["before", "after"]


def test_state_dict_hooks() -> None:
    model, opt = made()
    trained(model, opt)
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda own: seen.append("before saving"))
    opt.register_state_dict_post_hook(lambda own, found: {**found, "epoch": 3})
    opt.register_load_state_dict_pre_hook(lambda own, found: seen.append(f"epoch {found['epoch']}"))
    opt.register_load_state_dict_post_hook(lambda own: seen.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["before saving", "epoch 3", "loaded"]


def test_closures() -> None:
    model, opt = made()
    seen: list[int] = []
    torch.manual_seed(0)
    loss = opt.step(*batch(), closure=lambda: seen.append(1))
    twin, other = made()
    torch.manual_seed(0)
    same(loss, other.step(*batch()))
    same(model.state_dict(), twin.state_dict())
    assert seen == [1]
    with pytest.raises(CompileError, match="a closure does not stand for it"):
        opt.step(lambda: 0.0)
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"], torch.get_rng_state()))
    with pytest.raises(ZeroDivisionError):
        opt.step(*batch(), closure=lambda: torch.rand(1) / 0 if 1 / 0 else None)
    same((model.state_dict(), opt.state_dict()["state"], torch.get_rng_state()), before)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda opt: lr_scheduler.StepLR(opt, 1),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=9),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, cycle_momentum=False),
    "warm restarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "warm-up, then cosine": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt), lr_scheduler.CosineAnnealingLR(opt, 3)], [2]
    ),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "swa": lambda opt: swa_utils.SWALR(opt, 0.05),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    """Rates and moments are torch.optim's, with feedback off parameters too; a scheduler goes on after loading."""
    case = networks.mlp()
    model, plain = case.model, copy.deepcopy(case.model)
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature="adam", lr=0.01, feedback=False)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    schedulers = [SCHEDULERS[name](one) for one in (opt, adam)]
    for step in range(5):
        x, y = case.batch(step)
        torch_step(adam, LOSS(plain(x), y))
        opt.step(x, y)
        for scheduler in schedulers:
            scheduler.step(1.0) if name == "plateau" else scheduler.step()
        if step == 2:
            saved = copy.deepcopy((opt.state_dict(), schedulers[0].state_dict()))
            schedulers[0] = SCHEDULERS[name](opt)
            schedulers[0].load_state_dict(saved[1])
            opt.load_state_dict(saved[0])
        for group in opt.param_groups:
            assert (group["lr"], group["betas"]) == (adam.param_groups[0]["lr"], adam.param_groups[0]["betas"])
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


def test_averaged_models() -> None:
    model, opt = made()
    averaged = swa_utils.AveragedModel(model)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(3):
        opt.step(*batch(step))
        averaged.update_parameters(model)
        for name, p in model.named_parameters():
            expected[name] += p.detach() / 3
    torch.testing.assert_close(dict(averaged.module.named_parameters()), expected)


def test_groups() -> None:
    model, opt = made(curvature="sgd", feedback=False)
    model.fc.requires_grad_(False)
    assert [group["name"] for group in opt.param_groups] == [n for n, m in model.named_modules() if m._parameters and n]
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(dict(model.named_parameters()))
    opt.step(*batch())
    same(dict(model.named_parameters()), before)


@pytest.mark.parametrize("curvature", ["sgd", "muon", "foof"])
def test_tensor_as_lr(curvature: str) -> None:
    found = []
    for rate in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        case = networks.mlp()
        x, model, options = case.batch(0)[0], case.model, {"curvature": curvature, "lr": rate, "inertia": 0.0}
        opt = compile_optimizer(model, x, loss=LOSS, **options)
        for step in range(2):
            opt.step(*case.batch(step))
        found.append(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)
    before = copy.deepcopy(dict(model.named_parameters()))
    for group in opt.param_groups:
        group["lr"].fill_(0.0)
    opt.step(*case.batch(2))
    same(dict(model.named_parameters()), before)


def test_add_param_group() -> None:
    _, opt = made()
    with pytest.raises(CompileError, match="cannot be added"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_zero_grad() -> None:
    model, opt = made()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    opt.accumulate(*batch())
    opt.zero_grad()
    with pytest.raises(CompileError, match="the batch itself is needed"):
        opt.step()


def test_maximize() -> None:
    with pytest.raises(CompileError, match=r"maximize=True.*Negate the loss"):
        made(maximize=True)
    _, opt = made()
    opt.param_groups[0]["maximize"] = True
    with pytest.raises(CompileError, match=r"maximize=True.*Negate the loss"):
        opt.step(*batch())


@pytest.mark.parametrize("option", ["foreach", "fused", "capturable"])
def test_implementations(option: str) -> None:
    with pytest.raises(CompileError, match=f"{option}.*implementations of the same update"):
        made(**{option: True})


def test_differentiable() -> None:
    with pytest.raises(CompileError, match=r"differentiable.*in place"):
        made(differentiable=True)


STATES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "adam": ({"amsgrad": True}, {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "rmsprop": ({"centered": True, "momentum": 0.5}, {"step", "square_avg", "grad_avg", "momentum_buffer"}),
    "sgd": ({"momentum": 0.9}, {"momentum_buffer"}),
}


@pytest.mark.parametrize("curvature", STATES)
def test_state(curvature: str) -> None:
    """Who holds a state's tensor sees what it is after every step; a copy stays what it was."""
    options, keys = STATES[curvature]
    model, opt = made(curvature=curvature, **options)
    trained(model, opt)
    assert all(set(state) == keys for state in opt.state.values())
    held = [(state, key, value) for state in opt.state.values() for key, value in state.items() if value.dim()]
    copies = [value.clone() for *_, value in held]
    opt.step(*batch(2))
    assert held and all(state[key] is value for state, key, value in held)
    assert not any(torch.equal(value, copy) for (*_, value), copy in zip(held, copies, strict=True))


def test_state_dicts() -> None:
    model, opt = made(curvature="ekfac")
    trained(model, opt)
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, stream)
    stream.seek(0)
    twin, other = made(curvature="ekfac")
    found = torch.load(stream, weights_only=True)
    twin.load_state_dict(found["model"])
    other.load_state_dict(found["optimizer"])
    same(trained(twin, other), trained(model, opt))


def test_another_models_state() -> None:
    """Of one with other shapes, and of one with other modules."""
    _, opt = made()
    for module, said in (("fc", "'fc'.* has shape .* where the parameter has"), ("more", "parameter groups .'more'")):
        other = Noisy()
        other.bn, other.out = (nn.BatchNorm1d(5), nn.Linear(5, 3)) if module == "fc" else (other.bn, other.out)
        setattr(other, module, nn.Linear(4, 5) if module == "fc" else nn.Linear(3, 3))
        _, theirs = made(other)
        theirs.step(*batch())
        with pytest.raises(CompileError, match=said):
            opt.load_state_dict(theirs.state_dict())
    assert not opt.state


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("curvature", ["adam", "foof", "ekfac"])
@pytest.mark.parametrize("fresh", [False, True])
def test_distributed_state_dict(fresh: bool, curvature: str) -> None:
    """Which makes a step of zero gradients before it loads."""
    model, opt = made(curvature=curvature)
    trained(model, opt)
    saved = copy.deepcopy(get_state_dict(model, opt))
    twin, other = made(curvature=curvature)
    trained(twin, other, 0 if fresh else 1)
    set_state_dict(twin, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    same(trained(twin, other), trained(model, opt))


def test_deepcopy() -> None:
    model, opt = made()
    trained(model, opt)
    twin, other = copy.deepcopy((model, opt))
    same(trained(twin, other), trained(model, opt))
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    lr_scheduler.StepLR(opt, 9)  # puts a step of this optimizer's over the method
    twin, other = copy.deepcopy((model, opt))
    before = copy.deepcopy(model.state_dict())
    after = trained(twin, other)
    same(model.state_dict(), before)
    same(trained(model, opt), after)


def test_pickling() -> None:
    model, opt = made()
    trained(model, opt)
    lr_scheduler.StepLR(opt, 9)
    twin, other = pickle.loads(pickle.dumps((model, opt)))
    same(trained(twin, other), trained(model, opt))


def test_deterministic_algorithms() -> None:
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            found.append(trained(*made(curvature="foof")))
    finally:
        torch.use_deterministic_algorithms(False)
    same(*found)


def test_conversions() -> None:
    model, opt = made()
    trained(model, opt)
    model.to(torch.float32 if next(model.parameters()).dtype == torch.float64 else torch.float64)
    x, y = batch()
    x = x.to(next(model.parameters()).dtype)
    with pytest.raises(CompileError, match=r"opt\.load_state_dict\(opt\.state_dict\(\)\)"):
        opt.step(x, y)
    opt.load_state_dict(opt.state_dict())
    assert opt.step(x, y).dtype == x.dtype


def test_grad_mode() -> None:
    (model, opt), (twin, other) = made(), made()
    with torch.no_grad():
        found = trained(model, opt)
    with torch.set_grad_enabled(False):
        torch.manual_seed(0)
        opt.step(*batch())
    same(found, trained(twin, other))
    torch.manual_seed(0)
    other.step(*batch())
    same(model.state_dict(), twin.state_dict())


def test_without_gradient() -> None:
    """As torch.optim leaves alone what has no ``p.grad``."""
    models = [Noisy() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.unused = nn.Linear(3, 3)
        model.fc.bias.requires_grad_(False)
    models[1].load_state_dict(models[0].state_dict())
    model, opt = made(models[0], curvature="adamw", weight_decay=0.1, feedback=False)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=0.01, weight_decay=0.1)
    for step in range(2):
        torch.manual_seed(step)
        opt.step(*batch(step))
        torch.manual_seed(step)
        torch_step(theirs, LOSS(models[1](batch(step)[0]), batch(step)[1]))
    torch.testing.assert_close(model.state_dict(), models[1].state_dict())
    assert {id(p) for p in model.parameters()} - {id(p) for p in opt.state} == {
        id(p) for p in (model.fc.bias, *model.unused.parameters())
    }


def test_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)  # type: ignore[attr-defined]
    (model, opt), (twin, other) = made(grad_scaler=scaler), made()
    same(trained(model, opt), trained(twin, other))
    scaler.scale(LOSS(model(batch()[0]), batch()[1])).backward()
    with pytest.raises(CompileError, match="the batch itself is needed"):
        scaler.step(opt)
    same(dict(model.named_parameters()), dict(twin.named_parameters()))


def test_gradients() -> None:
    (model, opt), (twin, other) = made(), made()
    given: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        p.grad = given[name] = torch.randn_like(p)
    said = r"p\.grad, which a compiled step does not read.*no effect.*max_grad_norm"
    with pytest.warns(UserWarning, match=said) as caught:
        found = trained(model, opt)
    assert [warning.filename for warning in caught] == [__file__]
    same(found, trained(twin, other))
    assert all(p.grad is given[name] for name, p in model.named_parameters())
