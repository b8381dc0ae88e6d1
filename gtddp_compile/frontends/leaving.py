"""Functions by which values leave tensors for Python, and who may not read so while a model is traced."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gtddp_compile.frontends.traced import Untraceable, users_line

TRUTH, WHOLE = ("__bool__", "is_nonzero"), ("__int__", "__index__")
READS = frozenset({*TRUTH, *WHOLE, "item", "__float__", "tolist", "equal", "allclose", "__contains__"})
"""Functions that make numbers of values."""
LEAVING = READS | {"__complex__", "numpy", "__array__", "__dlpack__"}


class Reads(TorchFunctionMode):
    """Refuses to read parameters and buffers that come by other ways than as attributes: what is not under trace is
    what it is now (``for p in self.parameters(): if p.norm() > 1``).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._moving = {id(value): value for value in (*model.parameters(), *model.buffers())}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse, or do it, and note what is computed of them."""
        given = [value for value in pytree.tree_leaves((args, kwargs)) if id(value) in self._moving]
        name = getattr(func, "__name__", "")
        if given and name in LEAVING:
            raise Untraceable("a value of parameters or buffers is read", source=users_line())
        result = func(*args, **(kwargs or {}))
        if given:
            found = args[:1] if name == "__setitem__" else pytree.tree_leaves(result)
            self._moving.update((id(value), value) for value in found if isinstance(value, Tensor))
        return result
