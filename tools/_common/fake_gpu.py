"""A training step on a GPU that is not there: every tensor has a shape, a dtype and a place in memory, and no data.

The step runs through PyTorch's own dispatcher under `FakeTensorMode` with tensors of the device "cuda", so that
autocast, the choice of operators and what autograd keeps are those of a GPU; `LiveStorages` sees every storage come
and go. Three things a machine without a GPU cannot do are done here: the choice of the attention that PyTorch fuses,
the launches of this package's Triton kernels (everything around them runs, workspaces included), and the order of the
backward pass, which PyTorch's engine refuses to work out for devices that it cannot find.
"""

from __future__ import annotations

import heapq
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vitrail.kernels._common.dispatch import HAS_TRITON
from vitrail.tools._common.gpu_allocator import Block, CachingAllocator

_aten = torch.ops.aten
_CUDA_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class LiveStorages(TorchDispatchMode):
    """Follows the storages of a device from their first tensor to their last.

    A storage counts once, however many views it has. Each carries the label that was current when it appeared.

    Args:
        device_type: Of the tensors that count; the others are left alone.

    Attributes:
        label: For storages that appear from now on.
        allocator: What they take of a GPU's memory.
        live: Bytes of the live storages by label, blocks as the allocator rounds them.
        peak: `live` at the moment of the highest sum.
        peak_at: The operator that reached it.
        flops: Floating-point operations so far, as `torch.utils.flop_counter` counts them. (Its own mode would hold on
            to the graph.)
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.label = ""
        self.allocator = CachingAllocator()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.peak_at = ""
        self.flops = 0
        self._highest = -1
        self._known: dict[int, tuple[str, Block | None, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flops = self.flops
        if func.namespace == "vitrail" and self.device_type == "cuda":
            with self:  # what its implementation for GPUs allocates counts
                result = func.redispatch(_CUDA_KERNELS, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flops = flops + flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        passing = [self.reserve(nbytes, "workspace", str(func)) for nbytes in _workspaces(func, args, result)]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device_type:
                self._see(leaf, str(func))
        for give_back in passing:
            give_back()
        return result

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Gives the storage of a tensor another label."""
        key = tensor.untyped_storage()._cdata
        old, block, reference = self._known[key]
        self._known[key] = label, block, reference
        if block is not None:
            self.live[old] -= block.size
            self.live[label] += block.size

    def exclude(self, tensor: Tensor) -> None:
        """Lets the storage of a tensor count no more."""
        key = tensor.untyped_storage()._cdata
        label, block, reference = self._known[key]
        self._known[key] = label, None, reference
        self._give_back(label, block)

    def reserve(self, nbytes: int, label: str, moment: str) -> Callable[[], None]:
        """Takes memory that belongs to no tensor; returns what gives it back."""
        block = self._take(nbytes, label, moment)
        return lambda: self._give_back(label, block)

    def reset_peak(self) -> None:
        """Forgets earlier peaks, as `torch.cuda.reset_peak_memory_stats` does."""
        self.allocator.peak_allocated = self.allocator.allocated
        self._highest = -1
        self._note_peak("")

    def _see(self, tensor: Tensor, moment: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def forget(_: Any) -> None:
            label, block, _reference = self._known.pop(key)
            self._give_back(label, block)

        block = self._take(storage.nbytes(), self.label, moment)
        self._known[key] = self.label, block, weakref.ref(storage, forget)

    def _take(self, nbytes: int, label: str, moment: str) -> Block | None:
        block = self.allocator.allocate(nbytes)
        if block is not None:
            self.live[label] += block.size
            self._note_peak(moment)
        return block

    def _give_back(self, label: str, block: Block | None) -> None:
        if block is not None:
            self.live[label] -= block.size
            self.allocator.release(block)

    def _note_peak(self, moment: str) -> None:
        if self.allocator.allocated > self._highest:
            self._highest = self.allocator.allocated
            self.peak = {label: size for label, size in self.live.items() if size}
            self.peak_at = moment


def _workspaces(func: Any, args: Any, result: Any) -> list[int]:
    """Bytes that an operator of PyTorch takes on a GPU besides its results, and gives back at its end.

    Copies of operands in the layout that cuDNN and cuBLAS want, and the sums of FlashAttention's backward. What cuDNN's
    convolutions ask for besides is not known without a GPU and left out.
    """
    if func is _aten.convolution.default:
        return _copies(args[:2], _map_format(result))
    if func is _aten.convolution_backward.default:
        found = [tensor for tensor in result[:2] if tensor is not None]
        return _copies(args[:3], _map_format(found[0])) if found else []
    if func.overloadpacket in (_aten.mm, _aten.bmm):
        return [_nbytes(x) for x in args[:2] if not _is_matrix(x)]
    if func is _aten._scaled_dot_product_flash_attention_backward.default:
        batch, heads, queries, dim = args[1].shape
        rows = batch * heads * (-(-queries // 128) * 128)
        return [4 * rows, 4 * rows * (-(-dim // 32) * 32)]
    return []


def _map_format(tensor: Tensor) -> torch.memory_format:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not tensor.is_contiguous() else torch.contiguous_format


def _copies(tensors: Any, layout: torch.memory_format) -> list[int]:
    return [_nbytes(x) for x in tensors if not x.is_contiguous(memory_format=layout)]


def _is_matrix(tensor: Tensor) -> bool:
    """Whether the last two dimensions are rows or columns without gaps between neighbours, as cuBLAS takes them."""
    (rows, columns), (down, along) = tensor.shape[-2:], tensor.stride()[-2:]
    return (along == 1 and down >= max(1, columns)) or (down == 1 and along >= max(1, rows)) or min(rows, columns) == 1


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Functions(TorchFunctionMode):
    """Sends `scaled_dot_product_attention` to the kernel that PyTorch chooses on a GPU, and keeps hold of Python nodes.

    FlashAttention takes half precision without a mask, the memory-efficient kernel nearly anything else; both keep the
    log-sum-exp of the rows and no weights. PyTorch itself would look at the GPU, and without one write the weights out.

    Nodes of the graph that are written in Python, as those of this package's operators, can be reached from Python only
    as long as a node behind them lives; a view has a node that keeps nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handles: dict[Any, Any] | None = {}

    def take_handles(self) -> dict[Any, Any]:
        """For every Python node a node that keeps it alive; there will be no more of them."""
        handles, self._handles = self._handles or {}, None
        return handles

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].is_cuda:
            return _attend(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if self._handles is not None and isinstance(result, Tensor) and _is_python(result.grad_fn):
            self._handles[result.grad_fn] = result.view_as(result).grad_fn
        return result


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    if query.dim() != 4 or any(x.stride(-1) != 1 for x in (query, key, value)):
        return _attend_unfused(query, key, value, attn_mask, dropout_p, is_causal, scale)
    dim, half = query.shape[-1], query.dtype in (torch.float16, torch.bfloat16)
    scale = dim**-0.5 if scale is None else scale
    if half and attn_mask is None and dim == value.shape[-1] and dim <= 256:
        query, key, value = (F.pad(x, (0, -dim % 8)) if dim % 8 else x for x in (query, key, value))
        out = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :dim]
    multiple = 8 if half else 4
    if dim % multiple or value.shape[-1] % multiple:
        return _attend_unfused(query, key, value, attn_mask, dropout_p, is_causal, scale)
    mask = None if attn_mask is None else _align_mask(attn_mask, query, key)
    keep = any(x.requires_grad for x in (query, key, value))
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, keep, dropout_p, is_causal, scale=scale
    )[0]


def _align_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask of logits whose rows start at multiples of 16 elements, as the kernel wants them."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf")).to(query.dtype)
    keys = mask.shape[-1]
    if keys % 16:
        mask = F.pad(mask, (0, -keys % 16))[..., :keys]
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


def _attend_unfused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    return _aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale
    )[0]


@contextmanager
def pretended_gpu(multiprocessors: int) -> Iterator[Functions]:
    """A block in which what asks for the GPU's properties, or launches a kernel on it, is content without one.

    Args:
        multiprocessors: Of the GPU; some kernels' workspaces grow with them.
    """
    properties = SimpleNamespace(multi_processor_count=multiprocessors, major=9, minor=0)
    with ExitStack() as stack:
        replace = lambda owner, name, new: stack.enter_context(mock.patch.object(owner, name, new))  # noqa: E731
        replace(torch.cuda, "get_device_properties", lambda *_: properties)
        replace(torch.cuda, "is_bf16_supported", lambda *_: True)
        replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        # Outside of PyTorch's engine there is no backward pass by whose number checkpoints know what they recomputed.
        replace(torch._C, "_current_graph_task_id", lambda: 0)
        # What is recomputed has the random numbers of the first time; here there are none.
        replace(torch.cuda, "_initialized", False)
        replace(
            sys.modules["torch.optim.adam"], "_get_value", lambda value: 1.0 if isinstance(value, Tensor) else value
        )
        if HAS_TRITON:
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction

            replace(JITFunction, "run", lambda *_, **__: None)
            replace(InterpretedFunction, "run", lambda *_, **__: None)
        yield stack.enter_context(Functions())


class Backward:
    """Runs a backward pass node by node, in the order and with the additions of PyTorch's engine.

    Nodes run in the reverse order of their making; a node's saved tensors go when it has run; gradients that meet are
    added in place where nothing else holds the first of them.

    Args:
        accumulate: Called with every parameter and its gradient, such as `accumulate` below.
        handles: Of Python nodes, see `Functions`; emptied as they run.
    """

    def __init__(self, accumulate: Callable[[Tensor, Tensor], None], handles: dict[Any, Any]) -> None:
        self._accumulate, self._handles = accumulate, handles
        self._waiting: dict[Any, int] = {}
        self._received: dict[Any, list[Tensor | None]] = {}
        self._ready: list[tuple[int, int, Any]] = []
        self._pushed = 0

    def run(self, losses: list[Tensor]) -> None:
        """The backward pass of the one scalar in a list.

        It is taken out: the graph goes node by node only where nothing holds on to its end, not even an argument.
        """
        loss = losses.pop()
        root = loss.grad_fn
        if root is None:
            raise ValueError("the loss depends on no parameter")
        self._count_dependencies(root)
        with torch.no_grad():
            self._received[root] = [torch.ones_like(loss)]
            self._push(root)
            del root, loss
            while self._ready:
                self._run_node(heapq.heappop(self._ready)[2])

    def _count_dependencies(self, root: Any) -> None:
        self._waiting[root] = 0
        found = [root]
        while found:
            for node, _ in found.pop().next_functions:
                if node is not None:
                    if node not in self._waiting:
                        self._waiting[node] = 0
                        found.append(node)
                    self._waiting[node] += 1

    def _push(self, node: Any) -> None:
        self._pushed += 1
        heapq.heappush(self._ready, (-_age(node), self._pushed, node))

    def _run_node(self, node: Any) -> None:
        del self._waiting[node]
        received = self._received.pop(node)
        if hasattr(node, "variable"):
            if received[0] is not None:
                self._accumulate(node.variable, received.pop())
            return
        edges = node.next_functions
        gradients = _call(node, received)
        self._handles.pop(node, None)
        del node, received  # and what it had saved
        gradients.reverse()
        for following, position in edges:
            gradient = gradients.pop()
            if following is not None:
                self._pass_on(following, position, gradient)
                self._waiting[following] -= 1
                if self._waiting[following] == 0:
                    self._push(following)
            del gradient

    def _pass_on(self, node: Any, position: int, gradient: Tensor | None) -> None:
        """Leaves a gradient with the node that it is for, in the dtype and shape of what that node had made."""
        made = _results_of(node)
        received = self._received.setdefault(node, [None] * max(len(made), 1))
        if gradient is None:
            return
        if made and gradient.dtype != made[position].dtype:
            gradient = gradient.to(made[position].dtype)
        if made and gradient.shape != tuple(made[position].shape):
            gradient = gradient.sum_to_size(made[position].shape)
        earlier, received[position] = received[position], None
        received[position] = gradient if earlier is None else _add(earlier, gradient)


def _age(node: Any) -> float:
    """When a node was made, in steps of PyTorch's count; Python's functions, which do not tell, after their inputs."""
    if not _is_python(node):
        return node._sequence_nr()
    inputs = [following for following, _ in node.next_functions if following is not None]
    return max((_age(one) for one in inputs if not hasattr(one, "variable")), default=0.0) + 0.5


def _results_of(node: Any) -> Any:
    """Dtypes and shapes of a node's results; nothing for functions written in Python, which have one result here."""
    return () if _is_python(node) else node._input_metadata


def _is_python(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _call(node: Any, received: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients for `next_functions`, in their order."""
    if not _is_python(node):
        found = node(*received)
        return list(found) if isinstance(found, tuple) else [found]
    found = node.apply(*received)
    found = found if isinstance(found, tuple) else (found,)
    wanted = [gradient for gradient, needed in zip(found, node.needs_input_grad, strict=True) if needed]
    wanted.reverse()
    return [None if following is None else wanted.pop() for following, _ in node.next_functions]


def _add(earlier: Tensor, later: Tensor) -> Tensor:
    alone = sys.getrefcount(earlier) <= 3 and not _has_views(earlier)  # the caller's name, ours, and the argument
    return earlier.add_(later) if alone and _is_dense(earlier) else earlier + later


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(pair for pair in zip(tensor.stride(), tensor.shape, strict=True) if pair[1] > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _has_views(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor and the Python object


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """What autograd does: the gradient becomes the parameter's own, or a copy in its layout, or is added to it."""
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif _has_layout_of(gradient, parameter):
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def _has_layout_of(gradient: Tensor, parameter: Tensor) -> bool:
    pairs = zip(gradient.stride(), parameter.stride(), parameter.shape, strict=True)
    return all(ours == theirs for ours, theirs, size in pairs if size > 1)
