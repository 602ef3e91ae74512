"""What can be read in a traced graph before it runs.

Two questions: what a function's results are computed from, and what TensorFlow leaves
out of derivatives in silence. Some operations are registered as not differentiable
although they are: a tape takes their derivative for zero, without an error. The result
is finite, often symmetric, and wrong.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf
from keras import tree

from keras_curvature.backend.contract import (
    Caveat,
    Direction,
    Findings,
    Name,
    Outline,
    Shape,
    Tensor,
)

#: Where already the first derivative stops: training does not follow the gradient of
#: the loss either. `StopGradient` does so on purpose.
STOP_GRADIENTS = {
    "StopGradient",
    "DrawBoundingBoxes",
    "ExtractGlimpse",
    "HSVToRGB",
    "PyFunc",
    "PyFuncStateless",
    "RandomCrop",
    "RandomShuffle",
    "StatelessRandomShuffle",
}

#: Gradients that are themselves registered as not differentiable: first derivatives
#: are right, second derivatives are not.
STOP_SECOND_DERIVATIVES = {
    "ResizeBilinearGrad",
    "FakeQuantWithMinMaxArgsGradient",
    "FakeQuantWithMinMaxVarsGradient",
    "FakeQuantWithMinMaxVarsPerChannelGradient",
}

#: XLA finds the position of the maximum from rounded inputs in second derivatives.
_WRONG_IN_XLA = {"MaxPool", "MaxPoolV2", "MaxPool3D", "MaxPoolWithArgmax"}

#: Have bodies of their own.
_BRANCHES = {"Case", "If", "StatelessCase", "StatelessIf", "StatelessWhile", "While"}

#: Draw from a state that moves on, whatever their seeds are. `RngReadAndSkip` is how a
#: `tf.random.Generator` does.
_RANDOM = {
    "FixedUnigramCandidateSampler",
    "LearnedUnigramCandidateSampler",
    "LogUniformCandidateSampler",
    "Multinomial",
    "NonDeterministicInts",
    "ParameterizedTruncatedNormal",
    "RandomGamma",
    "RandomPoisson",
    "RandomPoissonV2",
    "RandomShuffle",
    "RandomStandardNormal",
    "RandomUniform",
    "RandomUniformInt",
    "RngReadAndSkip",
    "StatefulRandomBinomial",
    "StatefulStandardNormalV2",
    "StatefulTruncatedNormal",
    "StatefulUniform",
    "StatefulUniformFullInt",
    "StatefulUniformInt",
    "ThreadUnsafeUnigramCandidateSampler",
    "TruncatedNormal",
    "UniformCandidateSampler",
}

#: Which kinds of caveats the types of operations bring.
_KINDS = {
    "gradient": STOP_GRADIENTS,
    "second_derivative": STOP_SECOND_DERIVATIVES,
    "xla": _WRONG_IN_XLA,
}

#: Name of the operation by which `hold_cotangent` stops a gradient.
HELD = "held_cotangent"

#: Operations that read the shape of a tensor and not what it holds.
_READ_SHAPES = {"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"}

#: Operations whose results are their inputs, or no numbers.
_KEEP_THE_MEMORY = {"Identity", "Reshape", "ExpandDims", "Squeeze", "StopGradient"}

#: Operations on floating-point numbers whose derivative is indeed zero.
_FLAT = {"Sign", "Floor", "Ceil", "Round", "Rint"} | _READ_SHAPES

#: What the walk from a StopGradient back to a maximum may pass: type to input.
_PASSES = {"Select": 1, "SelectV2": 1, "Identity": 0, "Reshape": 0, "Squeeze": 0}


def outline(function: Callable[..., Any], *args: Any) -> Outline:
    """See the contract. Variables that the function captures have no position."""
    with tf.__internal__.FuncGraph("outline").as_default() as graph:
        leaves = [None if a is None else _placeholder(a) for a in tree.flatten(args)]
        results = function(*tree.pack_sequence_as(args, leaves))
        results = tree.map_structure(
            lambda r: None if r is None else tf.convert_to_tensor(r), results
        )
    # What each operation is computed from, as the bits of an integer: one pass over
    # the graph, whose operations come in the order of their making.
    origins = {a.op: 1 << i for i, a in enumerate(leaves) if a is not None}
    for op in graph.get_operations():
        if op.type not in _READ_SHAPES:
            found = origins.get(op, 0)
            for tensor in op.inputs:
                found |= origins.get(tensor.op, 0)
            origins[op] = found

    def shape(r: Tensor) -> Shape | None:
        return None if r is None else Shape(tuple(r.shape.as_list()), r.dtype.name)

    def origin(r: Tensor) -> frozenset[int] | None:
        return None if r is None else frozenset(_bits(origins.get(r.op, 0)))

    return Outline(
        tree.map_structure(shape, results), tree.map_structure(origin, results)
    )


def computed_bytes(function: Callable[..., Any], *args: Any) -> int:
    """See the contract."""
    with tf.__internal__.FuncGraph("computed").as_default() as graph:
        leaves = [None if a is None else _placeholder(a) for a in tree.flatten(args)]
        function(*tree.pack_sequence_as(args, leaves))
    given = {leaf.op for leaf in leaves if leaf is not None}
    return sum(
        tensor.shape.num_elements() * tensor.dtype.size
        for op in graph.get_operations()
        if op not in given and op.type not in _KEEP_THE_MEMORY
        for tensor in op.outputs
        # What a loop keeps of its steps is opaque.
        if tensor.shape.is_fully_defined() and tensor.dtype.size
    )


def examine(
    function: Callable[[Direction], tuple[Tensor, dict[Name, Tensor]]], point: Direction
) -> Findings:
    """See the contract.

    Only operations through which the gradient depends on the point count, and
    dependence through integers, comparisons and other flat functions does not; what
    draws random numbers counts wherever the loss is computed from it.
    """
    with tf.__internal__.FuncGraph("examine").as_default() as graph:
        traced = {
            name: x if isinstance(x, tf.Variable) else _placeholder(x)
            for name, x in point.items()
        }
        sources = list(traced.values())
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            loss, _ = function(traced)
        gradient = [
            g if g is None else tf.convert_to_tensor(g)
            for g in tape.gradient(loss, sources)
        ]
        starts = [
            graph.capture(s.handle) if isinstance(s, tf.Variable) else s
            for s in sources
        ]
        operations = list(_operations_between(starts, gradient, graph))
        behind = list(_operations_behind(loss, graph))
        drawing = [
            Caveat("random", operation, name)
            for operation, name in behind
            if operation in _RANDOM
        ]
    caveats = {
        Caveat(kind, operation, name)
        for operation, name, is_shift in operations
        for kind, types in _KINDS.items()
        if operation in types and not (kind == "gradient" and is_shift)
    }
    return Findings(
        frozenset(name for name, g in zip(traced, gradient, strict=True) if g is None),
        tuple(sorted({*caveats, *drawing})),
        any(operation in _BRANCHES for operation, _ in behind),
    )


def _placeholder(x: Tensor) -> Tensor:
    x = x if tf.is_tensor(x) else tf.convert_to_tensor(x)
    return tf.compat.v1.placeholder(x.dtype, x.shape)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _operations_between(
    starts: Iterable[Tensor], gradient: Iterable[Tensor | None], graph: Any
) -> Iterator[tuple[str, str, bool]]:
    """Yields (type, name, whether it is a harmless shift) of each operation."""
    behind = _behind([g for g in gradient if g is not None])
    called: list[str] = []
    reached, tensors = set(), list(starts)
    while tensors:
        for op in tensors.pop().consumers():
            if op not in behind or op in reached:
                continue
            reached.add(op)
            yield op.type, op.name, _is_shift(op)
            called.extend(_functions(op.node_def))
            if op.type not in _FLAT and op.type != "StopGradient":
                tensors.extend(t for t in op.outputs if _carries_gradients(t))
    if called:
        # Bodies of loops, branches and calls: each of their operations counts.
        yield from _operations_inside(called, graph.as_graph_def().library)


def _behind(tensors: Iterable[Tensor]) -> set[Any]:
    """All operations that tensors are computed by."""
    behind, ops = set(), [t.op for t in tensors]
    while ops:
        op = ops.pop()
        if op not in behind:
            behind.add(op)
            ops.extend(t.op for t in op.inputs)
    return behind


def _operations_behind(tensor: Tensor, graph: Any) -> Iterator[tuple[str, str]]:
    """Yields (type, name) of each operation that a tensor is computed by."""
    called: list[str] = []
    for op in _behind([tensor]):
        yield op.type, op.name
        called.extend(_functions(op.node_def))
    if called:
        for operation, name, _ in _operations_inside(
            called, graph.as_graph_def().library
        ):
            yield operation, name


def _carries_gradients(tensor: Tensor) -> bool:
    dtype = tensor.dtype
    return dtype.is_floating or dtype.is_complex or dtype in (tf.variant, tf.resource)


def _is_shift(op: Any) -> bool:
    """Whether it stops the maximum that log-sum-exp subtracts and adds again.

    The sum does not depend on that shift, so stopping its gradient changes nothing.
    What `hold_cotangent` stops is no mistake either.
    """
    if op.name.rpartition("/")[2].startswith(HELD):
        return True
    while op.type in _PASSES or op.type == "StopGradient":
        op = op.inputs[_PASSES.get(op.type, 0)].op
    return bool(op.type == "Max")


def _operations_inside(
    names: list[str], library: Any
) -> Iterator[tuple[str, str, bool]]:
    functions = {function.signature.name: function for function in library.function}
    seen = set()
    while names:
        name = names.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        nodes = {node.name: node for node in functions[name].node_def}
        for node in nodes.values():
            names.extend(_functions(node))
            yield node.op, node.name, _is_shift_node(node, nodes)


def _is_shift_node(node: Any, nodes: dict[str, Any]) -> bool:
    if node.name.rpartition("/")[2].startswith(HELD):
        return True
    while node is not None and (node.op in _PASSES or node.op == "StopGradient"):
        node = nodes.get(node.input[_PASSES.get(node.op, 0)].split(":")[0])
    return node is not None and node.op == "Max"


def _functions(node: Any) -> Iterator[str]:
    """Names of the functions that a node calls."""
    for attribute in node.attr.values():
        if attribute.HasField("func"):
            yield attribute.func.name
        yield from (function.name for function in attribute.list.func)
