"""The Hessian of a loss as a matrix that is never formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse.ops._bilinear_layers import Kind, Passes
from transfuse.ops._curvature_operator import DEFAULT_MEMORY, Batches, CurvatureOperator
from transfuse.ops._linearisation import (
    Linearisation,
    add_weighted,
    explained,
    make_leaves,
    recorded,
)
from transfuse.ops._module_functions import check_callable, functional_model, select_parameters
from transfuse.ops._progress import Progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["HessianOperator"]

LossFunction = Callable[[dict[str, Tensor], Any], Tensor]


class HessianOperator(CurvatureOperator):
    r"""The Hessian of a mean loss over batches, for products with vectors.

    .. math:: H = \frac{1}{N} \sum_b n_b \nabla^2_\theta \ell(\theta, b), \qquad N = \sum_b n_b

    Args:
        loss_fn: ``(params, batch) -> 0-dim tensor``, the mean over the samples of the batch. It
            must use the parameters it is given and be twice differentiable.
        params: name -> tensor, the point; floating, one dtype, one device. Read anew for every
            product, so an optimiser may move them in between.
        batches: a list, a DataLoader, or another iterable that can be read again and again.
        size_of: number of samples of a batch; None counts the leading dimension of its first
            tensor. A loss that averages over something else (tokens that are not padding) needs it.
        group: ``torch.distributed`` process group. Each process has its own batches and gets the
            product of all of them; vectors and parameters must be the same everywhere.
        memory: bytes that differentiated batches may hold from one product to the next. The batches
            of which all fit are differentiated once; others anew for every product, one at a time.
            Parameters that move are noticed; after altering batches in place call :meth:`release`.
        check: refuse a loss that is not a function of parameters and batch: one that draws random
            numbers, differs when evaluated again, or differs between products.
        progress: True for a line on stderr, or a callable given (task, done, total).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it. The same when
            a product finds a loss that is not a finite scalar, does not depend on the parameters,
            or is not deterministic.
        NotImplementedError: in a product, an operation without a second derivative, such as torch's
            fused attention; :func:`attend` and :func:`window_attention` have one.

    Notes:
        ``A @ v`` takes (P,), (P, K), or a list, tuple or dict of tensors in the shapes of the
        parameters (with one more dimension K for several vectors) and returns the same form.
        Several vectors share the differentiation of a batch: K of them cost about (1 + 2 K)
        gradients, and 2 K when it was kept. :meth:`quadratic_forms` gives v^T H v alone for about
        half: linear, convolution and fixed normalisation layers then take three products of their
        size for a vector and not six. Half precision is accumulated over
        batches in float32. A parameter that the loss does not use has zero rows. Batch
        normalisation in training mode couples the samples of a batch: the matrix is then the
        weighted mean over these batches, and :meth:`from_module` refuses it.

    Reference:
        Pearlmutter 1994, Fast exact multiplication by the Hessian.

    Example:
        >>> import torch
        >>> from transfuse.ops import HessianOperator
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
        >>> def loss_fn(params, batch):
        ...     return (batch @ params["w"]).square().mean()
        >>> hessian = HessianOperator(loss_fn, {"w": torch.zeros(2)}, list(x.split(2)))
        >>> hessian @ torch.eye(2)
        tensor([[6.6667, 3.3333],
                [3.3333, 4.0000]])
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        params: Mapping[str, Tensor],
        batches: Batches,
        *,
        size_of: Callable[[Any], int] | None = None,
        group: ProcessGroup | None = None,
        memory: int = DEFAULT_MEMORY,
        check: bool = True,
        progress: Progress = False,
    ) -> None:
        check_callable("loss_fn", loss_fn)
        super().__init__(
            params,
            batches,
            size_of=size_of,
            group=group,
            memory=memory,
            check=check,
            progress=progress,
        )
        self._loss_fn = loss_fn

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batches: Batches,
        *,
        params: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        size_of: Callable[[Any], int] | None = None,
        group: ProcessGroup | None = None,
        memory: int = DEFAULT_MEMORY,
        check: bool = True,
        progress: Progress = False,
    ) -> HessianOperator:
        """The Hessian of ``loss(model(inputs), targets)`` over batches of (inputs, targets).

        Args:
            model: in evaluation mode as far as that matters. Its buffers are constants.
            loss: mean loss of outputs and targets, such as ``nn.CrossEntropyLoss()``.
            batches: of (inputs, targets); inputs a tensor, a tuple of positional or a mapping of
                keyword arguments. Tensors are moved to the device of the parameters.
            params: the parameters to differentiate, as a sequence or name -> parameter of the
                model; None for all that require a gradient.
            size_of, group, memory, check, progress: as in the class.

        Raises:
            TypeError, ValueError: an argument that does not fit, or a model with active dropout or
                with batch normalisation in training mode.

        Example:
            >>> import torch
            >>> from transfuse.ops import HessianOperator
            >>> model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
            >>> batches = [(x, torch.zeros(4, dtype=torch.long))]
            >>> HessianOperator.from_module(model, torch.nn.CrossEntropyLoss(), batches)
            HessianOperator(8 x 8, 2 parameters, float32, cpu)
        """
        check_callable("loss", loss)
        chosen = select_parameters(model, params, check=check)
        call = functional_model(model, next(iter(chosen.values())).device)

        def loss_fn(point: dict[str, Tensor], batch: Any) -> Tensor:
            outputs, targets = call(point, batch)
            return loss(outputs, targets)

        return cls(
            loss_fn,
            chosen,
            batches,
            size_of=size_of,
            group=group,
            memory=memory,
            check=check,
            progress=progress,
        )

    def _linearise(self, batch: Any) -> Linearisation:
        return _Gradient(self._loss_fn, self._params, batch)

    def _value(self, batch: Any) -> float:
        with torch.no_grad():
            return float(self._loss_fn(dict(self._params), batch))


class _Gradient:
    """The gradient of one batch as a graph."""

    def __init__(self, loss_fn: LossFunction, params: Mapping[str, Tensor], batch: Any) -> None:
        leaves = make_leaves(params)
        self._inputs = list(leaves.values())
        self._passes = Passes()

        def build(layers: AbstractContextManager) -> tuple[float, Sequence[Tensor | None]]:
            with layers:
                loss = loss_fn(leaves, batch)
            if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
                raise ValueError(
                    f"loss_fn: expected a floating 0-dim tensor (a mean over samples), "
                    f"got {_checks.describe(loss)}"
                )
            if not loss.requires_grad:
                raise ValueError(
                    "loss_fn: expected a loss that depends on params, got one that does not; it "
                    "must compute with the tensors it is given, not with those of the model, and "
                    "not under no_grad"
                )
            return loss.item(), torch.autograd.grad(
                loss, self._inputs, create_graph=True, allow_unused=True
            )

        (self.value, gradients), self.saved_bytes = recorded(build, self._inputs, self._passes)
        # Linear in the parameters: nothing to differentiate again.
        self._outputs = [
            (i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad
        ]

    def add_product(
        self, vector: Sequence[Tensor], into: Sequence[Tensor], *, weight: float
    ) -> None:
        add_weighted(self._second(vector, "product"), into, weight=weight)

    def form(self, vector: Sequence[Tensor]) -> Tensor:
        products = self._second(vector, "form")
        for product, piece in zip(products, vector, strict=True):
            if product is not None:
                self._passes.add(product, piece, 1.0)
        total = self._passes.total
        return torch.zeros((), dtype=torch.float64) if total is None else total

    def _second(self, vector: Sequence[Tensor], kind: Kind) -> Sequence[Tensor | None]:
        """A pass through the graph of the gradient, with what reaches the parameters."""
        if len(self._outputs) == 0:
            return [None] * len(self._inputs)
        self._passes.begin(kind)
        with explained():
            return torch.autograd.grad(
                [gradient for _, gradient in self._outputs],
                self._inputs,
                [vector[i] for i, _ in self._outputs],
                retain_graph=True,
                allow_unused=True,
            )
