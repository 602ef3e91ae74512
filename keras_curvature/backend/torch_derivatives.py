"""Derivatives on PyTorch, by double backward.

Operations build a graph only where a function is differentiated; what comes out of
here is detached from it.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from keras import tree
from torch.nn.attention import SDPBackend, sdpa_kernel

from keras_curvature.backend.contract import (
    Caveat,
    Direction,
    Findings,
    Name,
    NotTwiceDifferentiable,
    Tensor,
)
from keras_curvature.backend.ctc import ctc_loss


def gradient(
    function: Callable[[Direction], tuple[Tensor, dict[Name, Tensor]]], point: Direction
) -> tuple[Tensor, dict[Name, Tensor], dict[Name, Tensor]]:
    """See the contract."""
    with _building_graphs():
        sources = _leaves(point)
        loss, taps = function(dict(sources))
        parts = _backward([loss], None, sources)
    return loss.detach(), detached(taps), _dense(parts, sources)


class record:
    """See the contract: a `Recording`, by double backward.

    The graphs of the loss, and of the gradient once that is asked for, live as long as
    the recording and the functions that it returned. Each call of one is a backward
    pass.
    """

    def __init__(
        self,
        function: Callable[[Direction], tuple[Tensor, dict[Name, Tensor]]],
        point: Direction,
        last: Iterable[Name] = (),
    ) -> None:
        self._last = set(last)
        with _building_graphs():
            self._sources = _leaves(point)
            self._loss, self._taps = function(dict(self._sources))
        self.loss = self._loss.detach()
        self.taps = detached(self._taps)

    @functools.cached_property
    def gradient(self) -> dict[Name, Tensor]:
        """See the contract."""
        gradient: dict[Name, Tensor] = detached(_dense(self._slopes, self._sources))
        return gradient

    @functools.cached_property
    def _slopes(self) -> dict[Name, Tensor | None]:
        """The gradient, with the graph that it was computed by."""
        return self._slopes_by(self._sources)

    @functools.cached_property
    def _last_slopes(self) -> dict[Name, Tensor | None]:
        """The same by what is met last, which is soon reached."""
        return self._slopes_by({name: self._sources[name] for name in self._last})

    def _slopes_by(self, sources: dict[Name, Tensor]) -> dict[Name, Tensor | None]:
        with _building_graphs():
            return _backward([self._loss], None, sources, create_graph=True)

    def product(
        self, moved: Iterable[Name], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """See the contract."""
        moved, wanted = list(moved), list(wanted)
        last = {*moved, *wanted} <= self._last
        slopes = self._last_slopes if last else self._slopes
        return self._carried({name: slopes[name] for name in moved}, wanted)

    def pull_back(
        self, taps: Iterable[Name], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """See the contract."""
        return self._carried({name: self._taps[name] for name in taps}, wanted)

    def _carried(
        self, targets: Mapping[Name, Tensor | None], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """Cotangents of targets, carried back to sources."""
        sources = {name: self._sources[name] for name in wanted}
        # By what the loss is linear in, the gradient has no graph.
        varying = {n: t for n, t in targets.items() if t is not None and _vary([t])}

        def carried(cotangents: Direction) -> dict[Name, Tensor]:
            with _missing_derivatives_named():
                parts = _backward(
                    list(varying.values()),
                    [cotangents[name] for name in varying],
                    sources,
                    retain_graph=True,
                )
            return _dense(parts, sources)

        return carried


def _building_graphs() -> contextlib.ExitStack:
    """A context in which operations on what requires a gradient are recorded."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    return stack


def _leaves(point: Direction) -> dict[Name, Tensor]:
    """The entries of a point as what a graph starts from."""
    return {name: x.detach().requires_grad_() for name, x in point.items()}


def _backward(
    targets: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    sources: Mapping[Name, Tensor],
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> dict[Name, Tensor | None]:
    """One backward pass; `None` where there is no dependence."""
    if not sources or not _vary(targets):
        return dict.fromkeys(sources)
    parts = torch.autograd.grad(
        targets,
        list(sources.values()),
        cotangents,
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return {
        # An embedding with `sparse=True` has a sparse gradient.
        name: part.to_dense() if part is not None and part.is_sparse else part
        for name, part in zip(sources, parts, strict=True)
    }


def _vary(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a graph has recorded how any of the tensors varies."""
    return any(x is not None and x.requires_grad for x in tensors)


def _dense(
    parts: Mapping[Name, Tensor | None], sources: Mapping[Name, Tensor]
) -> dict[Name, Tensor]:
    """Gradients with zeros where there is no dependence."""
    return {
        name: torch.zeros_like(sources[name]) if part is None else part
        for name, part in parts.items()
    }


def detached(structure: Any) -> Any:
    """Tensors without the graph that they were computed by."""
    return tree.map_structure(
        lambda x: x.detach() if isinstance(x, torch.Tensor) else x, structure
    )


class _HeldCotangent(torch.autograd.Function):
    """The identity; its gradient forgets what it was computed from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].detach()


def hold_cotangent(x: Tensor) -> Tensor:
    """See the contract.

    With `f` the tensor and `g = ∂L/∂f`, the gradient `Jᵀ g` by what `f` was computed
    from is right, and its derivative is `Σ_c g_c ∂²f_c`, without `Jᵀ (∂²L/∂f²) J`.
    """
    return _HeldCotangent.apply(x)  # type: ignore[no-untyped-call]


# What derivatives leave out

#: How PyTorch says it: `derivative for aten::x is not implemented`, `the derivative
#: for 'x' is not implemented`, `torch.compile [...] does not [...] support double
#: backward`.
_MISSING = re.compile(
    r"derivative for '?(?:aten::)?(?P<operation>\w+).* is not implemented"
    r"|support double backward"
)


@contextlib.contextmanager
def _missing_derivatives_named() -> Iterator[None]:
    """Translates PyTorch's errors for a derivative that it does not have."""
    try:
        yield
    except RuntimeError as error:
        found = _MISSING.search(str(error))
        if found is None:
            raise
        raise NotTwiceDifferentiable(
            f"{found['operation'] or 'A function'} has no second derivative in "
            "PyTorch. Use central differences of the gradient instead: "
            f'hvp="finite_difference". PyTorch says: {error}'
        ) from error


def examine(
    function: Callable[[Direction], tuple[Tensor, dict[Name, Tensor]]], point: Direction
) -> Findings:
    """See the contract.

    The gradient of a user's own `torch.autograd.Function` may be computed where
    nothing is recorded (by a kernel, or under `once_differentiable`, whose error comes
    only where all leaves are differentiated by). The second derivative takes it for a
    constant. A loss that is another one when it is computed again draws numbers from a
    generator of its own, or counts its calls.
    """
    caveats: set[Caveat] = set()
    with _building_graphs():
        sources = _leaves(point)
        loss, _ = function(dict(sources))
        for node in _own_functions(loss):
            node.register_hook(_watch(node, caveats))
        parts = _backward([loss], None, sources, create_graph=True)
    with torch.no_grad():
        again, _ = function(dict(point))
    if not torch.allclose(loss, again, rtol=1e-4, equal_nan=True):
        caveats.add(Caveat("random", "a loss", f"first {loss:.6g}, then {again:.6g}"))
    unconnected = frozenset(name for name, part in parts.items() if part is None)
    return Findings(unconnected, tuple(sorted(caveats)))


def _own_functions(loss: Tensor) -> Iterator[Any]:
    """The nodes of `torch.autograd.Function`s that a loss is computed by."""
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(before for before, _ in node.next_functions)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            if _function(node) is not _HeldCotangent:
                yield node


def _function(node: Any) -> type:
    own: type = type(node)._forward_cls
    return own


def _watch(node: Any, caveats: set[Caveat]) -> Callable[[Any, Any], None]:
    """A hook that sees whether the gradient forgets what it is computed from."""
    own = _function(node)
    caveat = Caveat(
        "second_derivative", own.__name__, f"{own.__module__}.{own.__qualname__}"
    )
    # The hook must not keep the node, which keeps the hook.
    saved_vary = _vary(node.saved_tensors)

    def hook(gives: Iterable[Tensor | None], takes: Iterable[Tensor | None]) -> None:
        if (saved_vary or _vary(takes)) and not _vary(
            # What `once_differentiable` gives varies with nothing.
            x
            for x in gives
            if type(getattr(x, "grad_fn", None)).__name__ != "Error"
        ):
            caveats.add(caveat)

    return hook


# What PyTorch does otherwise where second derivatives are wanted


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """See the contract.

    Fused attention, cuDNN's recurrent layers and the kernel of the CTC loss have no
    second derivative; plain versions run instead. TF32, whose products are good to
    three digits, is off.
    """
    functional, recurrent = torch.nn.functional, torch._VF
    with contextlib.ExitStack() as stack:
        stack.enter_context(_full_precision())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Keras asks for the fused kernel in a context of its own, around the call.
        name = "scaled_dot_product_attention"
        call = _inside(lambda: sdpa_kernel(SDPBackend.MATH), getattr(functional, name))
        stack.enter_context(_replaced(functional, name, call))
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            call = _inside(_without_cudnn, getattr(recurrent, name))
            stack.enter_context(_replaced(recurrent, name, call))
        call = _plain_ctc_loss(functional.ctc_loss)
        stack.enter_context(_replaced(functional, "ctc_loss", call))
        yield


def _plain_ctc_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.nn.functional.ctc_loss`, plain where it is asked for as Keras does."""

    def call(
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Tensor,
        target_lengths: Tensor,
        blank: int = 0,
        reduction: str = "mean",
        zero_infinity: bool = False,
    ) -> Tensor:
        lengths = input_lengths, target_lengths
        if targets.ndim != 2 or reduction != "none" or zero_infinity:
            return original(
                log_probs, targets, *lengths, blank, reduction, zero_infinity
            )
        return ctc_loss(log_probs, targets, target_lengths, input_lengths, blank)

    return call


def _without_cudnn() -> contextlib.AbstractContextManager[None]:
    # Not `cudnn.flags`, which switches TF32 on if it is not told otherwise.
    return _replaced(torch.backends.cudnn, "enabled", False)


def _inside(
    context: Callable[[], contextlib.AbstractContextManager[Any]],
    function: Callable[..., Any],
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


#: What may round the factors of a float32 product.
_PRODUCTS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    *(getattr(torch.backends.cudnn, kind) for kind in ("conv", "rnn")),
    *(getattr(torch.backends.mkldnn, kind) for kind in ("matmul", "conv", "rnn")),
)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products of float32 factors.

    PyTorch has an older and a newer way to ask for it. Where the newer one was told
    something else, reading by the older one fails; in here both say the same.
    """
    matmul = cudnn = None
    with contextlib.suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        cudnn = torch.backends.cudnn.allow_tf32
    precisions = [product.fp32_precision for product in _PRODUCTS]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for product in _PRODUCTS:
        product.fp32_precision = "ieee"
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for product, precision in zip(_PRODUCTS, precisions, strict=True):
            product.fp32_precision = precision
