"""Kernels: pure functions of tensors, torch alone, whose source text an exported program carries with it.

The contract that layer kernels share is in ``gtddp_compile.rules.base``.
"""

from gtddp_compile.kernels.conv import (
    conv_directional,
    conv_gram,
    conv_gram_diagonal,
    conv_gram_form,
    conv_per_sample,
    conv_weighted,
)
from gtddp_compile.kernels.generic import (
    generic_directional,
    generic_gram,
    generic_gram_diagonal,
    generic_per_sample,
    generic_probe,
    generic_weighted,
)
from gtddp_compile.kernels.linear import (
    linear_directional,
    linear_gram,
    linear_gram_diagonal,
    linear_gram_form,
    linear_per_sample,
    linear_weighted,
)
from gtddp_compile.kernels.norm import (
    norm_directional,
    norm_gram,
    norm_gram_diagonal,
    norm_per_sample,
    norm_prepare,
    norm_weighted,
)

__all__ = [
    "conv_directional",
    "conv_gram",
    "conv_gram_diagonal",
    "conv_gram_form",
    "conv_per_sample",
    "conv_weighted",
    "generic_directional",
    "generic_gram",
    "generic_gram_diagonal",
    "generic_per_sample",
    "generic_probe",
    "generic_weighted",
    "linear_directional",
    "linear_gram",
    "linear_gram_diagonal",
    "linear_gram_form",
    "linear_per_sample",
    "linear_weighted",
    "norm_directional",
    "norm_gram",
    "norm_gram_diagonal",
    "norm_per_sample",
    "norm_prepare",
    "norm_weighted",
]
