"""SinkGD with options for ablations, which go beyond the paper or come from other work."""

from inspect import signature
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.optim.arguments import suggest_names
from sinkgd.optim.grouped import GroupedOptimizer
from sinkgd.optim.sinkgd import SinkGD


class SinkGDVariant(SinkGD):
    r"""`SinkGD` with options for ablations, which combine unless an error says otherwise.

    Each option is also an option of groups: ``{"params": ..., "warm_start": True}`` works with
    `SinkGD`, too. Disabled options add no cost. A step applies them in this order: momentum of the
    gradient, ``momentum_rank``, ``tiny_rows``, the half steps, ``cross_fit``,
    ``averaged_scales``, ``deflated_rank``, ``weight_projection``, ``operator_norm``, momentum of
    the update, ``constant_norm``. For vectors, only ``momentum`` has an effect.

    The algorithm ``"sinkgd-table"`` is a set of these options that secondary sources report for the
    embedding and the head of DeepSeek-V4.1: Nesterov's momentum of 0.95, no update of tiny rows,
    and 2L + 1 half steps, which begin and end with rows. These sources also multiply its learning
    rate by 0.18. To use it, write
    ``param_groups(model, overrides={"embed|head": {"algorithm": "sinkgd-table", ...}})``.

    On a mesh, ``tiny_rows``, an extra half step, ``operator_norm`` and ``constant_norm`` each add
    one message for a process group that shards rows, and ``cross_fit`` and ``momentum_rank`` add
    two. They add as many for a group that shards columns, except that ``operator_norm`` adds two;
    there ``weight_projection`` and ``averaged_scales`` add one each, too. A group that does both
    gets both. `hold_out` sends the messages of the iterations, and those of ``tiny_rows`` and an
    extra half step. ``tiny_rows`` and ``momentum_rank`` copy gradients: they process 256 MiB at a
    time and send one set of messages per chunk. ``momentum_bits=8`` does the same, and so does
    ``constant_norm`` with momentum of the update. ``weight_projection``, ``constant_norm``, and
    ``operator_norm`` with ``deflated_rank`` copy updates, 128 MiB at a time.

    Args:
        params: As in `SinkGD`.
        lr: As in `SinkGD`.
        sinkhorn_iterations: As in `SinkGD`.
        warm_start: Start from the column scales of the last step (with ``last="row"``, from its row
            scales), so that fewer iterations are needed to come equally close to the fixed point.
            Keeps n float32 of state per matrix (m with ``last="row"``).
        momentum_place: ``"before"``: the momentum B averages the gradients, as in `SinkGD`; or
            ``"after"``: B averages the normalized updates X, and the step goes along B (with
            ``nesterov``, along μB + (1 − μ)X). The root-mean-square change of a weight is then
            below ``lr``. Needs ``momentum``.
        momentum_bits: Bits per entry of B: 32; or 8, only with ``momentum_place="after"``. With 8
            bits, a step copies B of a few matrices at a time to float32.
        momentum_rank: Rank r of a memory of earlier gradients, at least 0. The gradient G is
            replaced by the sum μPQᵀ + (1 − μ)G, where PQᵀ is the part of rank r that the last step
            kept of its own sum. G itself keeps its full rank. Keeps (m + n)·r float32 per matrix,
            with r at most min(m, n) of the largest matrix of a parameter; 0 keeps nothing. Copies
            the gradients of a few matrices at a time.
        low_rank_momentum: Decay rate μ of this memory, in [0, 1). Needs ``momentum_rank``.
        cross_fit: Take the scales from a part of the batch, and the direction from the rest: call
            `hold_out` between the backward passes of two micro-batches. Keeps m + n float32 per
            matrix from there to the step. Does not combine with averages of gradients.
        averaged_scales: Decay rate β, in [0, 1), of averages over steps from which the scales of
            rows and columns are taken: their inverse squares are averaged, as in Adam. Without
            ``deflated_rank`` the root-mean-square change of a weight is then ``lr`` only on
            average. Keeps m + n float32 per matrix; 0 keeps nothing.
        last: Side of the last half step: ``"column"`` as in the paper, or ``"row"``, with which an
            iteration normalizes columns before rows. Only the columns, or only the rows, then have
            exactly equal lengths.
        first: Side of the first half step. None means the side other than ``last``. If ``first``
            equals ``last``, an extra half step comes in front: 2L + 1 in all.
        tiny_rows: ``"keep"``, or ``"mask"``: rows of the gradient (or of B) that are nearly zero
            are set to zero, and so is their update. Copies the gradients of a few matrices at a
            time.
        tiny_row_threshold: τ: a row is tiny if its l2 norm is below τ times the mean norm of all
            rows. Needs ``tiny_rows="mask"``.
        deflated_start: Vectors from which deflation starts to search for directions:
            ``"fixed"``, the same in every step, without state; or ``"kept"``, the right directions
            of the last step. ``"kept"`` keeps (k + 1)·n float32 per matrix, where k is
            ``deflated_rank``, which it needs.
        operator_norm: None, ``"unit"`` or ``"muon"``: scale the update so that its largest singular
            value, estimated by one power iteration per step, is 1 or √(m/n). ``lr`` is then no
            longer a root-mean-square change of a weight. With ``"muon"`` it is the largest
            root-mean-square change of a layer's output for an input of root-mean-square 1. Keeps n
            float32 per matrix.
        weight_projection: Remove from each row of the update, an out-feature, its component along
            the same row of the weight, and restore the length of the update's row. A step then
            turns the rows of the weight; their lengths grow only to second order in ``lr``. Keeps
            no state; copies the updates of a few matrices at a time.
        constant_norm: After every step, rescale each matrix to the Frobenius norm that it had
            before the first step. ``lr`` is then relative to the weights: the root-mean-square
            change of a weight, divided by the root-mean-square of the weights. The update only
            gives the direction. A matrix that is zero before its first step is updated as without
            the option. Does not combine with ``weight_decay``. Keeps a float32 per matrix; copies
            the updates of a few matrices at a time.
        **options: All other arguments of `SinkGD`.

    Raises:
        ValueError: If an option is out of range or has no effect, as in `SinkGD`. An option that
            needs another one, as said above, has an effect in the groups that have both.
        TypeError: If an option does not exist; otherwise as in `SinkGD`.
        ImportError: If ``backend`` names a backend that is not installed.

    Examples:
        >>> import torch
        >>> from sinkgd import SinkGDVariant
        >>> weight = torch.nn.Parameter(torch.ones(3, 4))
        >>> optimizer = SinkGDVariant([weight], lr=1e-3, sinkhorn_iterations=1, warm_start=True)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> [*optimizer.state[weight]]
        ['col_scale']

    References:
        Nora projects rows of a momentum off rows of the weight. https://arxiv.org/abs/2605.03769
        Hyperball keeps the norm of each matrix. https://arxiv.org/abs/2606.16899
    """

    usual_call = "SinkGDVariant(param_groups(model))"

    @suggest_names(passes_to=SinkGD)
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        sinkhorn_iterations: int = 5,
        *,
        warm_start: bool = False,
        momentum_place: str = "before",
        momentum_bits: int = 32,
        momentum_rank: int = 0,
        low_rank_momentum: float = 0.95,
        cross_fit: bool = False,
        averaged_scales: float = 0.0,
        last: str = "column",
        first: str | None = None,
        tiny_rows: str = "keep",
        tiny_row_threshold: float = 0.01,
        deflated_start: str = "fixed",
        operator_norm: str | None = None,
        weight_projection: bool = False,
        constant_norm: bool = False,
        **options: Any,
    ) -> None:
        given = signature(SinkGD).bind(params, lr, sinkhorn_iterations, **options)
        given.apply_defaults()
        arguments: dict[str, Any] = {
            **given.arguments,
            "warm_start": warm_start,
            "momentum_place": momentum_place,
            "momentum_bits": momentum_bits,
            "momentum_rank": momentum_rank,
            "low_rank_momentum": low_rank_momentum,
            "cross_fit": cross_fit,
            "averaged_scales": averaged_scales,
            "last": last,
            "first": first,
            "tiny_rows": tiny_rows,
            "tiny_row_threshold": tiny_row_threshold,
            "deflated_start": deflated_start,
            "operator_norm": operator_norm,
            "weight_projection": weight_projection,
            "constant_norm": constant_norm,
        }
        GroupedOptimizer.__init__(self, arguments.pop("params"), arguments)
