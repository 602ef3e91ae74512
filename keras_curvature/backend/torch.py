"""The contract on PyTorch: functions and loops, tensors, places, random numbers.

Nothing is compiled: functions run as they are called, and a loop is Python's. Next to
it is `torch_derivatives`.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import torch
from keras import tree
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from keras_curvature.backend.contract import Outline, Shape, Tensor
from keras_curvature.backend.host import free_memory as _free_on_host
from keras_curvature.backend.torch_derivatives import (
    detached,
    examine,
    gradient,
    hold_cotangent,
    record,
    twice_differentiable,
)

__all__ = [
    "KEEPS_RECORDINGS",
    "PRODUCTS_PER_PASS",
    "RUNS_UNCOMPILED",
    "array",
    "compiled",
    "current_trace",
    "examine",
    "fold_in",
    "function_of_variables",
    "gradient",
    "hold_cotangent",
    "is_tensor",
    "loop_range",
    "map_range",
    "normal",
    "num_replicas",
    "num_traces",
    "on",
    "outline",
    "place_of",
    "placed",
    "process",
    "random_state_at_rest",
    "record",
    "run_once",
    "signs",
    "sum_chunks",
    "sum_over_processes",
    "sum_range",
    "twice_differentiable",
    "values",
    "wide_float",
]

#: Those of several batches share the graph of each: more of them would hold its memory
#: for longer and save little.
PRODUCTS_PER_PASS = 4

#: `torch.utils.checkpoint` calls the layer again in the backward pass, when the values
#: that a `StatelessScope` gave to its variables are gone.
RECOMPUTES = False

#: A graph lives as long as somebody holds it.
KEEPS_RECORDINGS = True

#: Nothing is compiled in any case.
RUNS_UNCOMPILED = True

# Functions


class compiled:
    """See the contract: the function as it is, without graphs."""

    def __init__(self, function: Callable[..., Any], jit_compile: bool = False) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """What the function returns, computed now."""
        with torch.no_grad():
            return detached(self._function(*args))

    def traces(self) -> int:
        """Number of signatures compiled: none."""
        return 0


def run_once(function: Callable[..., Any], *args: Any) -> Any:
    """See the contract."""
    return compiled(function)(*args)


def num_traces() -> int:
    """See the contract."""
    return 0


def current_trace() -> int | None:
    """See the contract: the level of `torch.vmap`, whose tensors cannot leave it."""
    level: int | None = torch._C._functorch.maybe_current_level()
    return level


def function_of_variables(
    function: Callable[[], Tensor], variables: Sequence[Any]
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Refused: see the contract."""
    raise ValueError(
        "On PyTorch a loss must be a function of the parameters that it is "
        "differentiated by: loss_fn(parameters), which computes with the tensors that "
        "it is given (torch.func.functional_call makes one of a torch.nn.Module). "
        f"Received: a function without arguments and {len(list(variables))} variables."
    )


# Loops


def map_range(function: Callable[[Any], Tensor], count: int) -> Tensor:
    """See the contract.

    All at once, products of a small network take a quarter of the time. What
    `torch.vmap` cannot do (numbers drawn with a key that depends on the index,
    branches) runs one after the other.
    """
    if count > 1:
        with contextlib.suppress(*_NOT_AT_ONCE):
            return _at_once(function, 0, count)
    return loop_range(function, count)


#: An error of the function itself comes again, from the loop.
_NOT_AT_ONCE = (RuntimeError, TypeError, ValueError)


def _at_once(function: Callable[[Any], Any], start: int, stop: int) -> Any:
    return torch.vmap(function)(torch.arange(start, stop, device=_place()))


def loop_range(
    function: Callable[[Any], Tensor], count: int | Tensor, most: int | None = None
) -> Tensor:
    """See the contract."""
    del most
    return torch.stack([function(i) for i in range(int(count))])


def sum_range(
    function: Callable[[Any], list[Tensor]], count: int, at_once: int
) -> list[Tensor]:
    """See the contract."""

    def chunk(start: int) -> list[Tensor]:
        mapped = _at_once(function, start, min(start + at_once, count))
        return [part.sum(0) for part in mapped]

    total: list[Tensor]
    if min(at_once, count) > 1:
        with contextlib.suppress(*_NOT_AT_ONCE):
            total = _total(chunk(start) for start in range(0, count, at_once))
            return total
    total = _total(function(i) for i in range(count))
    return total


def sum_chunks(
    function: Callable[..., Any], arrays: Sequence[Tensor], rows: int
) -> Any:
    """See the contract."""
    return _total(
        function(*[a[start : start + rows] for a in arrays])
        for start in range(0, max(1, len(arrays[0])), rows)
    )


def _total(parts: Iterator[Any]) -> Any:
    total = next(parts)
    for part in parts:
        total = tree.map_structure(torch.add, total, part)
    return total


# Tensors and places


def is_tensor(x: Any) -> bool:
    """See the contract."""
    return isinstance(x, torch.Tensor)


def array(x: Any, dtype: str | None = None) -> Tensor:
    """See the contract."""
    x = x.value if isinstance(x, keras.Variable) else x
    # Arithmetic with a parameter would build a graph.
    x = x.detach() if isinstance(x, torch.nn.Parameter) else x
    return keras.ops.convert_to_tensor(x, dtype)


def values(variables: Iterable[Any]) -> list[Tensor]:
    """See the contract: copies, as PyTorch's parameters are assigned in place."""
    return [value.clone() for value in _present(variables)]


def _present(variables: Iterable[Any]) -> list[Tensor]:
    """What variables hold, as long as they are not assigned."""
    raw = (v.value if isinstance(v, keras.Variable) else v for v in variables)
    return [value.detach() for value in raw]


def reading(variables: Iterable[Any]) -> Callable[[], list[Tensor]]:
    """See the contract."""
    variables = list(variables)
    return lambda: values(variables)


def on_variables(
    function: Callable[..., Any], variables: Sequence[Any]
) -> Callable[..., Any]:
    """See the contract: without copies, since it is computed before it is assigned."""
    variables, plain = list(variables), compiled(function)

    def call(*args: Any) -> Any:
        new, result = plain(_present(variables), *args)
        for variable, value in zip(variables, new, strict=False):
            variable.assign(value)
        return result

    return call


def wide_float() -> str:
    """See the contract."""
    return "float32" if _place().type == "mps" else "float64"


def _place() -> torch.device:
    """The present place."""
    device: torch.device = keras.ops.convert_to_tensor(0).device
    return device


def place_of(variable: Any) -> torch.device | None:
    """See the contract: a device, `None` when unknown."""
    raw = variable.value if isinstance(variable, keras.Variable) else variable
    return raw.device if is_tensor(raw) else None


def on(place: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """See the contract: Keras' default device.

    PyTorch's own default is left alone, so that a user's function that makes tensors
    of its own does what it does elsewhere.
    """
    return contextlib.nullcontext() if place is None else keras.device(str(place))


def placed(x: Any, place: torch.device | None) -> Tensor:
    """See the contract."""
    if place is None and is_tensor(x):
        return x
    with on(place):
        return array(x)


def free_memory(place: torch.device | None) -> int | None:
    """See the contract."""
    place = place or _place()
    if place.type == "cpu":
        return _free_on_host()
    if place.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(place)
    # What PyTorch keeps for itself, and does not use now.
    kept = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    return int(free + kept)


def is_out_of_memory(error: BaseException) -> bool:
    """See the contract."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    told = "can't allocate memory" in text or "out of memory" in text
    return told and isinstance(error, RuntimeError)


def num_replicas() -> int:
    """See the contract."""
    return 1


def process() -> tuple[int, int] | None:
    """See the contract."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.get_rank(), distributed.get_world_size()


def sum_over_processes(x: Tensor) -> Tensor:
    """See the contract."""
    total = x.clone()
    torch.distributed.all_reduce(total)
    return total


# Blocks of entries

_OVER_BLOCKS = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}


#: Entries of a few tensors that fit into a processor's cache. Of 14 million entries,
#: mean and spread of four samples then take a fifth of the time.
_ENTRIES = 2**16


def by_entries(function: Callable[..., list[Tensor]], *tensors: Tensor) -> list[Tensor]:
    """See the contract: operations run one after the other, and each reads memory."""
    size = tensors[0].shape[-1] if tensors[0].ndim else 1
    if size <= _ENTRIES:
        return function(*tensors)
    results: list[Tensor] = []
    for start in range(0, size, _ENTRIES):
        part = slice(start, start + _ENTRIES)
        found = function(*(x[..., part] for x in tensors))
        if not start:
            results = [x.new_empty((*x.shape[:-1], size)) for x in found]
        for result, x in zip(results, found, strict=True):
            result[..., part] = x
    return results


def parts(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """See the contract."""
    return list(torch.split(x, list(sizes), dim=-1))


def over_blocks(kind: str, rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """See the contract."""
    blocks = [_OVER_BLOCKS[kind](part, dim=1) for part in parts(rows, sizes)]
    return torch.stack(blocks, dim=1)


def block_numbers(sizes: Sequence[int]) -> Tensor:
    """See the contract."""
    numbers = torch.arange(len(sizes), dtype=torch.int32, device=_place())
    return torch.repeat_interleave(
        numbers, torch.tensor(sizes, device=_place()), output_size=sum(sizes)
    )


# Random numbers


def random_state_at_rest() -> contextlib.AbstractContextManager[None]:
    """See the contract: on the host and in the present place."""
    place = _place()
    # Of others, such as Apple's, PyTorch does not hand out the state by device.
    devices = [place] if place.type == "cuda" else []
    rest: contextlib.AbstractContextManager[None] = torch.random.fork_rng(devices)
    return rest


def signs(shape: Sequence[int], key: Any, dtype: str) -> Tensor:
    """See the contract."""
    return 2 * torch.randint(0, 2, tuple(shape), **_drawn_with(key, dtype)) - 1


def normal(shape: Sequence[int], key: Any, dtype: str) -> Tensor:
    """See the contract."""
    return torch.randn(tuple(shape), **_drawn_with(key, dtype))


def _drawn_with(key: Any, dtype: str) -> dict[str, Any]:
    """How numbers are drawn: a generator seeded with the key, where and as what."""
    example = keras.ops.zeros((), dtype)
    generator = torch.Generator(example.device).manual_seed(_mixed(key, 0))
    return {"generator": generator, "dtype": example.dtype, "device": example.device}


def fold_in(key: Any, number: Any) -> Tensor:
    """See the contract: on the host, where generators are seeded."""
    mixed = _mixed(key, int(number) + 1)
    pair = [mixed >> 32, mixed & 0xFFFFFFFF]
    return torch.tensor(pair, dtype=torch.int64, device="cpu")


def _mixed(key: Any, number: int) -> int:
    """64 bits that look independent for each key and number.

    Each number is added to the state of SplitMix64 (Steele, Lea, Flood: Fast
    splittable pseudorandom number generators, OOPSLA 2014), whose output function
    then stirs it.
    """
    state = 0
    for part in (int(key[0]), int(key[1]), number):
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


# What results are computed from


def outline(function: Callable[..., Any], *args: Any) -> Outline:
    """See the contract: from one run, whose operations are watched.

    Of a branch that depends on numbers, only the one that is taken is seen.
    """
    # Copies, as arguments may share their memory.
    flat = [x.detach().clone() if is_tensor(x) else x for x in tree.flatten(args)]
    origins = _Origins()
    for position, x in enumerate(flat):
        if is_tensor(x):
            origins.add([x], 1 << position)
    with torch.no_grad(), _Reads(origins), origins:
        results = function(*tree.pack_sequence_as(args, flat))
    return Outline(
        tree.map_structure(_shape, results),
        tree.map_structure(
            lambda x: _positions(origins.of([x])) if is_tensor(x) else None, results
        ),
    )


def _shape(x: Any) -> Shape | None:
    if not is_tensor(x):
        return None
    return Shape(tuple(x.shape), keras.backend.standardize_dtype(x.dtype))


def _positions(bits: int) -> frozenset[int]:
    return frozenset(i for i in range(bits.bit_length()) if bits >> i & 1)


def computed_bytes(function: Callable[..., Any], *args: Any) -> int:
    """See the contract: from one run."""
    counted = _Computed()
    with torch.no_grad(), counted:
        function(*args)
    return counted.total


class _Computed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the memory of what operations return, if it is new.

    Attributes:
        total: in bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {_memory(x) for x in _flat((args, kwargs or {})) if is_tensor(x)}
        results = func(*args, **(kwargs or {}))
        for x in _flat(results):
            if is_tensor(x) and _memory(x) not in given:
                self.total += x.numel() * x.element_size()
        return results


_aten = torch.ops.aten

#: Operations that read the shape of a tensor and not what it holds.
_READ_SHAPES = {
    _aten.empty_like,
    _aten.full_like,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.new_full,
    _aten.new_ones,
    _aten.new_zeros,
    _aten.ones_like,
    _aten.rand_like,
    _aten.randint_like,
    _aten.randn_like,
    _aten.zeros_like,
}


class _Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which arguments tensors are computed from; a set of them is an integer.

    Every operation passes here, also those of backward passes. What is known is known
    of a tensor's memory: views and what autograd saves are other tensors with the
    same memory, and in-place operations change what it holds.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Any, int] = {}
        self._everywhere = 0

    def of(self, tensors: Iterable[Tensor]) -> int:
        """What any of the tensors is computed from."""
        bits = 0
        for tensor in tensors:
            # What Python made of numbers that it had read may be unknown.
            bits |= self._known.get(_memory(tensor), self._everywhere)
        return bits

    def add(self, tensors: Iterable[Tensor], bits: int) -> None:
        """Tensors are computed from these, besides what they were computed from."""
        for tensor in tensors:
            memory = _memory(tensor)
            self._known[memory] = self._known.get(memory, 0) | bits

    def read(self, bits: int) -> None:
        """Python has read numbers: all that follows may depend on them."""
        self._everywhere |= bits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        reads = func.overloadpacket not in _READ_SHAPES
        given = _flat((args, kwargs)) if reads else []
        bits = self._everywhere | self.of(x for x in given if is_tensor(x))
        results = func(*args, **kwargs)
        flat = _flat(results)
        # Some operations return nothing, but write to an argument.
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                flat += _flat(args[i] if i < len(args) else kwargs.get(argument.name))
        self.add((x for x in flat if is_tensor(x)), bits)
        if any(isinstance(x, (bool, int, float, complex)) for x in _flat(results)):
            self.read(bits)
        return results


def _flat(x: Any) -> list[Any]:
    """What lists, tuples and dictionaries hold, quicker than `keras.tree`."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, (list, tuple)):
        return [leaf for part in x for leaf in _flat(part)]
    return [x]


def _memory(tensor: Tensor) -> Any:
    """What tells the memory of a tensor from others; `None` for all sparse tensors."""
    if tensor.layout != torch.strided:
        return None
    # A weak reference keeps the address from being used again.
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class _Reads(TorchFunctionMode):
    """Notes numbers that are read without an operation."""

    _READS = (torch.Tensor.__array__, torch.Tensor.numpy, torch.Tensor.tolist)

    def __init__(self, origins: _Origins) -> None:
        super().__init__()
        self._origins = origins

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in self._READS:
            self._origins.read(self._origins.of(args[:1]))
        return func(*args, **(kwargs or {}))
