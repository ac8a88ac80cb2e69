"""One torch optimizer whose parameter groups each name their algorithm.

A step goes group by group: its algorithm updates the parameters, but for those whose gradient is
not finite, of which the guard hears.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from sinkgd.exchange import Computation, exchange, run
from sinkgd.optim.algorithms import FORMS, NEEDS_ALL_GRADIENTS
from sinkgd.optim.algorithms.adamw_spam import NORM_HISTORY
from sinkgd.optim.algorithms.contract import (
    Algorithm,
    Context,
    Group,
    Slot,
    are_zero,
    has_values,
)
from sinkgd.optim.algorithms.few_at_a_time import count_sharers
from sinkgd.optim.algorithms.rounding import count_step
from sinkgd.optim.arguments import (
    COMMON,
    as_groups,
    check_keys,
    check_momentum,
    check_runs,
    equal,
    find_algorithm,
    passed_of,
    resolve,
    settle,
)
from sinkgd.optim.exchanged import name_alike, named
from sinkgd.optim.group_check import check_group
from sinkgd.optim.listing import Listing
from sinkgd.optim.nonfinite import NonFiniteGuard
from sinkgd.optim.option_kinds import check_kinds
from sinkgd.optim.routing_check import check_same_routing
from sinkgd.optim.routing_warning import warn_unrouted
from sinkgd.optim.saved_state import (
    adopt_adamw,
    from_saved_form,
    restore_types,
    saved_options,
    to_saved_form,
)
from sinkgd.precision import in_full_precision


class GroupedOptimizer(Optimizer):
    """Base of the optimizers of this package: everything but the choice of the algorithm.

    A constructor argument is the default of the groups that do not set the option. An argument that
    was passed and that no group takes up is an error, unless it equals what all groups have:
    ``SinkGD(param_groups(model), lr=1e-3)`` is refused, since `param_groups` sets every rate.
    A group may hold the options of its own algorithm only.

    ``defaults`` agrees with the groups. Where every group sets ``lr``, ``defaults["lr"]`` is the
    largest rate, so that schedulers which read it scale every group as they scale AdamW's.
    ``defaults`` names ``momentum`` only where the optimizer has momentum, as torch's OneCycleLR and
    CyclicLR look there.

    Args:
        params: Tensors, (name, tensor) pairs, or groups of either, as in ``torch.optim``. A group
            may name its ``algorithm`` and set the options of that algorithm.
        arguments: The constructor's arguments, by name.

    Raises:
        TypeError: If ``params`` is a model or no iterable.
        ValueError: If an argument or an option has no effect or is out of range, or no group runs
            the optimizer's own algorithm.
    """

    default_algorithm: ClassVar[str]
    # Arguments that param_groups sets too: None says that they were not passed.
    none_means: ClassVar[Mapping[str, Any]] = MappingProxyType({"lr": 1e-3, "weight_decay": 0.0})

    def __init__(self, params: Iterable[Any], arguments: dict[str, Any]) -> None:
        self._guard = NonFiniteGuard()
        self._has_momentum: list[bool] = []
        self._listing = Listing()
        name = type(self).__name__
        groups = as_groups(params, name, self.default_algorithm)
        given = [dict(group) for group in groups if isinstance(group, dict)]  # torch refuses others
        own = [{"algorithm": self.default_algorithm, **group} for group in given]
        check_kinds(passed_of(arguments, self.none_means))
        defaults, passed = resolve(arguments, self.none_means, self.default_algorithm)
        super().__init__(groups, defaults)
        check_runs(name, self.default_algorithm, own)
        self.defaults = settle(defaults, passed, own)
        if self.default_algorithm == "stateless" and "lr" not in passed:
            warn_unrouted(name, self.none_means["lr"], given, self.param_groups)
        if isinstance(self.defaults["lr"], Tensor):
            self.defaults["lr"] = self.defaults["lr"].clone()
        if not self.defaults.get("momentum"):
            self.defaults.pop("momentum", None)
        self._add_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled optimizer; torch calls it at the end of loading, too."""
        super().__setstate__(state)
        self._has_momentum = [bool(group.get("momentum")) for group in self.param_groups]
        if "_guard" not in self.__dict__:
            self._guard = NonFiniteGuard()
            self._listing = Listing(self.param_groups)
            self._add_hooks()

    def _add_hooks(self) -> None:
        """Make our changes of state dicts hooks, which users' hooks can precede and follow."""
        self._saved_hook = self.register_state_dict_post_hook(to_saved_form)
        kind: Any = type(self)  # torch passes the optimizer to a hook
        self._load_hooks = (
            self.register_load_state_dict_pre_hook(kind._before_load),
            self.register_load_state_dict_post_hook(kind._after_load),
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        With ``fused=True``, torch.amp.GradScaler hands its scale over to `step`, as it does to
        torch's fused AdamW, instead of dividing gradients itself and waiting for the device.

        Args:
            param_group: ``params`` and, where they differ from the optimizer's, ``algorithm`` and
                its options.

        Raises:
            ValueError: If the algorithm is unknown, or an option or a parameter does not fit it.
            TypeError: If a parameter is complex.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a group must be a dict, got {type(param_group).__name__}")
        algorithm = find_algorithm(param_group.setdefault("algorithm", self.default_algorithm))
        check_keys(param_group, len(self.param_groups))
        for option, value in FORMS.get(param_group["algorithm"], {}).items():
            param_group.setdefault(option, value)
        for option, default in algorithm.options.items():
            param_group.setdefault(option, self._default(option, default))
        foreign = self.defaults.keys() - param_group.keys() - COMMON.keys() - {"lr", "weight_decay"}
        self._own_lr(param_group)
        name_alike(self.param_groups, param_group)
        asks_for_fused = param_group.get("fused") is True
        super().add_param_group(param_group)
        for option in foreign:  # options of another algorithm, which torch copied from the defaults
            del param_group[option]
        try:
            check_group(param_group, len(self.param_groups) - 1, algorithm)
        except (ImportError, TypeError, ValueError):
            self.param_groups.pop()
            raise
        if asks_for_fused:
            # Of the instance, as torch sets it: Lightning refuses to clip where it is True.
            self._step_supports_amp_scaling = True
        self._has_momentum.append(bool(param_group.get("momentum")))
        self._listing.add(param_group, len(self.param_groups) - 1)

    def _default(self, option: str, default: Any) -> Any:
        """Return what a group has of an option that it does not set.

        It is the optimizer's if that was passed, otherwise the ``default`` of the group's
        algorithm: SWAN's one iteration is not the default of a group of MNGD.
        """
        if option not in self.defaults:
            return default
        value = self.defaults[option]
        documented = {**find_algorithm(self.default_algorithm).options, **self.none_means}
        was_passed = option not in documented or not equal(value, documented[option])
        return value if was_passed else default

    def _own_lr(self, param_group: dict[str, Any]) -> None:
        """Give a group its own tensor: a scheduler that writes in place would count twice."""
        lr = param_group.get("lr", self.defaults["lr"])
        others = [group["lr"] for group in self.param_groups]
        if isinstance(lr, Tensor) and others:
            shared = any(lr is other for other in (*others, self.defaults["lr"]))
            param_group["lr"] = lr.clone() if shared else lr

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Parameters on the ``meta`` device and fake tensors, which have no values, get the state that
        they would have, and nothing is computed: a memory planner sees the state, not the scratch.

        Args:
            closure: Computes the loss again and returns it; called first.

        Returns:
            What ``closure`` returned.

        Raises:
            NonFiniteGradientError: If a gradient holds NaN or infinity and the group's policy is
                ``"raise"``: at the end of the step on a CPU, at the next step elsewhere. Its
                parameter was left as it was; others were updated.
            TypeError: If a gradient is sparse, or a trainer has exchanged a parameter for a flat
                piece.
        """
        self._guard.settle()
        if closure is None and self.is_probed():
            self.init_state()
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Set by torch.amp.GradScaler for the length of this call.
        scale: Tensor | None = getattr(self, "grad_scale", None)
        overflow: Tensor | None = getattr(self, "found_inf", None)
        if overflow is not None and overflow.device.type == "cpu":
            if bool(overflow):
                return loss
            overflow = None
        self._listing.begin_step()
        self._begin_step()
        self._update(self._listing.slots(self.param_groups, type(self).__name__), scale, overflow)
        for group in self.param_groups:
            count_step(group)
        self._guard.end_step()
        return loss

    @torch.no_grad()
    def update(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Update some parameters alone: a part of a step, which `step` must end.

        The first call of a step looks at all parameters of the optimizer, others at ``params``.

        Args:
            params: Those that are not the optimizer's or have no gradient are left alone.

        Returns:
            The parameters whose gradients were used.

        Raises:
            TypeError: If a group needs all its gradients at once.
        """
        only = {*params}
        if not self._listing.is_made:
            self.check_one_by_one()
            self._begin_step()
        some = self._listing.find(only, self.param_groups)
        found = self._listing.slots(self.param_groups, type(self).__name__, some)
        self._update(found, None, None)
        empty = [param for param in only if param.numel() == 0]
        return [*(slot.param for _, slots in found for slot in slots), *empty]

    def check_one_by_one(self) -> None:
        """Refuse groups whose parameters cannot be updated one by one.

        Raises:
            TypeError: If a group needs all its gradients at once.
        """
        for index, group in enumerate(self.param_groups):
            if group["algorithm"] in NEEDS_ALL_GRADIENTS:
                raise TypeError(
                    f"group {index} has algorithm={group['algorithm']!r}, whose step needs the "
                    "norm of all gradients of the group, and here they come one by one; use "
                    "algorithm='spam' or 'adamw' for it, or step without GradientRelease"
                )

    @torch.no_grad()
    def is_probed(self) -> bool:
        """Whether a step now would only be torch's probe for state, which must change nothing else.

        While ``state`` is empty, torch's helpers for distributed checkpoints call ``step()`` with
        every learning rate and every gradient zero. `step` then calls `init_state` instead.
        """
        if self.state or torch.compiler.is_compiling():
            return False
        if not all(_is_known_to_be_zero(group["lr"]) for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        grads = [param.grad for param in params if param.grad is not None]
        if not 0 < len(grads) == len(params) or not all(map(has_values, grads)):
            return False
        return run(are_zero(grads))

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state that a first step would, so that a checkpoint can be read into it.

        Parameters that have state are left alone. One of which nothing is kept has an empty entry
        in ``state`` from then on, and torch's helpers for distributed checkpoints no longer probe:
        to step along zero gradients takes as much memory as all weights.
        """
        self._listing.check(self.param_groups)
        for group in self.param_groups:
            algorithm = find_algorithm(group["algorithm"])
            for param in group["params"]:
                if param.requires_grad and not self.state.get(param):
                    self.state[param] = _new_state(algorithm, param, group)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter with its name, or what errors call it."""
        for index, group in enumerate(self.param_groups):
            yield from named(group, index)

    @in_full_precision
    def _update(
        self, found: Sequence[tuple[int, list[Slot]]], scale: Tensor | None, overflow: Tensor | None
    ) -> None:
        sharers = count_sharers((self.param_groups[index], slots) for index, slots in found)
        steps: list[Computation[Tensor]] = []
        taken: list[tuple[list[Slot], Group, Tensor | None]] = []
        for index, slots in found:
            group = self.param_groups[index]
            if not all(has_values(slot.grad) for slot in slots):
                self._init_state_of(slots, group)
                continue
            flag = None if overflow is None else overflow.to(slots[0].param.device) != 0
            context = Context(self.state, scale, flag, sharers)
            steps.append(find_algorithm(group["algorithm"]).step(slots, group, context))
            taken.append((slots, group, flag))
        for (slots, group, flag), finite in zip(taken, exchange(steps), strict=True):
            # An overflow is the scaler's to mend; only what is non-finite besides is the guard's.
            known = finite if flag is None else finite | flag
            self._guard.take([slot.name for slot in slots], known, group["nonfinite"])

    def _init_state_of(self, slots: Iterable[Slot], group: Group) -> None:
        """Make the state of a first step: all that a step of tensors without values does."""
        algorithm = find_algorithm(group["algorithm"])
        for slot in slots:
            if not self.state.get(slot.param):
                state = _new_state(algorithm, slot.param, group)
                if state:
                    self.state[slot.param] = state

    def skipped(self) -> dict[str, int]:
        """Return how many updates were left out for a non-finite gradient, by parameter."""
        return self._guard.skipped()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does; norms as their text, so that no class is pickled."""
        self._optimizer_state_dict_post_hooks.move_to_end(self._saved_hook.id, last=False)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Where every group has ``algorithm="adamw"``, the state of ``torch.optim.AdamW`` is loaded,
        too.

        Raises:
            ValueError: If it was made with another routing, or by an optimizer whose state cannot
                be used: the message names the parameter or the option that differs.
        """
        before, after = self._load_hooks
        self._optimizer_load_state_dict_pre_hooks.move_to_end(before.id)
        self._optimizer_load_state_dict_post_hooks.move_to_end(after.id, last=False)
        super().load_state_dict(state_dict)

    def _before_load(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check and complete what users' hooks made of a state dict."""
        own = [saved_options(group) for group in self.param_groups]
        groups = adopt_adamw(own, state_dict["param_groups"])
        check_same_routing(own, groups)
        state = from_saved_form(state_dict["state"])
        loaded = {**state_dict, "state": state, "param_groups": groups}
        self._loading = loaded, [dict(group) for group in self.param_groups], self.state
        return loaded

    def _after_load(self) -> None:
        """Restore what the version that saved the state did not have, and what is ours alone."""
        loaded, own_groups, own_state = self._loading
        del self._loading
        for group, own in zip(self.param_groups, own_groups, strict=True):
            for option, value in own.items():
                group.setdefault(option, value)
            for option in ("norms", "param_names"):
                if option in own:
                    group[option] = own[option]
            for option in ("rounding_step", NORM_HISTORY):
                if group.get(option) is not None and group["params"]:
                    group[option] = group[option].to(group["params"][0].device)
        self._has_momentum = [bool(group.get("momentum")) for group in self.param_groups]
        restore_types(self, loaded, own_state)

    def _begin_step(self) -> None:
        """Check what may have changed since the last step."""
        check_momentum(self.param_groups, self._has_momentum)
        self._listing.check(self.param_groups)


def _new_state(algorithm: Algorithm, param: Tensor, group: Group) -> dict[str, Any]:
    state: dict[str, Any] = {}
    algorithm.init_state(param, group, state)
    return state


def _is_known_to_be_zero(lr: float | Tensor) -> bool:
    """Whether a learning rate is zero, as far as that is known without waiting for a device."""
    return bool(lr == 0) if not isinstance(lr, Tensor) or lr.is_cpu else False
