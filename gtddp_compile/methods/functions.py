"""torch's losses that are functions, as the modules that call them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from torch import nn
from torch.nn import functional as F

MODULES: dict[Callable[..., Any], type[nn.Module]] = {
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.cross_entropy: nn.CrossEntropyLoss,
    F.huber_loss: nn.HuberLoss,
    F.kl_div: nn.KLDivLoss,
    F.l1_loss: nn.L1Loss,
    F.mse_loss: nn.MSELoss,
    F.multi_margin_loss: nn.MultiMarginLoss,
    F.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    F.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    F.nll_loss: nn.NLLLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.soft_margin_loss: nn.SoftMarginLoss,
}
"""Those whose options a module has by the same names and with the same defaults."""


def module_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The module of a function in the table that makes one number of a batch, or of a ``partial`` of one; anything else
    as it is, reduction "none" included, which is one loss a sample already.
    """
    function, options = (loss.func, loss.keywords) if isinstance(loss, partial) and not loss.args else (loss, {})
    kind = next((kind for known, kind in MODULES.items() if function is known), None)
    if kind is None or not options.keys() <= signature(kind).parameters.keys():
        return loss
    module = kind(**options)
    return loss if module.reduction == "none" else module
