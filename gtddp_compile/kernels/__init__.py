"""Kernels: pure functions of tensors, torch alone, whose source text an exported program carries with it.

Every public function of these modules can be called by generated code. The contract that layer kernels share is in
``gtddp_compile.lowering.layers.base``.
"""

from collections.abc import Callable
from typing import Any

from gtddp_compile.kernels.activations import *
from gtddp_compile.kernels.approximate import *
from gtddp_compile.kernels.arrange import *
from gtddp_compile.kernels.batch_norm import *
from gtddp_compile.kernels.bundle import *
from gtddp_compile.kernels.channels import *
from gtddp_compile.kernels.conv import *
from gtddp_compile.kernels.conv_pairs import *
from gtddp_compile.kernels.coordinates import *
from gtddp_compile.kernels.factors import *
from gtddp_compile.kernels.generators import *
from gtddp_compile.kernels.generic import *
from gtddp_compile.kernels.guard import *
from gtddp_compile.kernels.inplace import *
from gtddp_compile.kernels.kronecker import *
from gtddp_compile.kernels.layers import *
from gtddp_compile.kernels.linear import *
from gtddp_compile.kernels.loss import *
from gtddp_compile.kernels.moments import *
from gtddp_compile.kernels.norm import *
from gtddp_compile.kernels.nystrom import *
from gtddp_compile.kernels.patches import *
from gtddp_compile.kernels.rows import *
from gtddp_compile.kernels.spread import *
from gtddp_compile.kernels.sweep import *
from gtddp_compile.kernels.table import *
from gtddp_compile.kernels.transposed import *
from gtddp_compile.kernels.turned import *

KERNELS: dict[str, Callable[..., Any]] = {
    name: value
    for name, value in sorted(globals().items())
    if callable(value) and getattr(value, "__module__", "").startswith(f"{__name__}.") and not name.startswith("_")
}
"""By name."""
