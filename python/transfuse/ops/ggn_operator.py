"""The generalised Gauss-Newton matrix of a loss as a matrix that is never formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse.ops._bilinear_layers import Passes
from transfuse.ops._curvature_operator import DEFAULT_MEMORY, Batches, CurvatureOperator
from transfuse.ops._linearisation import (
    Linearisation,
    add_weighted,
    explained,
    make_leaves,
    recorded,
)
from transfuse.ops._module_functions import check_callable, functional_model, select_parameters
from transfuse.ops._output_hessian import CLOSED_FORMS, ModuleLoss, OutputLoss, output_hessian
from transfuse.ops._progress import Progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GGNOperator"]

ModelFunction = Callable[[dict[str, Tensor], Any], Tensor]


class GGNOperator(CurvatureOperator):
    r"""The generalised Gauss-Newton matrix of a mean loss, for products with vectors.

    .. math:: G = \frac{1}{N} \sum_b n_b\, J_b^\top \nabla^2_f \ell_b\, J_b, \qquad
              J_b = \partial f(\theta, b) / \partial \theta

    It is the Hessian without the curvature of the model itself, positive semidefinite for a convex
    loss, and the Fisher matrix for cross entropy.

    Args:
        model_fn: ``(params, batch) -> outputs``, twice differentiable, with the parameters it is
            given.
        params: name -> tensor, as for :class:`HessianOperator`.
        batches: as for :class:`HessianOperator`.
        loss: ``"ce"``, cross entropy of logits (N, C, ...) averaged over all but the classes;
            ``"mse"`` and ``"bce"`` (of logits), averaged over all entries; or any
            ``(outputs, batch) -> 0-dim mean``. The named ones need no labels.
        size_of, group, memory, check, progress: as for :class:`HessianOperator`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or outputs that are not finite, do not
            depend on the parameters, or are not deterministic.
        NotImplementedError: in a product, an operation without a second derivative, such as torch's
            fused attention; :func:`attend` and :func:`window_attention` have one.

    Notes:
        A product goes once through the graph of the vector-Jacobian product, for J v, and once back
        through the model, about 4/3 of a gradient; a quadratic form needs only J v. Several
        vectors, half precision and processes are as for :class:`HessianOperator`.

    Reference:
        Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient descent.

    Example:
        >>> import torch
        >>> from transfuse.ops import GGNOperator
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> ggn = GGNOperator(lambda p, x: x @ p["w"], {"w": torch.zeros(2, 1)}, [x], "mse")
        >>> ggn @ torch.eye(2)
        tensor([[1., 2.],
                [2., 5.]])
    """

    _value_name = "mean square of the outputs"

    def __init__(
        self,
        model_fn: ModelFunction,
        params: Mapping[str, Tensor],
        batches: Batches,
        loss: OutputLoss = "ce",
        *,
        size_of: Callable[[Any], int] | None = None,
        group: ProcessGroup | None = None,
        memory: int = DEFAULT_MEMORY,
        check: bool = True,
        progress: Progress = False,
    ) -> None:
        check_callable("model_fn", model_fn)
        if not callable(loss) and loss not in CLOSED_FORMS:
            raise ValueError(
                f"loss: expected one of {', '.join(map(repr, CLOSED_FORMS))} or a callable of "
                f"(outputs, batch), got {_checks.describe(loss)}"
            )
        super().__init__(
            params,
            batches,
            size_of=size_of,
            group=group,
            memory=memory,
            check=check,
            progress=progress,
        )
        self._model_fn = model_fn
        self._loss = loss

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        loss: str | Callable[[Any, Any], Tensor],
        batches: Batches,
        *,
        params: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        size_of: Callable[[Any], int] | None = None,
        group: ProcessGroup | None = None,
        memory: int = DEFAULT_MEMORY,
        check: bool = True,
        progress: Progress = False,
    ) -> GGNOperator:
        """The matrix of ``loss(model(inputs), targets)`` over batches of (inputs, targets).

        Args:
            model, batches, params: as in :meth:`HessianOperator.from_module`.
            loss: a name, or a mean loss of outputs and targets. Plain ``nn.CrossEntropyLoss``,
                ``nn.MSELoss`` and ``nn.BCEWithLogitsLoss`` take the closed form of their name, the
                first where no target is its ``ignore_index``.
            size_of, group, memory, check, progress: as in the class.

        Raises:
            TypeError, ValueError: as in :meth:`HessianOperator.from_module`.

        Example:
            >>> import torch
            >>> from transfuse.ops import GGNOperator
            >>> model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
            >>> GGNOperator.from_module(model, "mse", [(x, torch.zeros(4, 2))])
            GGNOperator(8 x 8, 2 parameters, float32, cpu)
        """
        chosen = select_parameters(model, params, check=check)
        call = functional_model(model, next(iter(chosen.values())).device)
        if not isinstance(loss, str):
            check_callable("loss", loss)

        def model_fn(point: dict[str, Tensor], batch: Any) -> Tensor:
            return call(point, batch)[0]

        return cls(
            model_fn,
            chosen,
            batches,
            loss if isinstance(loss, str) else ModuleLoss(loss),
            size_of=size_of,
            group=group,
            memory=memory,
            check=check,
            progress=progress,
        )

    def _linearise(self, batch: Any) -> Linearisation:
        return _Jacobian(self._model_fn, self._loss, self._params, batch)

    def _value(self, batch: Any) -> float:
        with torch.no_grad():
            return _mean_square(self._model_fn(dict(self._params), batch))


def _mean_square(outputs: Tensor) -> float:
    return float(outputs.double().square().mean())


class _Jacobian:
    """The Jacobian of the outputs of one batch as two graphs, and the output Hessian.

    J^T u is the gradient of <outputs, u>. It is linear in u, so J v is the gradient of
    <J^T u, v> in u, at any u.
    """

    def __init__(
        self, model_fn: ModelFunction, loss: OutputLoss, params: Mapping[str, Tensor], batch: Any
    ) -> None:
        leaves = make_leaves(params)
        self._inputs = list(leaves.values())
        self._passes = Passes()

        def build(layers: AbstractContextManager):
            with layers:
                outputs = model_fn(leaves, batch)
            if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
                raise ValueError(
                    f"model_fn: expected a floating tensor, got {_checks.describe(outputs)}"
                )
            if not outputs.requires_grad:
                raise ValueError(
                    "model_fn: expected outputs that depend on params, got some that do not; it "
                    "must compute with the tensors it is given, not with those of the model, and "
                    "not under no_grad"
                )
            cotangent = torch.zeros_like(outputs).requires_grad_()
            pulled = torch.autograd.grad(
                outputs, self._inputs, cotangent, create_graph=True, allow_unused=True
            )
            return outputs, cotangent, pulled, output_hessian(loss, outputs.detach(), batch)

        built, self.saved_bytes = recorded(build, self._inputs, self._passes)
        self._outputs, self._cotangent, pulled, self._product = built
        self._pulled = [(i, g) for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self.value = _mean_square(self._outputs.detach())

    def add_product(
        self, vector: Sequence[Tensor], into: Sequence[Tensor], *, weight: float
    ) -> None:
        curved = self._product(self._push(vector))
        self._passes.begin("product")
        with explained():
            products = torch.autograd.grad(
                self._outputs,
                self._inputs,
                curved,
                retain_graph=True,
                allow_unused=True,
            )
        add_weighted(products, into, weight=weight)

    def form(self, vector: Sequence[Tensor]) -> Tensor:
        pushed = self._push(vector)
        curved = self._product(pushed)
        return pushed.reshape(-1).double() @ curved.reshape(-1).double()

    def _push(self, vector: Sequence[Tensor]) -> Tensor:
        """J v."""
        self._passes.begin("tangent")
        with explained():
            return torch.autograd.grad(
                [pulled for _, pulled in self._pulled],
                self._cotangent,
                [vector[i] for i, _ in self._pulled],
                retain_graph=True,
            )[0]
