"""How a player's kernels are called: rule, operands, options, decided once per player at compile time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gtddp_compile import kernels
from gtddp_compile.graph import LEADING, BufferRef, ControlGraph, Layout, Op, ParamRef, Player, Ref, map_leaves
from gtddp_compile.lowering.layers import Rule, choose
from gtddp_compile.lowering.layers.generic import GenericRule
from gtddp_compile.lowering.layers.table import EmbeddingRule, ShiftRule


@dataclass(frozen=True)
class Use:
    """One use of a player's parameters.

    Attributes:
        op: name of the operation.
        key: unique name of this use: the operation's, with the player's if several players use it.
        rule: its layer rule.
        operands: tensors the kernels take besides the gradient.
        params: parameters in the kernels' order, ``None`` where absent.
        wants: which of them this player owns.
        names: the owned ones, in the kernels' order.
        options: literal options of the kernels.
        function: for the generic rule, name of the generated function; else ``None``.
        extras: values that function takes first (sizes).
        ops: for the generic rule, the operations it evaluates.
        layouts: where samples lie in the value and in each operand (``None``: all samples share it); empty if along the
            leading axis everywhere.
        behind: axis behind which the kernels want what a sample has of a folded axis: 1, or 2 after channels.
    """

    op: str
    key: str
    rule: Rule
    operands: tuple[Ref | BufferRef, ...]
    params: tuple[ParamRef | BufferRef | None, ...]
    wants: tuple[bool, ...]
    names: tuple[str, ...]
    options: Mapping[str, Any]
    function: str | None = None
    extras: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    layouts: tuple[Layout | None, ...] = ()
    behind: int = 1

    @property
    def arrangement(self) -> tuple[tuple[int, str, int] | None, ...]:
        """``layouts`` as kernels take them, their orders left out."""
        return tuple(None if layout is None else (layout.axis, layout.fold, self.behind) for layout in self.layouts)


def describe_use(graph: ControlGraph, player: Player, op: Op) -> Use:
    """Choose the rule of one use and collect what its kernels are called with."""
    owned = frozenset(player.parameters)
    through = _feeding(graph, player, op)
    if through:
        return _generic_use(graph, player, op, through)
    rule = choose(op, owned)
    if isinstance(rule, GenericRule) or not _suits(graph, rule, op):
        return _generic_use(graph, player, op, ())
    params = tuple(rule.roles(op))
    wants = tuple(isinstance(param, ParamRef) and param.name in owned for param in params)
    names = tuple(param.name for param, want in zip(params, wants, strict=True) if want and param is not None)
    key = use_key(graph, player, op.name)
    use = Use(op.name, key, rule, tuple(rule.operands(op)), params, wants, names, dict(rule.options(op)))
    return _with_layouts(graph, use, (True,) * (1 if rule.prepare else len(use.operands)))


def _suits(graph: ControlGraph, rule: Rule, op: Op) -> bool:
    """What a rule cannot see: whether samples look up rows of their own; whether all have the same added.

    Wherever samples lie, one number for each entry of the last axis may be added; otherwise they must lead, and what is
    added has no axis as long as theirs.
    """
    if isinstance(rule, EmbeddingRule):
        keys = graph.op(rule.operands(op)[0].name)
        return keys.name in graph.ops.fed and _has_samples(keys, graph.ops.batch or 0)
    if not isinstance(rule, ShiftRule):
        return True
    (value,), (own,), shape = rule.operands(op), rule.roles(op), op.shape or ()
    assert own is not None  # ``handles`` has seen it
    added = graph.ops.parameter_info[own.name].shape
    leads = op.samples == LEADING and graph.op(value.name).samples == LEADING
    apart = len(added) < len(shape) or (len(added) == len(shape) and added[0] == 1)
    return graph.op(value.name).shape == shape and (added == shape[-1:] or (leads and apart))


def _with_layouts(graph: ControlGraph, use: Use, batched: tuple[bool, ...]) -> Use:
    """The use with the layouts of its value and operands, where they are not all plain.

    What a rule prepares (a normalised input) lies as the value does.
    """
    refs = (Ref(use.op), *((Ref(use.op),) if use.rule.prepare else use.operands))
    layouts = tuple(
        graph.op(ref.name).samples if split and isinstance(ref, Ref) else None
        for ref, split in zip(refs, (True, *batched), strict=True)
    )
    if all(layout in (None, LEADING) for layout in layouts):
        return use
    return replace(use, layouts=layouts, behind=2 if graph.op(use.op).kind in use.rule.channels_first else 1)


def arranged_shape(graph: ControlGraph, use: Use, name: str) -> tuple[int, ...] | None:
    """Shape of a value as the kernels see it: samples leading; what a convolution has of each beside it last."""
    op = graph.op(name)
    if not use.layouts or not op.shape:
        return op.shape
    batch = graph.ops.batch or op.shape[0]
    shape = op.samples.sample_shape(op.shape, batch)
    if use.rule.prefix == "conv" and op.samples.fold:
        shape = (*shape[1:], shape[0])
    return (batch, *shape)


def use_key(graph: ControlGraph, player: Player, op: str) -> str:
    """A unique name of a player's use of an operation."""
    return op if len(graph.player_using.get(op, ())) < 2 else f"{op} of {player.name}"


def _feeding(graph: ControlGraph, player: Player, op: Op) -> tuple[str, ...]:
    """The player's parameter expressions that the operation reads, directly or through others, in order."""
    needed = graph.with_expressions((op.name,))
    return tuple(name for name in needed if name in player.expressions and name != op.name)


def _generic_use(graph: ControlGraph, player: Player, op: Op, through: tuple[str, ...]) -> Use:
    """Differentiate the operation, and the parameter expressions before it, as one function of parameters and
    values.
    """
    ops = (*through, op.name)
    choose(op, frozenset(player.parameters))  # refuses what no rule can differentiate twice (randomness, buffers)
    leaves = [leaf for name in ops for leaf in graph.op(name).leaves]
    inner = set(ops)
    refs = tuple(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Ref | BufferRef) and leaf.name not in inner))
    operands = tuple(ref for ref in refs if isinstance(ref, BufferRef) or graph.op(ref.name).is_tensor)
    extras = tuple(ref.name for ref in refs if isinstance(ref, Ref) and not graph.op(ref.name).is_tensor)
    params = tuple(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, ParamRef)))
    owned = set(player.parameters)
    wants = tuple(param.name in owned for param in params)
    names = tuple(param.name for param in params if param.name in owned)
    batch = graph.ops.batch or (op.shape[0] if op.shape else 0)
    batched = tuple(
        isinstance(ref, Ref) and ref.name in graph.ops.fed and _has_samples(graph.op(ref.name), batch)
        for ref in operands
    )
    routed = any(isinstance(ref, Ref) and graph.op(ref.name).samples.order for ref in operands)
    whole = op.mixes_samples or bool(extras) or not any(batched) or routed
    options: dict[str, Any] = {"batched": batched, "mixes": whole}
    options |= {"onednn": False} if op.kind == "recurrent" else {}
    key = use_key(graph, player, op.name)
    use = Use(op.name, key, GenericRule(), operands, params, wants, names, options, "player", extras, ops)
    use = _with_layouts(graph, use, batched)
    if key not in graph.tried:
        graph.tried[key] = probe_generic(graph, use)
    return replace(use, options=graph.tried[key])


def _has_samples(op: Op, batch: int) -> bool:
    """Whether the operation can be evaluated on some samples of this operand alone."""
    return bool(op.shape) and op.samples.order is None and op.samples.fits(op.shape or (), batch)


def _evaluate(graph: ControlGraph, use: Use, params: tuple[torch.Tensor, ...], *operands: torch.Tensor) -> Any:
    """The use as a function of its parameters, as the generated code has it."""
    values: dict[Any, Any] = dict(zip(use.operands, operands, strict=True))
    values.update(zip(use.params, params, strict=True))
    for name in use.ops:
        op = graph.op(name)
        assert op.target is not None
        args, kwargs = map_leaves((op.args, dict(op.kwargs)), values.__getitem__)
        values[Ref(name)] = op.target(*args, **kwargs)
    return values[Ref(use.op)]


def _repeats(graph: ControlGraph, use: Use, samples: int) -> bool:
    """Whether an operand that samples share may be as long as the batch: a mask repeated for every sample, say."""
    shared = (ref for ref, own in zip(use.operands, use.options["batched"], strict=True) if not own)
    shapes = [graph.op(ref.name).shape for ref in shared if isinstance(ref, Ref)]
    return any(shape and shape[0] > 1 and shape[0] % samples == 0 for shape in shapes)


NO_FORWARD_MODE = frozenset({"scaled_dot_product_attention"})
"""Kinds for which torch has no forward-mode derivative on every device and shape."""
LARGEST_TRIAL = 2**22
"""Elements of ``γ`` up to which a player is tried: beyond, it is some table or matrix of torch's own."""


def probe_generic(graph: ControlGraph, use: Use) -> Mapping[str, Any]:
    """Options of the generic kernels: their faster ways are tried on random tensors of the traced shapes.

    Players that read buffers or sizes (unknown to the graph), very large ones, and those that take no random values are
    not tried.
    """
    samples = graph.ops.batch or (graph.op(use.op).shape or (1,))[0]
    sizes = sum(math.prod(graph.ops.parameter_info[name].shape) for name in use.names)
    unknown = use.extras or any(isinstance(ref, BufferRef) for ref in (*use.operands, *use.params))
    found = None if unknown or samples * sizes > LARGEST_TRIAL else _tried(graph, use, samples)
    if found is None:
        unsure = any(graph.op(name).kind in NO_FORWARD_MODE for name in use.ops)
        reverse = {"forward_mode": False} if unsure else {}
        return {**use.options, "mixes": use.options["mixes"] or _repeats(graph, use, samples), **reverse}
    return {**use.options, **found}


def _tried(graph: ControlGraph, use: Use, samples: int) -> Mapping[str, Any] | None:
    """Which faster ways agree; ``None`` if the player takes no random values: a table with one row, sizes of a mask."""
    for highest in (1, 0):
        try:
            return _trial(graph, use, samples, highest)
        except (IndexError, RuntimeError):
            continue
    return None


def _trial(graph: ControlGraph, use: Use, samples: int, highest: int) -> Mapping[str, Any]:
    """Which faster ways agree. Whole numbers are drawn up to ``highest``: equal ones would not tell samples apart."""
    generator = torch.Generator().manual_seed(0)

    def sample(shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        if dtype is not None and not dtype.is_floating_point:
            return torch.randint(0, highest + 1, shape, generator=generator).to(dtype)
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype or torch.float32)

    values = [graph.op(ref.name) for ref in use.operands]
    info = [graph.ops.parameter_info[ref.name] for ref in use.params if ref is not None]
    operands = tuple(sample(value.shape or (), value.dtype) for value in values)
    params = tuple(sample(parameter.shape, parameter.dtype) for parameter in info)
    op = graph.op(use.op)
    g = sample(op.shape or (), op.dtype)
    function: Callable[..., torch.Tensor] = partial(_evaluate, graph, use)
    if use.layouts:
        output, *rest = use.arrangement
        assert output is not None
        function = kernels.arranged(function, samples, output, tuple(rest))
        operands = kernels.apart_all(operands, samples, tuple(rest))
        g = kernels.apart(g, samples, *output)
    how = kernels.Operation(function, **use.options)
    return kernels.generic_probe(kernels.Layer(operands, g, params, use.wants, how))
