"""The section of an exported module about the loss: one number a sample, and the factor of its Hessian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError
from gtddp_compile.kernels import hessian
from gtddp_compile.lowering.instructions import Apply, Instruction
from gtddp_compile.methods.least import KNOWN
from gtddp_compile.methods.losses import Loss
from gtddp_compile.methods.terminal import factor_kind, rank_of
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.tools.export.carry import Luggage, carry_function, names_in, source_of
from gtddp_compile.tools.export.layout import double_quoted, lay_out
from gtddp_compile.tools.export.values import loss_arguments, value_text
from gtddp_compile.tools.page import page

OUTER = "OUTPUT_"
"""Named tuples that the model returns begin with it: no variable or function of the module does."""


def loss_text(program: UpdateProgram, luggage: Luggage) -> str:
    """``losses(outputs, targets)``, where it is asked for ``factors``, and named tuples that the model returns."""
    found = [*_named_tuples(program.graph.ops.output, luggage), _losses(program.compiled_for.loss, luggage)]
    for instruction in program.lowered.instructions:
        if instruction.function == "m.factors":
            found.append(_factors(program, instruction, luggage))
    return "\n\n\n".join(text.strip("\n") for text in found)


def _losses(loss: Loss, luggage: Luggage) -> str:
    if loss.is_absent:
        raise CompileError(
            f"the program came from a file that has only the name of its loss, {loss.name}",
            "Give the loss to compile_optimizer(model, program=program, loss=...) and export that program",
        )
    described = loss_arguments(loss)
    if described is not None:
        name, arguments = described
        given = ", ".join(f"{key}={value_text(value)}" for key, value in {**arguments, "reduction": "none"}.items())
        call = "\n".join(lay_out(double_quoted(f"LOSS = nn.{name}({given})")))
        known = KNOWN.get(type(loss.module)) if loss.module is not None else None
        if known is not None:
            luggage.take(known.__module__, "excess_of")
        least = "" if known is None else luggage.take(known.__module__, known.__name__)
        return page("export/loss.py.j2", loss=loss, name=name, call=call, carried="", least=least)
    if loss.function is None:
        raise CompileError(
            f"the loss {loss.name} is a module of its own, which cannot be written down",
            "Use one of torch's own losses, or a function in terms of torch",
        )
    name = carry_function(loss.function, luggage)
    return page("export/loss.py.j2", loss=loss, name=name, carried=luggage.pieces.pop(name))


def _factors(program: UpdateProgram, instruction: Instruction, luggage: Luggage) -> str:
    """The factor of the Hessian."""
    _, outputs, _, leaves = instruction.args
    kind = factor_kind(program.compiled_for.loss, one_output=len(leaves) == 1 and outputs == leaves[0])
    text = page("export/factors.py.j2", kind=kind, rank=rank_of(program.options.terminal_kind))
    luggage.take(kernels.__name__, "loss_gradient")
    for name in sorted(names_in(text) & set(source_of(hessian.__name__).definitions)):
        luggage.take(hessian.__name__, name)
    return text


# --- the model's output -----------------------------------------------------------------------------------------------


def _named_tuples(output: Any, luggage: Luggage) -> list[str]:
    kinds = dict.fromkeys(named_classes(output))
    names = [_exported_name(kind) for kind in kinds]
    if len(set(names)) < len(names):
        raise CompileError(
            f"the model returns different named tuples of one name, {', '.join(names)}", "Give them different names"
        )
    if kinds:
        luggage.needs("namedtuple", "collections", "namedtuple")
    return [
        "\n".join(lay_out(double_quoted(f"{name} = namedtuple({kind.__name__!r}, {value_text(kind._fields)})")))
        for name, kind in zip(names, kinds, strict=True)
    ]


def _exported_name(kind: type) -> str:
    return f"{OUTER}{kind.__name__}"


def named_classes(output: Any) -> list[Any]:
    """Classes of named tuples in an output, from outside in."""
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
        parts = zip(output._fields, output, values, strict=True)
        return Apply(_exported_name(type(output)), (), tuple((field, as_returned(o, v)) for field, o, v in parts))
    if isinstance(output, Mapping):
        return {key: as_returned(output[key], values[key]) for key in output}
    if isinstance(output, tuple | list):
        return type(output)(as_returned(o, v) for o, v in zip(output, values, strict=True))
    return values
