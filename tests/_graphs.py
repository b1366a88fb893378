"""What `torch.compile` makes of code, before anything is made of that."""

from __future__ import annotations

from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd


def keep_graphs() -> tuple[Any, list[list[str]]]:
    """A backend that runs graphs as they are, and a list of them: the names of what each calls, forward first."""
    graphs: list[list[str]] = []

    def keep(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=keep), graphs
