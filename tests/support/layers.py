"""The order of the package's layers."""

from __future__ import annotations

ORDER = (
    "errors", "wording", "kernels", "pde", "terms", "graph", "algebra", "methods", "options", "lowering", "frontends",
    "passes", "runtime", "optimizer", "api", "tools", "__main__",
)  # fmt: skip


LAYERS = {name: height for height, name in enumerate(ORDER)}
