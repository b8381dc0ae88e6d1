"""The section of an exported module about the loss: one number a sample, and the factor of its Hessian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError
from gtddp_compile.kernels import hessian
from gtddp_compile.lowering.instructions import Code, Instruction, render
from gtddp_compile.methods.losses import Loss
from gtddp_compile.methods.terminal import factor_kind, rank_of
from gtddp_compile.tools.export.carry import Luggage, carry_function
from gtddp_compile.tools.export.layout import double_quoted, lay_out
from gtddp_compile.tools.export.parts import Parts
from gtddp_compile.tools.export.values import loss_arguments, value_text

CLASSES = ("CrossEntropyLoss", "NLLLoss")
OUTER = "OUTPUT_"
"""Named tuples that the model returns begin with it: no variable or function of the module does."""


def loss_text(parts: Parts, luggage: Luggage) -> str:
    """``losses(outputs, targets)``, where it is asked for ``factors``, and named tuples that the model returns.

    Raises:
        CompileError: the loss, or the class of the model's output, cannot be written down.
    """
    found = [*_named_tuples(parts.graph.ops.output, luggage), *_losses(parts.setting.loss, luggage)]
    for instruction in parts.lowered.instructions:
        if instruction.function == "m.factors":
            found += _factors(parts, instruction, luggage)
    return "\n\n\n".join(found)


# --- the losses -------------------------------------------------------------------------------------------------------


def _losses(loss: Loss, luggage: Luggage) -> list[str]:
    if loss.is_absent:
        raise CompileError(
            f"the program came from a file that has only the name of its loss, {loss.name}",
            "Give the loss to compile_optimizer(model, program=program, loss=...) and export that program",
        )
    described = loss_arguments(loss)
    if described is not None:
        return _torchs(loss, *described)
    if loss.function is None:
        raise CompileError(
            f"the loss {loss.name} is a module of its own, which cannot be written down",
            "Use one of torch's own losses, or a function in terms of torch",
        )
    name = carry_function(loss.function, luggage)
    own = luggage.pieces.pop(name)
    doc = f'    """phi_i, shape (B,): {loss.name}."""'
    return [own, f"def losses(outputs, targets):\n{doc}\n    return {name}(outputs, targets)"]


def _torchs(loss: Loss, name: str, arguments: Mapping[str, Any]) -> list[str]:
    """One of torch's own, evaluated without reduction."""
    call = ", ".join(f"{key}={value_text(value)}" for key, value in {**arguments, "reduction": "none"}.items())
    given = "outputs[0], targets, outputs[1]" if name == "GaussianNLLLoss" else "outputs, targets"
    lines = [
        "def losses(outputs, targets):",
        f'    """phi_i, shape (B,), of nn.{name} with {loss.reduction} over samples."""',
        f"    elements = LOSS({given})",
    ]
    if loss.reduction != "mean" or loss.module.reduction == "batchmean":  # type: ignore[union-attr]
        lines += ["    return sample_sums(elements)"]
    elif name in CLASSES:
        lines += [
            "    return sample_sums(elements) * class_mean_scale(outputs, targets, LOSS.weight, LOSS.ignore_index)"
        ]
    else:
        lines += ["    return sample_means(elements)"]
    return ["\n".join(lay_out(double_quoted(f"LOSS = nn.{name}({call})"))), "\n".join(lines)]


# --- factors of the Hessian -------------------------------------------------------------------------------------------

_REFUSE = '''
def refuse_negative(values):
    """A Hessian with a negative eigenvalue has no factor."""
    lowest = clearly_negative(values)
    if lowest is not None:
        raise ValueError(f"the loss is not convex in the network's outputs here: eigenvalue {{lowest:.3g}}")
'''
_FACTORS = '''
def factors(phi, outputs, targets, leaves):
    """The gradient of phi_i and after it the columns of S, H = S S^T, for every output: (1 + r, B, ...)."""
    with torch.enable_grad():
{columns}
    gradients = loss_gradient(phi, leaves)
    return tuple(torch.cat([g.unsqueeze(0), z.detach()]) for g, z in zip(gradients, columns, strict=True))
'''
_COLUMNS = {
    "cross_entropy": ("columns = (cross_entropy_factor(losses, refuse_negative, outputs.detach(), targets, RANK),)",),
    "elementwise": ("columns = (elementwise_factor(losses, refuse_negative, outputs, targets, RANK),)",),
    "explicit": (
        "hessian = sample_hessian(losses, outputs, targets, tuple(leaves))",
        "if hessian is None:",
        '    raise ValueError("the loss is linear in the outputs: its Hessian is zero")',
        "columns = eigenvector_factor(hessian, refuse_negative, tuple(leaves), RANK)",
    ),
}


def _factors(parts: Parts, instruction: Instruction, luggage: Luggage) -> list[str]:
    _, outputs, _, leaves = instruction.args
    kind = factor_kind(parts.setting.loss, one_output=len(leaves) == 1 and outputs == leaves[0])
    columns = _COLUMNS[kind]
    luggage.take(kernels.__name__, "loss_gradient")
    for name in ("clearly_negative", "cross_entropy_factor", "elementwise_factor", "sample_hessian",
                 "eigenvector_factor"):  # fmt: skip
        if name == "clearly_negative" or any(f"{name}(" in line for line in columns):
            luggage.take(hessian.__name__, name)
    rank = rank_of(parts.options.terminal_kind)
    text = _FACTORS.format(columns="\n".join(f"        {line}" for line in columns))
    said = '"""Sampled columns of the terminal factor; None: all of them, the exact Hessian."""'
    return [f"RANK = {rank}\n{said}", _REFUSE.format().strip("\n"), text.strip("\n")]


# --- the model's output -----------------------------------------------------------------------------------------------


def _named_tuples(output: Any, luggage: Luggage) -> list[str]:
    kinds = dict.fromkeys(named_classes(output))
    names = [_exported_name(kind) for kind in kinds]
    if len(set(names)) < len(names):
        raise CompileError(
            f"the model returns different named tuples of one name, {', '.join(names)}", "Give them different names"
        )
    if kinds:
        luggage.imports.add("from collections import namedtuple")
    return [
        "\n".join(lay_out(double_quoted(f"{name} = namedtuple({kind.__name__!r}, {value_text(kind._fields)})")))
        for name, kind in zip(names, kinds, strict=True)
    ]


def _exported_name(kind: type) -> str:
    return f"{OUTER}{kind.__name__}"


def named_classes(output: Any) -> list[Any]:
    """Classes of named tuples in an output, from outside in.

    Raises:
        CompileError: the output has a class that is no plain tuple, list or dict, nor a named tuple.
    """
    if isinstance(output, Mapping):
        if type(output) is not dict:
            raise _no_class(output)
        return [kind for item in output.values() for kind in named_classes(item)]
    if isinstance(output, tuple | list):
        own = [type(output)] if _is_named(output) else []
        if not own and type(output) not in (tuple, list):
            raise _no_class(output)
        return own + [kind for item in output for kind in named_classes(item)]
    return []


def _is_named(output: Any) -> bool:
    return isinstance(output, tuple) and hasattr(output, "_fields")


def _no_class(output: Any) -> CompileError:
    return CompileError(
        f"the model returns a {type(output).__name__}, a class that an exported program does not have",
        "Return tensors in tuples, lists, dicts or named tuples",
    )


def as_returned(output: Any, values: Any) -> Any:
    """Variables in the shape of the model's output, with its named tuples built by the module's own."""
    if _is_named(output):
        inner = [
            f"{field}={render(as_returned(o, v))}" for field, o, v in zip(output._fields, output, values, strict=True)
        ]
        return Code(f"{_exported_name(type(output))}({', '.join(inner)})")
    if isinstance(output, Mapping):
        return {key: as_returned(output[key], values[key]) for key in output}
    if isinstance(output, tuple | list):
        return type(output)(as_returned(o, v) for o, v in zip(output, values, strict=True))
    return values
