"""What TensorFlow leaves out of derivatives in silence, found in the traced graph.

Some operations are registered as not differentiable although they are: a tape takes
their derivative for zero, without an error. The result is finite, often symmetric, and
wrong. This module reads the graph while it is being traced and names them.
"""

import tensorflow as tf

#: Where already the first derivative stops: training does not follow the gradient of
#: the loss either. `StopGradient` does so on purpose.
_STOP_GRADIENTS = {
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
_STOP_SECOND_DERIVATIVES = {
    "ResizeBilinearGrad",
    "FakeQuantWithMinMaxArgsGradient",
    "FakeQuantWithMinMaxVarsGradient",
    "FakeQuantWithMinMaxVarsPerChannelGradient",
}

#: XLA finds the position of the maximum from rounded inputs in second derivatives.
_WRONG_IN_XLA = {"MaxPool", "MaxPoolV2", "MaxPool3D", "MaxPoolWithArgmax"}

#: Operations on floating-point numbers whose derivative is indeed zero.
_FLAT = {"Sign", "Floor", "Ceil", "Round", "Rint", "ZerosLike", "OnesLike"}

#: What the walk from a StopGradient back to a maximum may pass: type to input.
_PASSES = {"Select": 1, "SelectV2": 1, "Identity": 0, "Reshape": 0, "Squeeze": 0}


#: Operations that read the shape of a tensor and not what it holds.
_READ_SHAPES = {"Shape", "ShapeN", "Size", "Rank"}


def reaches(sources, targets, stops=()):
    """While tracing: whether any target is computed from any of the sources.

    Stopped gradients and integers count, shapes do not. `True` when nothing is being
    traced, because nobody can know.

    Args:
        sources: list of tensors or `tf.Variable`s.
        targets: list of tensors.
        stops: tensors that are taken as given: what they come from does not count.
    """
    if tf.executing_eagerly():
        return True
    starts, seen = {_start(s).op for s in sources}, {s.op for s in stops}
    ops = [t.op for t in targets if tf.is_tensor(t) and hasattr(t, "graph")]
    while ops:
        op = ops.pop()
        if op in starts:
            return True
        if op not in seen and op.type not in _READ_SHAPES:
            seen.add(op)
            ops.extend(t.op for t in op.inputs)
    return False


def is_used(tensor):
    """While tracing: whether anything has been computed from a tensor's contents."""
    if tf.executing_eagerly():
        return True
    return any(op.type not in _READ_SHAPES for op in tensor.consumers())


def silent_errors(sources, gradients):
    """While tracing: operations whose derivatives TensorFlow gets wrong in silence.

    Only operations through which the gradients depend on the sources count, and
    dependence through integers, comparisons and other flat functions does not.

    Args:
        sources: list of tensors or `tf.Variable`s, what is differentiated by.
        gradients: list of the loss's gradients; entries may be `None`.

    Returns:
        A dictionary of sorted lists of pairs (type, name of the operation):
        `"gradient"`: first derivatives stop there; `"second_derivative"`: only
        second derivatives do; `"xla"`: wrong if the graph is compiled by XLA. Empty
        lists when nothing is being traced.
    """
    found = {"gradient": set(), "second_derivative": set(), "xla": set()}
    for kind, name, is_shift in _operations_between(sources, gradients):
        if kind in _STOP_GRADIENTS and not is_shift:
            found["gradient"].add((kind, name))
        if kind in _STOP_SECOND_DERIVATIVES:
            found["second_derivative"].add((kind, name))
        if kind in _WRONG_IN_XLA:
            found["xla"].add((kind, name))
    return {key: sorted(operations) for key, operations in found.items()}


def _operations_between(sources, gradients):
    """Yields (type, name, whether it is a harmless shift) of each operation."""
    if tf.executing_eagerly():
        return
    behind, ops = set(), [g.op for g in gradients if g is not None]
    while ops:
        op = ops.pop()
        if op not in behind:
            behind.add(op)
            ops.extend(t.op for t in op.inputs)
    reached, tensors, called = set(), [_start(s) for s in sources], []
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
        graph = tf.compat.v1.get_default_graph()
        yield from _operations_inside(called, graph.as_graph_def().library)


def _start(source):
    if isinstance(source, tf.Tensor):
        return source
    return tf.compat.v1.get_default_graph().capture(source.handle)


def _carries_gradients(tensor):
    dtype = tensor.dtype
    return dtype.is_floating or dtype.is_complex or dtype in (tf.variant, tf.resource)


def _is_shift(op):
    """Whether it stops the maximum that log-sum-exp subtracts and adds again.

    The sum does not depend on that shift, so stopping its gradient changes nothing.
    """
    while op.type in _PASSES or op.type == "StopGradient":
        op = op.inputs[_PASSES.get(op.type, 0)].op
    return op.type == "Max"


def _operations_inside(names, library):
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


def _is_shift_node(node, nodes):
    while node is not None and (node.op in _PASSES or node.op == "StopGradient"):
        node = nodes.get(node.input[_PASSES.get(node.op, 0)].split(":")[0])
    return node is not None and node.op == "Max"


def _functions(node):
    """Names of the functions that a node calls."""
    for attribute in node.attr.values():
        if attribute.HasField("func"):
            yield attribute.func.name
        yield from (function.name for function in attribute.list.func)
