"""DOC"""

from vitrail.kernels.mlp.triton.backward import mlp_backward
from vitrail.kernels.mlp.triton.forward import mlp_forward

__all__ = ["mlp_backward", "mlp_forward"]
