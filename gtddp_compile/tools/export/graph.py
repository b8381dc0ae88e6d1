"""``.pt2``: the step as one graph of torch's operations, for ``torch.export.load``.

The exported module's own text is traced, first by ``make_fx``, which resolves its gradients into plain operations (what
torch.export alone does not), then by torch.export. Branches on values cannot be traced: the loss that is not finite
and the Cholesky factor that fails are written as selections here, the other programs that branch are refused.

The batch size is that of the program's example inputs: kernels decide by sizes how to multiply and in how many pieces.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import BufferRef
from gtddp_compile.methods.curvature import PLAIN, SGD, by_parameter
from gtddp_compile.methods.losses import is_kind
from gtddp_compile.methods.terminal import ELEMENTWISE
from gtddp_compile.passes.p12_emit import draws
from gtddp_compile.runtime.program import VERSION, UpdateProgram
from gtddp_compile.tools.export.python import to_python

REMEDY = "Export as .py, which runs with torch alone too"
SAID = "program.txt"


def save_graph(program: UpdateProgram, path: Path, targets: Any = None) -> None:
    """Write the step's graph; it is complete before the file is opened.

    Raises:
        CompileError: the program branches on values, draws random numbers, or example targets are needed.
    """
    exported = to_graph(program, targets)
    about = f"Update program of {program.graph.name}: {program.curvature}. Written by gtddp_compile {VERSION}."
    torch.export.save(exported, path, extra_files={SAID: about})


def to_graph(program: UpdateProgram, targets: Any = None) -> torch.export.ExportedProgram:
    """``step(params, buffers, state, inputs, targets)`` as an exported program.

    Its ``example_inputs`` hold zeros, but for the state: that is the initial one.
    """
    _refuse(program)
    module = _module(program)
    given = _examples(program, module, targets)
    flat, spec = pytree.tree_flatten(given)
    returned: list[Any] = []

    def run(*values: Any) -> list[Any]:
        found, outside = pytree.tree_flatten(_guarded(module, *pytree.tree_unflatten(values, spec)))
        returned.append(outside)
        return found

    try:
        graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
        return torch.export.export(_Step(graph, returned[0]), given, strict=False)
    except (torch._dynamo.exc.UserError, torch._subclasses.fake_tensor.DataDependentOutputException) as error:
        raise CompileError(f"the step is no single graph: it branches on a value ({error})", REMEDY) from error


class _Step(nn.Module):
    """The traced graph under the step's own arguments."""

    def __init__(self, graph: torch.fx.GraphModule, returned: pytree.TreeSpec) -> None:
        super().__init__()
        self.step, self._returned = graph, returned  # not "graph", which GraphModules have already

    def forward(self, params: Any, buffers: Any, state: Any, inputs: Any, targets: Any) -> Any:
        flat = pytree.tree_leaves((params, buffers, state, inputs, targets))
        return pytree.tree_unflatten(self.step(*flat), self._returned)


def _refuse(program: UpdateProgram) -> None:
    if program.compiled_for.curvature.metric not in PLAIN:
        raise CompileError(
            f"a .pt2 graph cannot hold {program.curvature}: it decomposes matrices, a branch on the step count",
            f"{REMEDY}, or use {by_parameter()}",
        )
    if program.lowered.plan.gram == "nystrom":
        raise CompileError(
            f"a .pt2 graph cannot hold gram={program.options.gram!r}: it iterates until the residual is small",
            f"{REMEDY}, or use gram='exact'",
        )
    if program.options.factored:
        raise CompileError(
            f"a .pt2 graph cannot hold terminal={program.options.terminal!r}: it branches on the eigenvalues' signs",
            f"{REMEDY}, or use terminal='geometric' or 'gradient'",
        )
    if draws(program.lowered):
        op = next(op for op in program.graph.ops.ops if op.random)
        raise op.refusal(
            "a .pt2 graph cannot draw the same random numbers in both sweeps",
            f"{REMEDY}, or compile the model with this layer in evaluation mode",
        )


# --- what is traced ---------------------------------------------------------------------------------------------------


def _module(program: UpdateProgram) -> ModuleType:
    """The exported module, its branches on values replaced by selections."""
    module = ModuleType("gtddp_compile_step")
    exec(compile(to_python(program, guarded=False), "<gtddp_compile .pt2>", "exec"), module.__dict__)
    for name, replacement in (("_cholesky", _cholesky), ("bias_correction", bias_correction)):
        if hasattr(module, name):
            setattr(module, name, replacement)
    return module


def _guarded(module: ModuleType, params: Any, buffers: Any, state: Any, inputs: Any, targets: Any) -> Any:
    """The step; where the loss is not finite, everything else comes back as it was given."""
    *after, loss = module.step(params, buffers, state, inputs, targets)
    finite = torch.isfinite(loss)
    kept = pytree.tree_map(lambda new, old: torch.where(finite, new, old), tuple(after), (params, buffers, state))
    return (*kept, loss)


def _cholesky(block: Tensor, unchecked: bool) -> tuple[Tensor, Tensor]:
    """:func:`gtddp_compile.kernels.factor` of a block; a graph has no branches, and for eigenvalues a larger lift."""
    lift = torch.finfo(block.dtype).eps * block.diagonal().sum()
    first = block if block.dtype == torch.float64 else block + torch.diag(lift.expand(block.shape[0]))
    found, failed = torch.linalg.cholesky_ex(first, upper=True)
    lifted, _ = torch.linalg.cholesky_ex(block + torch.diag((1000 * lift).expand(block.shape[0])), upper=True)
    return torch.where(failed == 0, found, lifted), failed


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """``1 - βᵗ`` of Adam, the step count a tensor."""
    return 1 - torch.pow(beta, step.to(torch.float64))


# --- example arguments ------------------------------------------------------------------------------------------------


def _examples(program: UpdateProgram, module: ModuleType, targets: Any) -> tuple[Any, ...]:
    """Zeros of every shape."""
    graph, setting = program.graph.ops, program.compiled_for
    params = {info.name: torch.zeros(info.shape, dtype=info.dtype) for info in graph.parameters}
    buffers = {name: torch.zeros(info.shape, dtype=info.dtype) for name, info in setting.buffers.items()}
    read = {leaf.name for op in graph.ops for leaf in op.leaves if isinstance(leaf, BufferRef)}
    missing = sorted(read - set(buffers) - set(setting.constants))
    if missing:
        raise CompileError(f"the program does not say what shape the buffer {missing[0]!r} has", "Export it again")
    inputs = tuple(_zeros(program, name) for name in graph.inputs)
    targets = _targets(program) if targets is None else targets
    return params, buffers, _state(program, module, params), inputs, targets


def _state(program: UpdateProgram, module: ModuleType, params: dict[str, Tensor]) -> Any:
    """The initial state, with everything that the first step adds: a graph's state has the same keys at every step.

    A momentum buffer or a last step of zeros is what none is, unless the first gradient is not
    dampened as the others are.
    """
    state = {name: dict(entry) for name, entry in module.init_state(params).items()}
    for name, options in module.options_by_parameter().items():
        if isinstance(program.compiled_for.curvature, SGD) and options["momentum"]:
            if options["dampening"]:
                raise CompileError(
                    "a .pt2 graph cannot hold sgd with dampening: its first step does not dampen",
                    f"{REMEDY}, or use dampening=0",
                )
            state[name]["momentum_buffer"] = torch.zeros_like(params[name])
        if "inertia" in options:
            state[name] |= {"last_step": torch.zeros_like(params[name]), "taken": torch.zeros((), dtype=torch.float64)}
            state[name]["rate"] = torch.scalar_tensor(options["lr"], dtype=torch.float64)
        if options.get("averaging"):
            state[name] |= {"behind": torch.zeros_like(params[name]), "share": torch.ones((), dtype=torch.float64)}
    return state


def _zeros(program: UpdateProgram, name: str) -> Tensor:
    op = program.graph.op(name)
    return torch.zeros(op.shape or (), dtype=op.dtype)


def _targets(program: UpdateProgram) -> Tensor:
    """Targets that the loss takes: class indices, or values like the outputs."""
    names, loss = program.graph.ops.output_names, program.compiled_for.loss
    module = loss.module
    if module is not None and len(names) == 1:
        outputs = _zeros(program, names[0])
        if is_kind(module, nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss):
            return outputs[:, 0].long()
        if is_kind(module, *ELEMENTWISE, nn.L1Loss, nn.KLDivLoss):
            return outputs
    raise CompileError(
        f"what targets the loss {loss.name} takes is not known, and the step is traced with an example",
        "Give one: program.export('step.pt2', targets=example_targets), of the batch size of the example inputs",
    )
