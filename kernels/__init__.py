"""Operators: each folder defines one in plain PyTorch (`reference.py`) and computes it faster (`triton.py`).

Operators know tensors only; parameters and layouts belong to `vitrail.layers`.
"""

from vitrail.kernels._common.flops import register_cpu_attention

register_cpu_attention()
