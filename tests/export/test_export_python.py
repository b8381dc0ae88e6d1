"""``program.export("step.py")``: the written module does what ``opt.step`` does, with torch and nothing else."""

import ast
import copy
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from gtddp_compile import SGD, CompiledOptimizer, CompileError, MonteCarlo, Nystrom, compile_optimizer
from support.architectures import EXAMPLES, Example
from support.compared import assert_exported, followed
from support.exported import compiled, largest, load_module, named, pseudo_huber, run_alone, targets_for, torch_only
from support.exported import state_by_name as states
from support.networks import Case, conv, make, mlp
from support.stored import small

STEPS = 4
TARGETS = mlp().batch(0)[1]
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}

SCRIPT = """
import importlib
case = torch.load({case!r})
for name, (params, buffers, inputs, targets, expected) in case.items():
    module = importlib.import_module(name)
    state = module.init_state(params)
    worst = 0.0
    for wanted in expected:
        params, buffers, state, loss = module.step(params, buffers, state, inputs, targets)
        worst = max(worst, abs(float(loss) - wanted))
    print(name, worst)
    torch.save((params, buffers, state), name + ".pt")
"""


def mixed() -> Example:
    """A convolution, a norm, two players with the same rows, a linear layer."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        h = net.norm(torch.relu(net.conv(x)).flatten(1))
        return net.head(torch.tanh(net.a(h) + net.b(h)))

    layers = {"conv": conv(1, 2), "norm": lambda: nn.LayerNorm(8), "a": (8, 5), "b": (8, 5), "head": (5, 3)}
    return Example(make(forward, **layers), (torch.randn(4, 1, 2, 2, dtype=torch.float64),))


ALONE: dict[str, tuple[Callable[[], Example], str]] = {
    "resnet18_like": (EXAMPLES["resnet18_like"], "sgd"), "densenet_like": (EXAMPLES["densenet_like"], "adamw"),
    "unet_like": (EXAMPLES["unet_like"], "rmsprop"), "attention_block": (EXAMPLES["attention_block"], "adam"),
    "mixed_kfac": (mixed, "kfac"), "mixed_ekfac": (mixed, "ekfac"),
}  # fmt: skip


def imported(path: Path) -> set[str]:
    """Packages that a module imports, the standard library's left out."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_steps_with_torch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network in one precision, one first-order method and one with factors in both."""
    cases, optimizers = {}, {}
    single = [(torch.float32, name) for name in ("unet_like", "mixed_ekfac")]
    for dtype, architecture in [*itertools.product([torch.float64], ALONE), *single]:
        build, curvature = ALONE[architecture]
        example = build()
        model, inputs = example.model.to(dtype), tuple(x.to(dtype) for x in example.inputs)
        opt = compiled(Example(model, inputs), curvature=curvature, lr=0.01, weight_decay=1e-3)
        name = f"{architecture}_{str(dtype)[6:]}"
        opt.program.export(tmp_path / f"{name}.py")
        assert imported(tmp_path / f"{name}.py") == {"torch"}
        params, buffers = named(model)
        targets = targets_for(3, 4)
        losses = [opt.step(inputs, targets).item() for _ in range(STEPS)]
        assert losses[-1] < losses[0]
        cases[name] = (params, buffers, inputs, targets, losses)
        optimizers[name] = (opt, model, BOUNDS[dtype])
    torch.save(cases, tmp_path / "cases.pt")
    monkeypatch.chdir(tmp_path)
    output = run_alone(SCRIPT.format(case=str(tmp_path / "cases.pt")), torch_only(tmp_path / "site"), tmp_path)
    worst = {line.split()[0]: float(line.split()[1]) for line in output.splitlines()}
    for name, (opt, model, bound) in optimizers.items():
        params, buffers, state = torch.load(tmp_path / f"{name}.pt")
        assert worst[name] <= bound
        assert all(largest(*pair) <= bound for pair in zip((params, buffers), named(model), strict=True))
        assert largest(state, states(opt, model)) <= bound


def follow(opt: CompiledOptimizer, example: Example, path: Path, targets: Tensor) -> None:
    """The module that an optimizer is exported to takes its steps, with torch alone."""
    case = Case(copy.deepcopy(example.model), draw=lambda seed, size: (example.inputs, targets))
    assert_exported(case, followed(case, example.model, opt, 3, len(targets)), path.parent)
    assert imported(path) == {"torch"}


@pytest.mark.parametrize("name", ["dropout_mlp", "siamese", "two_inputs", "frozen"])
def test_every_kind_of_network(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]()
    follow(compiled(example), example, tmp_path / "step.py", targets_for(3, 4))


HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "joint": ({}, "nothing runs again"),
    "joint, groups": ({"coupling": 2}, "in groups of 2"),
    "joint, columns": ({"terminal": "ggn", "curvature": "sgd"}, "one B r x B r system"),
    "nystrom": ({"curvature": "sgd", "gram": Nystrom(2, 1e-3), "terminal": "gradient"}, "no Gram matrix is formed"),
    "nonlinear": ({"rollout": "nonlinear"}, "and runs again"),
    "open": ({"feedback": "open", "curvature": "sgd"}, "none answers to another"),
    "block": ({"coupling": "block", "curvature": "sgd"}, "only what is a sample's own"),
    "printed": ({"coupling": "block", "curvature": "sgd", "recursion": "printed"}, "sample's own weight"),
    "base": ({"feedback": False}, "without feedback"),
}


JOINT = {"nothing runs again", "in groups of 2"}
"""Both are said of the joint step in groups."""


@pytest.mark.parametrize("name", HEADS)
def test_the_head_says_what_the_program_is(name: str, tmp_path: Path) -> None:
    options, says = HEADS[name]
    program = compile_optimizer(small().model, *small().inputs, loss=nn.CrossEntropyLoss(), **options).program
    program.export(tmp_path / "step.py")
    text = (tmp_path / "step.py").read_text(encoding="utf-8")
    head = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
    rolled = re.search(r"^\s+\w+_new, *=", text, re.MULTILINE) is not None  # a stage is run again
    assert says in head and ("sweep forward" in head) == rolled
    assert not any(other in head for other in {says for _, says in HEADS.values()} - {says, "and runs again"} - JOINT)
    legend = head.partition("(4, 28) ")[2].partition(". Stages")[0]
    explained = set(re.findall(r"(?:with|,) (\w+) (?:=|the|which)", legend))
    printed = program.form.said
    used = {str(symbol) for one in printed for symbol in one.expression.free_symbols if "'" not in str(symbol)}
    carried = {"y", "Lambda", "alpha", "rho", "R", "B"}  # from stage to stage; and the size of the batch
    assert used - {str(one.symbol) for one in printed} - carried == explained - ({"C", "M"} - used)


def test_constants_travel(tmp_path: Path) -> None:
    """Constant tensors: a plain attribute, a buffer that is not saved, and one made while tracing."""
    model = make(lambda net, x: net.a(x * net.scale + net.shift + torch.arange(4)), a=(4, 3))
    model.scale = torch.tensor([0.5, 1.0, 2.0, -1.0]).double()
    model.register_buffer("shift", torch.ones(4).double(), persistent=False)
    example = Example(model, (torch.randn(4, 4, dtype=torch.float64),))
    follow(compiled(example, lr=0.01), example, tmp_path / "step.py", targets_for(3, 4))


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    example = EXAMPLES["dropout_mlp"]()
    opt = compiled(example, curvature="adam")
    opt.program.export(tmp_path / "step.py")
    module = load_module(tmp_path / "step.py")
    params, buffers = named(example.model)
    state = module.init_state(params)
    drawn = torch.get_rng_state()
    result = module.step(params, buffers, state, torch.full((4, 4), torch.nan).double(), targets_for(3, 4))
    assert result[0] is params and result[1] is buffers and result[2] is state and not result[3].isfinite()
    assert torch.equal(drawn, torch.get_rng_state())


def test_options_are_those_of_the_groups_now_and_can_be_edited(tmp_path: Path) -> None:
    example, y = small(), TARGETS
    opt = compiled(example, lr=0.5)
    opt.param_groups[1]["lr"] = 0.125
    follow(opt, example, tmp_path / "step.py", y)
    module = load_module(tmp_path / "step.py")
    module.OPTIONS["lr"] = 0.0
    module.GROUPS.update({name: (names, {"lr": 0.0}) for name, (names, _) in module.GROUPS.items()})
    params, buffers = named(example.model)
    assert largest(module.step(params, buffers, module.init_state(params), example.inputs, y)[0], params) == 0


def test_a_loss_of_ones_own_travels_as_text(tmp_path: Path) -> None:
    example = small()
    follow(compiled(example, loss=pseudo_huber), example, tmp_path / "step.py", torch.zeros(7, 3).double())


def test_a_loss_that_needs_more_than_torch_is_refused(tmp_path: Path) -> None:
    opt = compiled(small(), loss=lambda outputs, targets: (outputs - targets).square().mean(1))
    with pytest.raises(CompileError, match=r"<lambda> cannot be written .* Define it with def"):
        opt.program.export(tmp_path / "step.py")
    assert not (tmp_path / "step.py").exists()


class Pair(NamedTuple):
    logits: Tensor
    rest: dict[str, Tensor]


def of_pair(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, targets, reduction="none") + outputs.rest["value"].square().sum(1)


def squares(outputs: Any, targets: Tensor) -> Tensor:
    return (outputs - F.one_hot(targets, 3)).square().sum(1)


FACTORS: dict[str, dict[str, Any]] = {
    "elementwise": {"terminal": "ggn", "loss": nn.BCEWithLogitsLoss()},
    "explicit": {"terminal": "ggn", "loss": squares},
    "explicit, sampled": {"terminal": MonteCarlo(1), "loss": squares},
}


@pytest.mark.parametrize("name", FACTORS)
def test_terminal_factors(name: str, tmp_path: Path) -> None:
    example, targets = small(), F.one_hot(TARGETS, 3).double() if name == "elementwise" else TARGETS
    follow(compiled(example, **FACTORS[name]), example, tmp_path / "step.py", targets)


@pytest.mark.parametrize("terminal", ["geometric", "ggn"])
def test_named_tuples_reach_the_loss(terminal: Any, tmp_path: Path) -> None:
    model = make(lambda net, x: Pair(net.b(torch.tanh(net.a(x))), {"value": net.v(x)}), a=(4, 5), b=(5, 3), v=(4, 1))
    example = Example(model, (torch.randn(4, 4, dtype=torch.float64),))
    opt = compiled(example, loss=of_pair, terminal=terminal)
    follow(opt, example, tmp_path / "step.py", targets_for(3, 4))
    with pytest.raises(CompileError, match="the model returns a Pair: a stored program holds plain tuples"):
        opt.program.export(tmp_path / "step.json")


def test_a_concave_loss_is_refused_by_the_module_too(tmp_path: Path) -> None:
    example = small()
    compiled(example, loss=concave, terminal="ggn").program.export(tmp_path / "step.py")
    module = load_module(tmp_path / "step.py")
    params, buffers = named(example.model)
    with pytest.raises(ValueError, match="not convex in the network's outputs here: eigenvalue -2"):
        module.step(params, buffers, module.init_state(params), example.inputs, TARGETS)


def concave(outputs: Tensor, targets: Tensor) -> Tensor:
    return 10 - outputs.square().sum(1)


class Box(dict[str, Tensor]):
    """A class of one's own, which torch's pytree knows."""


pytree.register_pytree_node(
    Box, lambda box: (list(box.values()), list(box)), lambda values, keys: Box(zip(keys, values, strict=True))
)


def test_an_output_of_a_class_of_ones_own_is_refused(tmp_path: Path) -> None:
    model = make(lambda net, x: Box(logits=net.a(x)), a=(4, 3))
    opt = compiled(Example(model, (torch.randn(4, 4, dtype=torch.float64),)), loss=of_box)
    with pytest.raises(CompileError, match="the model returns a Box, a class that an exported program does not have"):
        opt.program.export(tmp_path / "step.py")


class OwnSGD(SGD):
    """A base method of one's own."""


@pytest.mark.parametrize("suffix", ["py", "pt2", "json"])
def test_a_base_method_of_ones_own_is_refused(suffix: str, tmp_path: Path) -> None:
    opt = compile_optimizer(small().model, small().inputs, loss=nn.CrossEntropyLoss(), curvature=OwnSGD(lr=0.1))
    with pytest.raises(CompileError, match="the base method OwnSGD is none of the package's own"):
        opt.program.export(tmp_path / f"step.{suffix}")
    assert not list(tmp_path.iterdir())


def of_box(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"], targets, reduction="none")


def test_names_that_an_exported_module_uses_itself(tmp_path: Path) -> None:
    """Layers named like the module's own variables and functions."""
    names = ("state", "params", "first", "after", "loss", "losses", "options", "clip", "m", "ParameterUpdates")

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        for name in names:
            x = torch.tanh(getattr(net, name)(x))
        return x

    model = make(forward, **dict.fromkeys(names, (3, 3)))
    example = Example(model, (torch.randn(4, 3, dtype=torch.float64),))
    follow(compiled(example), example, tmp_path / "step.py", targets_for(3, 4))
