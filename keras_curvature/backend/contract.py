"""What the rest of the package asks of an array framework.

Three twin modules, `tensorflow`, `jax` and `torch`, define the same names with the same
signatures; `keras_curvature.backend` is the one of them that Keras runs on. The
functions are described once, here.

Conventions:

* a *tensor* is an array of the framework; `keras.ops` works on it;
* a *point* is a dictionary of tensors, by any hashable names: what is differentiated
  by. A *direction* is a dictionary shaped like a part of a point;
* a *recorded function* takes a point and returns `(loss, taps)`: a scalar tensor and a
  dictionary of tensors that were met on the way;
* what is called *pure* depends on its arguments alone, so that it may be compiled.

| name | what it does |
|---|---|
| `compiled(function, jit_compile=False)` | the pure function of (nested) tensors, compiled once for each signature where the framework compiles; entries of `None` are allowed. An argument that is a Python integer says how often something is repeated: where the framework allows, other numbers are not compiled anew. `jit_compile` asks TensorFlow for XLA |
| `run_once(function, *args)` | what the pure function returns, in the way that is quickest where it is not called again: operation by operation, or with less care in compiling. Not for what has branches or loops that the framework would record as such |
| `on_variables(function, variables)` | a compiled function of `*args` that calls the pure `function(values, *args)` with the present values of the variables. That returns `(new, result)`: the first variables are assigned what is new, and the result, computed and none of the values as it is, is returned. All variables together cost little more than one |
| `num_traces()` | number of signatures compiled so far, of all functions |
| `outline(function, *args)` | an `Outline` of a pure function of (nested) tensors: shapes of its results and what they are computed from; entries and results of `None` are allowed, and names of arguments must have an order; runs nothing where the framework can tell without |
| `computed_bytes(function, *args)` | bytes of all tensors that the pure function computes on its way, of loops one step; runs nothing where the framework can tell without |
| `free_memory(place)` | bytes left in that place; `None` if unknown |
| `is_out_of_memory(error)` | whether an exception says that there was no memory left |
| `examine(function, point)` | `Findings` about the gradient of a recorded function |
| `gradient(function, point)` | `(loss, taps, {name: dense gradient})`, zeros where the loss does not depend on an entry |
| `record(function, point, last=())` | a `Recording`: derivatives that share one evaluation. What is named last is met at the end of the function, and products between such entries alone leave out what is before them |
| `hold_cotangent(x)` | `x`, behind which the gradient counts as a constant for the next derivative |
| `current_trace()` | what is being traced now, to compare with `is`/`==`: the body of a loop is a trace of its own, whose tensors cannot leave it |
| `twice_differentiable()` | context in which second derivatives are right: around tracing *and* running |
| `map_range(function, count)` | the tensors `function(i)` for `i < count`, all at once where that can be, stacked along a new first axis |
| `loop_range(function, count, most=None)` | the same, one after the other: the memory of one. `count` may be a tensor where a dimension varies from call to call; with `most`, which it does not exceed, anywhere, and rows beyond `count` may follow, of which nothing is said |
| `sum_range(function, count, at_once)` | `Σ_i function(i)`, `at_once` of them together; `function` returns a list of tensors, and must return zeros for `i ≥ count`, which the last pass may reach |
| `sum_chunks(function, arrays, rows)` | `Σ function(*chunks)` over chunks of that many rows of all arrays |
| `by_entries(function, *tensors)` | `function(*tensors)`, a list of tensors, where each entry along their last axis, which all have in common, depends on the same entry of the tensors alone: a few at a time where nothing puts operations together |
| `parts(x, sizes)` | the blocks of the entries along the last axis of `x`, of these sizes, as a list |
| `over_blocks(kind, rows, sizes)` | `(k, V)`: the `"sum"`, `"max"` or `"min"` of each of V consecutive blocks of the entries of `rows`, `(k, P)`; sums along many entries as exact as the framework's are along the last axis |
| `block_numbers(sizes)` | `(P,)`, `int32`: the number of the block that each entry is in |
| `signs(shape, key, dtype)` | independent random signs ±1 |
| `normal(shape, key, dtype)` | independent standard normal numbers |
| `fold_in(key, number)` | another key for each number |
| `array(x, dtype=None)` | `x` as a tensor, in the present place |
| `is_tensor(x)` | whether `x` is a tensor of the framework |
| `values(variables)` | the current values of variables, as tensors |
| `reading(variables)` | a function without arguments that gives them, at any time, faster |
| `random_state_at_rest()` | context after which the framework's global random state is what it was. TensorFlow's cannot be put back, and `examine` tells of what draws from it |
| `wide_float()` | name of the widest floating type the framework computes in now |
| `place_of(variable)` | where it lives: opaque, for `on` and `placed` |
| `on(place)` | context in which new tensors are made there; `None` for anywhere |
| `placed(x, place)` | `x` as a tensor in that place; spread over the devices as `fit` spreads its data where a distribution says so |
| `num_replicas()` | by what Keras divides a loss in the present scope, or 1 |
| `process()` | the number of this process and of all that were set up to work together; `None` unless the framework lets each have data of its own |
| `sum_over_processes(x)` | the sum of what all of them pass, the same in each |
| `RECOMPUTES` | whether gradient checkpointing computes anew what it computed before, with the values that it had |
| `KEEPS_RECORDINGS` | whether a `Recording` outlives the compiled function that it was made in |
| `RUNS_UNCOMPILED` | whether `run_once` compiles nothing at all |
| `PRODUCTS_PER_PASS` | how many products are worth recording once for |
| `flatten(structure)` | the arrays in a nested structure as its users nest them, and a function that puts others in their place |
| `function_of_variables(function, variables)` | the scalar `function()`, which reads variables of the framework, as a function of the list of their values: the variables themselves, or tensors in their place, by which it can be differentiated once. TensorFlow alone can; elsewhere a `ValueError` asks for a function of the parameters |

A *key* is what random numbers are drawn with: a pair of integers (`array([a, b],
"int32")`), or what `fold_in` made of one; it may be an argument of a compiled function.
Every draw is a function of its key, shape and type alone: no random state is read or
written. Numbers given to `map_range` and its relatives are scalar integer tensors or
integers.
"""  # noqa: E501

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

Tensor: TypeAlias = Any
#: Anything hashable.
Name: TypeAlias = Any
Direction: TypeAlias = Mapping[Name, Tensor]


class Shape(NamedTuple):
    """Shape and type of a tensor; a dimension that varies is `None`."""

    shape: tuple[int | None, ...]
    dtype: str


class Outline(NamedTuple):
    """What is known of a function's results before it runs.

    Attributes:
        shapes: structured like the results, a `Shape` for each tensor.
        origins: structured like the results, for each tensor the `frozenset` of the
            positions, in `keras.tree.flatten(args)`, of those it is computed from.
            Integers and stopped gradients count, shapes do not. May name too many,
            never too few.
    """

    shapes: Any
    origins: Any


class Caveat(NamedTuple):
    """An operation that makes derivatives wrong without a word of the framework.

    Attributes:
        kind: `"gradient"` if first derivatives stop there, `"second_derivative"` if
            only second ones do, `"xla"` if they are wrong only when XLA compiles it,
            `"random"` if it draws other numbers at each run.
        operation: its type, in the framework's words.
        name: its name, in which layers may be found.
    """

    kind: str
    operation: str
    name: str


class Findings(NamedTuple):
    """What is known of a gradient before it is used.

    Attributes:
        unconnected: names of the entries of the point that the loss does not depend
            on.
        caveats: what is wrong with the derivatives, and where.
        branches: whether the framework records branches or loops, in which what a layer
            computes cannot leave the branch.
    """

    unconnected: frozenset[Name]
    caveats: tuple[Caveat, ...]
    branches: bool = False


class Recording(Protocol):
    """Derivatives of one function at one point, which share one evaluation.

    `product` and `pull_back` return linear functions. They are made outside of the
    loops that call them, and called any number of times.

    Attributes:
        loss: scalar tensor.
        taps: dictionary of tensors.
        gradient: dictionary of dense tensors, like the point.
    """

    loss: Tensor
    taps: dict[Name, Tensor]

    @property
    def gradient(self) -> dict[Name, Tensor]:
        """Computed when it is asked for first."""
        ...

    def product(
        self, moved: Iterable[Name], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """The Hessian of the loss, rows `wanted` and columns `moved`, as a function.

        It takes a direction with exactly the entries `moved` and returns a dictionary
        with the entries `wanted`, zeros where there is no dependence.
        """
        ...

    def pull_back(
        self, taps: Iterable[Name], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """The transposed Jacobian of taps by entries of the point, as a function.

        It takes cotangents with exactly the entries `taps` and returns a dictionary
        with the entries `wanted`, zeros where there is no dependence.
        """
        ...


class NotTwiceDifferentiable(NotImplementedError):
    """An operation has no second derivative in the framework; the message names it."""
