"""Plans: the steps of a recorded call, written as one Python function without a loop or a choice.

What a loop over the steps would look up at every call takes as long as the launches themselves. `Plan.code` shows the
function. For graphs, which call an operator with the same kinds over and over, a second one looks first whether its
arguments are of the plan's kind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import guards

from vitrail.kernels._common.kinds import lines_of_kind
from vitrail.kernels._common.launch import Starter
from vitrail.kernels._common.written import Answer, Names, compiled, text_of

_ALIGNMENT = 512  # bytes; PyTorch's allocator places tensors so, too
_empty_strided_cuda: Callable[..., Tensor] | None = getattr(guards, "_empty_strided_cuda", None)
# Where a call is replayed CUDA is initialised, to which `torch.cuda.current_device` sees each time.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

_writing = threading.Lock()  # of a function that shares another's objects


class Writer(Names):
    """Writes the function. The call's values are numbered by their places; `t5` is one, `p5` its address.

    Args:
        device: Of all that is allocated.
        n_given: The call's tensors are the first values.
    """

    def __init__(self, device: torch.device, n_given: int) -> None:
        super().__init__()
        self.device, self.n_given = device, n_given
        self.lines: list[str] = []
        self._variables: dict[int, str] = {}  # of values that do not have their own
        self._addresses: dict[int, tuple[str, int]] = {}  # a name, and bytes that are to be added

    def add(self, line: str) -> None:
        self.lines.append(line)

    def value(self, place: int) -> str:
        """A tensor."""
        return self._variables.get(place, f"t{place}")

    def keep(self, place: int, tensor: Tensor) -> None:
        """Makes a tensor the value of every call."""
        self._variables[place] = self.constant(tensor, "kept")

    def make_as(self, allocation: Allocation, view: View) -> None:
        """Makes a tensor in the shape in which a view shows it; the view is not needed then."""
        allocation.shape, allocation.strides = view.shape, view.strides
        self._variables[view.place] = self.value(allocation.place)

    def address(self, place: int, offset: int) -> str:
        """A tensor's address and some bytes more, as a launch takes it."""
        if place not in self._addresses:
            self._addresses[place] = f"p{place}", 0
            if place >= self.n_given:
                self.add(f"p{place} = t{place}.data_ptr()")
        name, start = self._addresses[place]
        return f"{name} + {start + offset}" if start + offset else name

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> str:
        """A new tensor on the current device, on GPUs made as compiled graphs do: past all of PyTorch's layers."""
        layout = f"{self.constant(tuple(shape))}, {self.constant(tuple(strides))}"
        if self.device.type == "cuda" and _empty_strided_cuda is not None:
            return f"{self.constant(_empty_strided_cuda, 'empty')}({layout}, {self.constant(dtype, 'dtype')})"
        options = f"dtype={self.constant(dtype, 'dtype')}, device={self.constant(self.device, 'device')}"
        return f"{self.constant(torch.empty_strided, 'empty')}({layout}, {options})"

    def add_scratch(self, allocations: Sequence[Allocation]) -> None:
        """Makes what launches alone read and write, which need no more than an address, parts of one tensor."""
        size = 0
        for allocation in allocations:
            self._addresses[allocation.place] = "scratch", size
            size += -(-allocation.n_bytes // _ALIGNMENT) * _ALIGNMENT
        if size:
            self.add(f"memory = {self.empty((size,), (1,), torch.uint8)}")
            self.add("scratch = memory.data_ptr()")

    def given_addresses(self) -> list[str]:
        """Lines that take the addresses of the call's tensors that launches read."""
        return [f"p{place} = t{place}.data_ptr()" for place in self._addresses if place < self.n_given]


class Allocation:
    """Makes a contiguous tensor."""

    def __init__(self, made: Tensor, place: int) -> None:
        self.place = place
        self.shape, self.strides, self.dtype, self.n_bytes = made.shape, made.stride(), made.dtype, made.nbytes

    def write(self, writer: Writer) -> None:
        writer.add(f"t{self.place} = {writer.empty(self.shape, self.strides, self.dtype)}")


class View:
    """Shows a part of another tensor's memory; however many views lie between the two, it is one."""

    def __init__(self, root: Tensor, root_place: int, view: Tensor, place: int) -> None:
        self.root_place, self.place = root_place, place
        self.shape, self.strides = view.shape, view.stride()
        self.offset = view.storage_offset() - root.storage_offset()
        self.shows_all = view.is_contiguous() and view.numel() == root.numel() > 0

    def write(self, writer: Writer) -> None:
        root, layout = writer.value(self.root_place), f"{writer.constant(self.shape)}, {writer.constant(self.strides)}"
        start = f", {root}.storage_offset() + {self.offset}" if self.offset else ""
        writer.add(f"t{self.place} = {root}.as_strided({layout}{start})")


class Operation:
    """Calls an operator of PyTorch.

    Args:
        func: The operator.
        args: Its arguments.
        kwargs: Those by name, none of which is a value of the call.
        given: Places of the values among the arguments, by their positions.
        places: Of the results.
        several: Whether it returns a sequence.
    """

    def __init__(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        given: dict[int, int],
        places: Sequence[int],
        several: bool,
    ) -> None:
        self.func, self.kwargs, self.given, self.places, self.several = func, kwargs, given, places, several
        self.args = [None if position in given else arg for position, arg in enumerate(args)]

    def write(self, writer: Writer) -> None:
        given = [
            writer.value(self.given[position]) if position in self.given else writer.constant(arg)
            for position, arg in enumerate(self.args)
        ]
        given += [f"{name}={writer.constant(arg)}" for name, arg in self.kwargs.items()]
        results = ", ".join(f"t{place}" for place in self.places)
        call = f"{writer.constant(self.func, self.func._schema.name.rpartition(':')[2])}({', '.join(given)})"
        writer.add(f"[{results}] = {call}" if self.several else f"{results} = {call}")


class Launch:
    """Launches compiled code.

    Args:
        starter: How.
        grid: Numbers of programs, one to three.
        numbers: The kernel's parameters, anything in place of the addresses.
        addresses: Of these the position, the place of the tensor, and the bytes to be added.
    """

    def __init__(
        self, starter: Starter, grid: tuple[int, ...], numbers: list[Any], addresses: list[tuple[int, int, int]]
    ) -> None:
        self.starter, self.grid, self.numbers, self.addresses = starter, grid, numbers, addresses

    def write(self, writer: Writer) -> None:
        parameters = [writer.constant(number) for number in self.numbers]
        for position, place, offset in self.addresses:
            parameters[position] = writer.address(place, offset)
        before = [
            *map(writer.constant, (*self.grid, 1, 1)[:3]), "stream", *map(writer.constant, self.starter.before)
        ]  # fmt: skip
        given = ", ".join(parameters)
        given = f"({given},)" if self.starter.packs_parameters else given
        writer.add(f"{writer.constant(self.starter.start, 'launch')}({', '.join(before)}, {given})")


Step = Allocation | View | Operation | Launch


class Plan:
    """How a call is repeated.

    Args:
        writer: Has written the steps.
        results: Places of the results, or of the only one.
    """

    def __init__(self, writer: Writer, results: Sequence[int] | int) -> None:
        self.device = writer.device
        if isinstance(results, int):
            found = writer.value(results)
        else:
            found = f"({''.join(f'{writer.value(place)}, ' for place in results)})"
        given = ", ".join(f"t{place}" for place in range(writer.n_given))
        self._for_kind: Answer | bool | None = False  # not written yet
        self._writer, self._steps = writer, [*writer.lines, f"return {found}"]
        self.code = text_of("repeat", "tensors", [f"[{given}] = tensors", *writer.given_addresses(), *self._steps])
        self._repeat = compiled(self.code, writer.objects)

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Repeats the call with other tensors of the same kind."""
        if self.device.index != _current_device():
            with torch.cuda.device(self.device):
                return self._repeat(tensors)
        return self._repeat(tensors)

    def for_kind_of(self, arguments: Sequence[Any]) -> Answer | None:
        """A function that repeats the call if it is given all arguments of one of this kind; see `lines_of_kind`.

        It returns None where another device is the current one, too.

        Args:
            arguments: Of a call of this plan's kind.

        Returns:
            None if the arguments hold what it could not recognise.
        """
        with _writing:
            if isinstance(self._for_kind, bool):
                self._for_kind = self._write_for_kind(arguments)
            return self._for_kind

    def _write_for_kind(self, arguments: Sequence[Any]) -> Answer | None:
        lines = lines_of_kind(arguments, self._writer.constant)
        if lines is None:
            return None
        device = f"if {self._writer.constant(_current_device, 'device')}() != {self.device.index}: return None"
        return compiled(text_of("repeat_if_alike", "arguments", [*lines, device, *self._steps]), self._writer.objects)
