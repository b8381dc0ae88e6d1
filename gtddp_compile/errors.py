"""The errors a user of the compiler has to know: one, and what a step says that cannot be made."""

from __future__ import annotations


class CompileError(ValueError):
    """The model, an input or an option cannot be compiled as asked.

    The message always has the same three parts: *where* (qualified module, operation, the user's source line),
    *why*, and *what to do*. Nothing is left half-compiled: the model is as it was.

    Args:
        why: one sentence, what is wrong.
        remedy: one sentence, what the user can do about it.
        module: qualified module path (``"layer1.0.conv1"``; ``""`` is the model itself), if known.
        operation: the operation as the user would write it (``"torch.add"``, ``"linear"``), if known.
        source: ``"file.py:12"``, the user's own line, if known.
    """

    def __init__(
        self, why: str, remedy: str, *, module: str | None = None, operation: str | None = None,
        source: str | None = None,
    ) -> None:  # fmt: skip
        self.why, self.remedy = why, remedy
        self.module, self.operation, self.source = module, operation, source
        super().__init__(self._message())

    def _message(self) -> str:
        where = []
        if self.module is not None:
            where.append(f"module {self.module!r}" if self.module else "the model itself")
        if self.operation:
            where.append(f"operation {self.operation}")
        if self.source:
            where.append(f"at {self.source}")
        head = f"{', '.join(where)}: " if where else ""
        return f"{head}{self.why.rstrip('.')}. {self.remedy.rstrip('.')}."

    def __reduce__(self) -> tuple[object, ...]:
        # ValueError's own pickling would call __init__ with the formatted message alone.
        return (_rebuild, (type(self), self.why, self.remedy, self.module, self.operation, self.source))


def _rebuild(
    kind: type[CompileError], why: str, remedy: str, module: str | None, operation: str | None, source: str | None
) -> CompileError:
    return kind(why, remedy, module=module, operation=operation, source=source)


class NonFiniteError(CompileError):
    """The loss, a gain or the update of a step is NaN or infinite; nothing has changed (option ``on_nonfinite``)."""
