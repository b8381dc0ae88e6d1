"""Normalise: one functional form of the model, whichever front end recorded it.

Takes a module and example inputs; guarantees an :class:`OpGraph` in which every operation is a function of values,
parameters, buffers and literals, without side effects but those of a training batch-norm (``advances``), in topological
order, nothing dead, every value named after the module that computes it, with its shape for the example inputs and
where its samples lie.

The front ends of :data:`FRONT_ENDS` are asked in order: torch.fx, torch.export, torch.export functionalised, the model
run as it is with every torch function noted. A recording is not trusted: it is
run beside the model on the example inputs, and outputs and parameter gradients must agree. What torch.fx gets wrong
without saying so (values read into Python while it traces) is found here and left to the next front end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from gtddp_compile.errors import CompileError
from gtddp_compile.frontends import (
    Traced,
    Untraceable,
    differentiates,
    trace_derivatives,
    trace_export,
    trace_followed,
    trace_functional,
    trace_symbolically,
)
from gtddp_compile.frontends.attributes import untouched
from gtddp_compile.frontends.canonical import is_identity, is_random, python_number
from gtddp_compile.frontends.functional import Clean, functionalise
from gtddp_compile.frontends.hooks import check_hooks, unhooked
from gtddp_compile.frontends.keywords import Named, positional
from gtddp_compile.frontends.masks import masks_apart
from gtddp_compile.frontends.mixing import find_mixing
from gtddp_compile.frontends.reference import agrees, observe, reads_values, run
from gtddp_compile.frontends.regions import refused_region
from gtddp_compile.frontends.samples import find_layouts
from gtddp_compile.frontends.state import TABLES, refused_table, watch
from gtddp_compile.frontends.traced import argument_names, parameter_infos
from gtddp_compile.graph import DETACHED, GUARD, BufferRef, Op, OpGraph, ParamRef, Ref, iter_leaves, map_leaves

FrontEnd = Callable[[nn.Module, tuple[Any, ...]], Traced]
FRONT_ENDS: tuple[FrontEnd, ...] = (trace_symbolically, trace_export, trace_functional, trace_followed)
ASSERTIONS = frozenset({"_assert", "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range"})
OTHERWISE = "what was recorded computes something else than the model"
KEPT = "what the model computes of parameters or buffers is a constant of the recording"


def normalise(model: nn.Module, inputs: tuple[Any, ...], front_ends: tuple[FrontEnd, ...] = FRONT_ENDS) -> OpGraph:
    """Record a model, which is left as it was, and bring it to normal form; the inputs' leading axis is the batch.

    Raises:
        CompileError: the model refuses the inputs, has hooks that change gradients, or no front end can record it.
    """
    model, inputs = positional(model, inputs)
    check_hooks(model, inputs)
    with unhooked(model):
        return _recorded(model, inputs, front_ends)


def _recorded(model: nn.Module, inputs: tuple[Any, ...], front_ends: tuple[FrontEnd, ...]) -> OpGraph:
    reference, kept = watch(model, inputs)
    refusals: list[Untraceable] = []
    for front_end in _asked(front_ends, model, inputs, refusals):
        try:
            with untouched(model), torch.random.fork_rng():
                traced = front_end(model, inputs)
            for draws in (False, True):  # what the model draws and does not use moves what it draws after
                graph = masks_apart(_normal_form(traced, model, draws=draws))
                graph, output = run(graph, model, inputs)
                if agrees(output, reference):
                    with untouched(model):
                        if not reads_values(graph, model, inputs):
                            raise Untraceable(KEPT)
                    return find_mixing(find_layouts(replace(graph, kept=kept), model, inputs), model, inputs)
        except Untraceable as refusal:
            refusals.append(refusal.apart())
            continue
        why = OTHERWISE
        if front_end is trace_derivatives:
            why += ": torch's own third derivatives of a fused operation, of layer_norm say, are wrong; write it out"
        refusals.append(Untraceable(why))
    if any(word in refusal.why for refusal in refusals for word in (OTHERWISE, "autocast")):
        region = refused_region(model, inputs)
        if region is not None:
            raise region
    raise _cannot(refusals)


def _asked(
    front_ends: tuple[FrontEnd, ...], model: nn.Module, inputs: tuple[Any, ...], refusals: list[Untraceable]
) -> Iterator[FrontEnd]:
    """Front ends in order, each asked for after the one before has refused."""
    for front_end in front_ends:
        if front_end is trace_export and trace_symbolically in front_ends:
            with untouched(model):
                derives = differentiates(model, inputs)
            if derives:
                refusals.clear()
                yield trace_derivatives
                return
        if front_end is trace_functional and any(r.why.startswith("torch.export:") for r in refusals):
            continue  # it starts from torch.export's own recording
        yield front_end


def still_holds(graph: OpGraph, model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether a recording is right for other inputs than it was made with.

    torch.fx refuses whatever depends on sizes, so its recordings hold for all; torch.export builds sizes in, and may
    have followed a path that other batch sizes do not take: it is run beside the model again.

    Raises:
        CompileError: the model refuses the inputs.
    """
    names = inputs.names if isinstance(inputs, Named) else argument_names(model, len(inputs))
    if names != graph.inputs:
        return False
    if graph.frontend == "fx":
        return True
    examples = [graph.by_name[name] for name in graph.inputs]
    pairs = list(zip(examples, inputs, strict=True))
    if any(op.dtype != value.dtype or (op.shape or ())[1:] != tuple(value.shape[1:]) for op, value in pairs):
        return False
    if all(op.shape == tuple(value.shape) for op, value in pairs):
        return True
    if graph.specialised or graph.batch == 1:  # one sample does not tell where samples lie and whether they mix
        return False
    model, inputs = positional(model, inputs)
    with untouched(model), unhooked(model):
        reference = observe(model, inputs)
    try:
        return agrees(run(graph, model, inputs)[1], reference)
    except Untraceable:
        return False


def _cannot(refusals: list[Untraceable]) -> CompileError:
    first = next((r for r in refusals if r.source), refusals[0])
    rest = "; ".join(dict.fromkeys(r.why for r in refusals if r.why != first.why))
    return first.refusal(
        f"the model cannot be recorded: {first.why}" + (f" (then: {rest})" if rest else ""),
        "Replace decisions on tensor values by torch.where, numpy calls by torch's, what float() and math make of "
        "values by .item() and torch's functions, and keep the forward pass free of side effects",
    )


# --- the rewrite ------------------------------------------------------------------------------------------------------


def _normal_form(traced: Traced, model: nn.Module, *, draws: bool) -> OpGraph:
    """``draws``: operations that draw random numbers live, even if nothing reads what they compute."""
    cleaned, output = functionalise(traced)
    names = _Names()
    ops = [Op(names.own(name), "input", None) for name in argument_names(model, len(traced.inputs))]
    value: dict[str, Any] = {name: Ref(op.name) for name, op in zip(traced.inputs, ops, strict=True)}
    leaf_modules = {path for path, module in model.named_modules() if _is_torch_layer(module)}

    def resolve(leaf: Any) -> Any:
        return value[leaf.name] if isinstance(leaf, Ref) else leaf

    memory = {p.untyped_storage().data_ptr() for p in model.parameters() if p.layout == torch.strided}

    def constant(leaf: Any) -> Any:
        """A tensor in a parameter's memory is what it is now: a step writes there (and then the attribute is new)."""
        tensor = isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
        return leaf.clone() if tensor and leaf.untyped_storage().data_ptr() in memory else python_number(leaf)

    for clean in cleaned:
        args, kwargs = map_leaves((clean.form.args, clean.form.kwargs), resolve, constant)
        form = replace(clean.form, args=args, kwargs=kwargs)
        if form.kind in ASSERTIONS:
            continue
        if is_identity(form.kind, form.args, form.kwargs):
            value[clean.call.name] = form.args[0]
            continue
        op = _operation(replace(clean, form=form), names, leaf_modules)
        ops.append(op)
        value[clean.call.name] = Ref(op.name)
        if not clean.call.grad:
            name = names.new(op.module, DETACHED, leaf_modules)
            ops.append(Op(name, DETACHED, torch.detach, (Ref(op.name),), module=op.module, source=op.source))
            value[clean.call.name] = Ref(name)
    returned = pytree.tree_map(resolve, output)
    returned = pytree.tree_map(lambda leaf: _constant(leaf, model, names, ops), returned)
    kept = _alive(ops, returned, draws=draws)
    return OpGraph(
        tuple(op for op in ops if op.kind == "input" or op.name in kept),
        tuple(value[name].name for name in traced.inputs),
        returned,
        parameter_infos(model),
        traced.frontend,
        traced.specialised,
    )


def _constant(leaf: Any, model: nn.Module, names: _Names, ops: list[Op]) -> Any:
    """What is returned; a buffer, a frozen parameter or a constant as an operation of its own."""
    if not isinstance(leaf, ParamRef | BufferRef | torch.Tensor):
        return leaf
    if isinstance(leaf, ParamRef) and model.get_parameter(leaf.name).requires_grad:
        path, _, name = leaf.name.rpartition(".")
        raise CompileError(
            f"the model returns its parameter {leaf.name!r} as it is, which no sample has a part of",
            f"Return it once a sample, {name}.expand(len(x), *{name}.shape), and read a sample's own in the loss",
            module=path,
        )
    ops.append(Op(names.new("", "constant", set()), DETACHED, torch.detach, (leaf,)))
    return Ref(ops[-1].name)


def _operation(clean: Clean, names: _Names, layers: set[str]) -> Op:
    form, call = clean.form, clean.call
    _refuse_table(clean)
    advances = _advances(form.kind, form.args, form.kwargs)
    return Op(
        name=names.new(call.module, form.kind, layers), kind=form.kind, target=form.target, args=form.args,
        kwargs=form.kwargs, module=call.module, source=call.source, advances=advances,
        random=is_random(form.kind, form.args, form.kwargs),
    )  # fmt: skip


def _refuse_table(clean: Clean) -> None:
    """Embedding options that are no function of a sample: they rewrite the table, or depend on the whole batch."""
    form = clean.form
    if form.kind not in ("embedding", "embedding_bag"):
        return
    first = 3 if form.kind == "embedding" else 2 + (form.target is F.embedding_bag)
    order = ("max_norm", "norm_type", "scale_grad_by_freq")
    given = {**dict(zip(order, form.args[first:], strict=False)), **form.kwargs}
    for option in TABLES:
        if given.get(option) not in (None, False) and not isinstance(form.target, OpOverload):
            call = clean.call
            raise refused_table(option, module=call.module, operation=form.kind, source=call.source or None)


def _advances(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Buffers that a normalisation in training mode writes."""
    training = kwargs.get("training") if kind == "batch_norm" else kind == "instance_norm" and bool((*args, True)[5])
    if not training:
        return ()
    states = args[1:4] if kind == "batch_norm" else args[1:3]
    return tuple(state.name for state in states if isinstance(state, BufferRef))


def _is_torch_layer(module: nn.Module) -> bool:
    """A layer of torch's own without parts: its operation carries the module's name."""
    return type(module).__module__.startswith("torch.nn.modules") and next(module.children(), None) is None


def _alive(ops: list[Op], output: Any, *, draws: bool) -> frozenset[str]:
    """Operations that the output depends on; batch-norms in training mode live for their buffers, guards to check."""
    wanted = {leaf.name for leaf in iter_leaves(output) if isinstance(leaf, Ref)}
    for op in reversed(ops):
        if op.name in wanted or op.advances or op.kind == GUARD or (draws and op.random):
            wanted.add(op.name)
            wanted.update(op.operands)
    return frozenset(wanted)


class _Names:
    """Unique qualified names: a layer's own path, else the path of the module and the kind."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._taken: set[str] = set()

    def own(self, name: str) -> str:
        self._taken.add(name)
        return name

    def new(self, module: str, kind: str, layers: set[str]) -> str:
        base = module if module in layers else f"{module}.{kind}" if module else kind
        found = base
        while found in self._taken:
            self._count[base] = self._count.get(base, 0) + 1
            found = f"{base}_{self._count[base]}"
        return self.own(found)
