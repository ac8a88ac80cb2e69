"""One torch optimizer whose parameter groups each name their method.

In a step, each group's method updates the parameters of this group. Parameters with a non-finite
gradient are left unchanged and reported to the guard.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from sinkgd.distributed.shards import all_have_values, is_dtensor, placed_as
from sinkgd.exchange import Computation, exchange, run
from sinkgd.optim.apply import count_step, init_counter
from sinkgd.optim.arguments import (
    ADDED_LATER,
    COMMON,
    as_groups,
    check_keys,
    check_kinds,
    check_runs,
    defaults_of_groups,
    equal,
    find_method,
    list_names,
    passed_of,
    plain,
    resolve,
)
from sinkgd.optim.dependent_options import check_own_options, check_passed_options
from sinkgd.optim.group_names import unique_name
from sinkgd.optim.held_out import Found, check_is_held, check_is_used, find_to_hold, forget, hold
from sinkgd.optim.method import Context, Group, Slot, are_zero
from sinkgd.optim.methods import METHODS
from sinkgd.optim.nonfinite import NonFiniteGuard
from sinkgd.optim.parameters import ParameterIndex, check_group, name_alike, named
from sinkgd.optim.saved_state import (
    adopt_adamw,
    check_same_routing,
    check_state_shapes,
    from_saved_form,
    restore_types,
    saved_options,
    to_saved_form,
)
from sinkgd.precision import in_full_precision

# Options that loading keeps: those that are not saved, and those of the program and the machine.
_KEPT = ("norms", "param_names", "backend", "nonfinite")


class GroupedOptimizer(Optimizer):
    """Base class of the optimizers of this package: all bookkeeping, and no arithmetic.

    A constructor argument is the default of the groups that do not set the option and whose method
    has no preset for it. An argument that was passed and that no group uses is an error, unless it
    equals what all groups have: ``SinkGD(param_groups(model), lr=1e-3)`` is refused, since
    `param_groups` sets every rate. A group may only have options of its own method.

    ``defaults`` agrees with the groups. If every group sets ``lr``, ``defaults["lr"]`` is the
    largest rate, so that schedulers which read it scale every group alike. ``defaults`` has
    ``momentum`` only if the optimizer has momentum, since torch's OneCycleLR and CyclicLR look for
    it there.

    Args:
        params: Tensors, (name, tensor) pairs, or groups of either, as in ``torch.optim``. A group
            may name its method by ``algorithm`` and set the options of that method.
        arguments: The arguments of the constructor, by name.

    Raises:
        TypeError: If ``params`` is a model or not a list of parameters or groups, or an option or a
            parameter has the wrong type.
        ValueError: If an argument or an option has no effect or is out of range, a parameter does
            not fit its method, or groups run matrix methods, but none runs the optimizer's own.
        ImportError: If a group needs a package that is not installed.
    """

    default_algorithm: ClassVar[str]
    # How a model is usually given to the optimizer, for errors.
    usual_call: ClassVar[str]
    # Whether the optimizer takes groups of which none runs its own method. If not, `check_runs`
    # refuses such groups, unless all of them run auxiliary methods.
    takes_every_group: ClassVar[bool] = False
    # Arguments that param_groups sets, too, with their defaults. None means that an argument was
    # not passed.
    none_means: ClassVar[Mapping[str, Any]] = MappingProxyType({"lr": 1e-3, "weight_decay": 0.0})

    def __init__(self, params: Iterable[Any], arguments: dict[str, Any]) -> None:
        self._guard = NonFiniteGuard()
        self._without_momentum: list[dict[str, Any]] = []  # groups
        self._rates_are_of_groups = False  # whether every group of the constructor had a rate
        self._parameters = ParameterIndex()
        name = type(self).__name__
        arguments = {option: plain(value) for option, value in arguments.items()}
        own_algorithm = None if self.takes_every_group else self.default_algorithm
        groups = as_groups(params, self.usual_call)
        given = [dict(group) for group in groups if isinstance(group, dict)]  # torch refuses others
        own = [{"algorithm": self.default_algorithm, **group} for group in given]
        check_kinds(passed_of(arguments, self.none_means))
        defaults, passed = resolve(arguments, self.none_means, self.default_algorithm)
        super().__init__(groups, defaults)
        if own_algorithm is not None:
            check_runs(name, own_algorithm, own, self.usual_call)
        self.defaults = defaults_of_groups(defaults, passed, own)
        self._rates_are_of_groups = all("lr" in group for group in own)
        check_passed_options(passed, self.param_groups)
        self._check_routing(given, passed)
        if isinstance(self.defaults["lr"], Tensor):
            self.defaults["lr"] = self.defaults["lr"].clone()
        if not self.defaults.get("momentum"):
            self.defaults.pop("momentum", None)
        self._add_hooks()

    def _check_routing(self, given: Sequence[Mapping[str, Any]], passed: Mapping[str, Any]) -> None:
        """Warn about groups that are probably a mistake.

        Args:
            given: The groups as the caller gave them, in the order of ``param_groups``.
            passed: The arguments that the caller passed.
        """

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled optimizer; torch calls it at the end of loading, too."""
        super().__setstate__(state)
        for option, value in ADDED_LATER.items():
            self.defaults.setdefault(option, value)
            for group in self.param_groups:
                if option in COMMON or option in METHODS[group["algorithm"]].options:
                    group.setdefault(option, value)
        self._without_momentum = [own for own in self.param_groups if not own.get("momentum")]
        if "_guard" not in self.__dict__:
            # torch does not copy it. Several rates mean that the groups had their own.
            self._rates_are_of_groups = True
            self._guard = NonFiniteGuard()
            self._parameters = ParameterIndex(self.param_groups)
            self._add_hooks()

    def _add_hooks(self) -> None:
        """Change state dicts in hooks, ordered so that users' hooks see the form that is saved."""
        self._saved_hook = self.register_state_dict_post_hook(to_saved_form)
        kind: Any = type(self)  # torch passes the optimizer to a hook
        self._load_hooks = (
            self.register_load_state_dict_pre_hook(kind._before_load),
            self.register_load_state_dict_post_hook(kind._after_load),
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Args:
            param_group: ``params``, and ``algorithm`` and its options if they differ from the
                optimizer's. A ``name`` that another group has gets a number, because Lightning's
                LearningRateMonitor refuses two groups of one name. With ``fused=True``,
                torch.amp.GradScaler passes its scale to `step`, as it does with torch's fused
                AdamW, instead of dividing gradients itself and waiting for the device.

        Raises:
            ValueError: If the algorithm is unknown, or an option or a parameter does not fit it.
            TypeError: If ``param_group``, an option or a parameter has the wrong type.
            ImportError: If the group needs a package that is not installed.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a group must be a dict, got {type(param_group).__name__}")
        for option in param_group.keys() - {"params"}:
            param_group[option] = plain(param_group[option])
        method = find_method(param_group.setdefault("algorithm", self.default_algorithm))
        check_keys(param_group, f"group {len(self.param_groups)}")
        given = dict(param_group)
        for option, value in method.presets.items():
            param_group.setdefault(option, value)
        for option, default in method.options.items():
            param_group.setdefault(option, self._default(option, default))
        self._check_has_rate(param_group)
        foreign = self.defaults.keys() - param_group.keys() - COMMON.keys() - {"lr", "weight_decay"}
        self._own_tensors(param_group)
        if "name" in param_group:
            taken = [group.get("name") for group in self.param_groups]
            param_group["name"] = unique_name(param_group["name"], taken)
        name_alike(self.param_groups, param_group)
        asks_for_fused = param_group.get("fused") is True
        super().add_param_group(param_group)
        for option in foreign:  # options of other methods, which torch copied from the defaults
            del param_group[option]
        try:
            check_group(param_group, len(self.param_groups) - 1, method, self.usual_call)
            own = {k: v for k, v in given.items() if not equal(v, self.defaults.get(k))}
            check_own_options(own, param_group)
        except (ImportError, TypeError, ValueError):
            self.param_groups.pop()
            raise
        if asks_for_fused:
            # On the instance, as torch does: Lightning refuses to clip if it is True.
            self._step_supports_amp_scaling = True
        if not param_group.get("momentum"):
            self._without_momentum.append(param_group)
        self._parameters.add(param_group, len(self.param_groups) - 1)

    def _check_has_rate(self, new: Mapping[str, Any]) -> None:
        """Refuse a later group of matrices without a rate if its default is that of other methods.

        If every group sets its rate, the default is the largest one: that of embeddings and head.
        """
        if "lr" in new or not self._rates_are_of_groups:
            return
        rates = {float(group.get("initial_lr", group["lr"])) for group in self.param_groups}
        if len(rates) > 1 and not METHODS[new["algorithm"]].is_auxiliary:
            raise ValueError(
                "the new group has no lr, and the other groups have the rates "
                f"{list_names([f'{rate:g}' for rate in sorted(rates)])}; give it one, or make it "
                "with param_groups(model, only=parameters)"
            )

    def _default(self, option: str, default: Any) -> Any:
        """Return the value of an option that a group does not set.

        It is the optimizer's argument if that was passed, otherwise the ``default`` of the group's
        method: SWAN's one iteration is not the default of a group of MNGD.
        """
        if option not in self.defaults:
            return default
        value = self.defaults[option]
        documented = {**METHODS[self.default_algorithm].options, **self.none_means}
        was_passed = option not in documented or not equal(value, documented[option])
        return value if was_passed else default

    def _own_tensors(self, param_group: dict[str, Any]) -> None:
        """Copy rates and counters that are tensors, so that no two groups have the same tensor.

        A scheduler would scale a shared rate twice, and a step would count twice. Only the rate of
        a single group stays the caller's tensor, as in torch.
        """
        lr = param_group.setdefault("lr", self.defaults["lr"])
        if isinstance(lr, Tensor) and self.param_groups:
            for group in (*self.param_groups, param_group):
                if group["lr"] is lr:
                    group["lr"] = lr.clone()
        for option in METHODS[param_group["algorithm"]].counters:
            if isinstance(param_group.get(option), Tensor):
                param_group[option] = param_group[option].clone()

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
            What ``closure`` returned; None without a closure.

        Raises:
            NonFiniteGradientError: If a gradient contains NaN or infinity and the group's policy is
                ``"raise"``: at the end of the step on a CPU, at the next step elsewhere. The
                parameter, or with AdamW its whole group, was left unchanged; all others were
                updated.
            TypeError: If a gradient is sparse, or a trainer has replaced a parameter by a flat
                tensor.
            ValueError: If an option of a group was changed to a value that does not fit, a
                scheduler has given momentum to a group that was built without it, or a group has
                ``cross_fit=True`` and `hold_out` was not called between two backward passes.
                Nothing was updated.
        """
        try:
            return self._step(closure)
        except BaseException:
            # torch.amp.GradScaler deletes them only after a step that returns.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        holds_out = any(group.get("cross_fit") for group in self.param_groups)
        self._guard.read_flags()
        if closure is None and self.is_probed():
            self.init_state()
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Set by torch.amp.GradScaler for the length of this call. ``found_inf`` is the number 0 if
        # no parameter has a gradient.
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found = getattr(self, "found_inf", None)
        overflow: Tensor | None = found if isinstance(found, Tensor) else None
        if overflow is not None and overflow.device.type == "cpu":
            if bool(overflow):
                forget(self.state)
                return loss
            overflow = None
        self._begin_step()
        slots = self._parameters.slots(self.param_groups, self.state, type(self).__name__)
        if holds_out:
            check_is_used(slots, self.param_groups, self.state)
        try:
            flags = self._update(slots, scale, overflow)
            for group in self.param_groups:
                count_step(group)
            for own in flags:
                self._guard.take(*own)
            self._guard.end_step()
        finally:
            if holds_out:
                forget(self.state)
        return loss

    @torch.no_grad()
    def hold_out(self) -> None:
        """Keep the scales of the gradients so far for the next step, and clear these gradients.

        For the matrices of groups with ``cross_fit=True``, as `sinkgd.optim.transforms.cross_fit`
        explains; the gradients of all other parameters go on accumulating. Call it once in each
        step, between the backward passes of two micro-batches. Save checkpoints after the step, not
        between these two.

        If ranks have parts of the batch, the gradients must be averaged over ranks: with
        DistributedDataParallel, the backward pass before must run outside ``no_sync()``, or the
        weights of the ranks drift apart.

        torch.amp.GradScaler does not know the gradients that were held out. If they overflow, the
        step treats them as non-finite gradients: use ``nonfinite="skip"`` with it.

        Raises:
            ValueError: If no group has ``cross_fit=True``, no matrix of such a group has a
                gradient, or `hold_out` was called before in this step; otherwise as in `step`.
            TypeError: As in `step`.
        """
        self._begin_step()
        found = self._parameters.slots(self.param_groups, self.state, type(self).__name__)
        held = find_to_hold(found, self.param_groups, self.state)
        self._hold_out(held)
        for _, slots in held:
            for slot in slots:
                slot.param.grad = None

    @in_full_precision
    def _hold_out(self, held: Found) -> None:
        context = Context(self.state, sharers=self._count_sharers(held))
        exchange(hold(held, self.param_groups, context))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, and give up what `hold_out` kept for this step."""
        super().zero_grad(set_to_none)
        if any(group.get("cross_fit") for group in self.param_groups):
            forget(self.state)

    @torch.no_grad()
    def update(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Update some parameters: a part of a step, which `step` must end.

        The first call of a step checks all parameters of the optimizer; later calls check
        ``params`` only.

        Args:
            params: The parameters. Those that have no gradient or belong to no group are left
                unchanged.

        Returns:
            The members of ``params`` that belong to a group and had a gradient, finite or not; and
            all members without entries.

        Raises:
            TypeError: If a group needs all its gradients at once, or as in `step`.
            ValueError: As in `step`.
        """
        only = {*params}
        if not self._parameters.is_built:
            self.check_one_by_one()
            self._begin_step()
        some = self._parameters.find(only, self.param_groups, self.state)
        found = self._parameters.slots(self.param_groups, self.state, type(self).__name__, some)
        for own in self._update(found, None, None):
            self._guard.take(*own)
        empty = [param for param in only if param.numel() == 0]
        return [*(slot.param for _, slots in found for slot in slots), *empty]

    def check_one_by_one(self) -> None:
        """Refuse groups whose parameters cannot be updated one by one.

        Raises:
            TypeError: If a group needs all its gradients at once.
        """
        for index, group in enumerate(self.param_groups):
            if reason := METHODS[group["algorithm"]].needs_all_gradients:
                raise TypeError(
                    f"group {index} has algorithm={group['algorithm']!r}, whose step needs {reason}"
                )

    @torch.no_grad()
    def is_probed(self) -> bool:
        """Whether a step now would be torch's probe for state, which must only create state.

        While ``state`` is empty, torch's helpers for distributed checkpoints call ``step()`` with
        all learning rates and all gradients zero. `step` then calls `init_state` instead.
        """
        if self.state or torch.compiler.is_compiling():
            return False
        if not all(_is_known_to_be_zero(group["lr"]) for group in self.param_groups):
            return False
        params = [(name, own) for name, own in self.named_parameters() if own.requires_grad]
        grads = [placed_as(own, own.grad, name) for name, own in params if own.grad is not None]
        if not 0 < len(grads) == len(params) or not all_have_values(grads):
            return False
        return run(are_zero(grads))

    @torch.no_grad()
    def init_state(self) -> None:
        """Create the state that a first step would create, so that a checkpoint can be loaded.

        Parameters that have state keep it. A parameter whose method keeps no state gets an empty
        entry in ``state``, so that torch's helpers for distributed checkpoints do not probe again:
        the zero gradients of a probe take as much memory as all weights.
        """
        self._parameters.check(self.param_groups, self.state)
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad and not self.state.get(param):
                    self.state[param] = _new_state(param, group)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter with its name, or a description for errors."""
        for index, group in enumerate(self.param_groups):
            yield from named(group, index)

    @in_full_precision
    def _update(
        self, found: Sequence[tuple[int, list[Slot]]], scale: Tensor | None, overflow: Tensor | None
    ) -> list[tuple[list[str], Tensor, str]]:
        """Update slots, and return what the guard takes: the names, the flags, the policy."""
        sharers = self._count_sharers(found)
        steps: list[Computation[Tensor]] = []
        taken: list[tuple[list[Slot], Group, Tensor | None]] = []
        for index, slots in found:
            group = self.param_groups[index]
            if not all_have_values([slot.grad for slot in slots]):
                self._init_state_of(slots, group)
                continue
            if group.get("cross_fit"):
                check_is_held(index, slots, self.state)
            device = slots[0].param.device
            flag = None if overflow is None else overflow.to(device) != 0
            own_scale = None if scale is None else scale.to(device)
            context = Context(self.state, own_scale, flag, sharers)
            steps.append(METHODS[group["algorithm"]].step(slots, group, context))
            taken.append((slots, group, flag))
        flags = []
        for (slots, group, flag), finite in zip(taken, exchange(steps), strict=True):
            # GradScaler handles overflows; the guard handles every other non-finite gradient.
            known = finite if flag is None else finite | flag
            flags.append(([slot.name for slot in slots], known, group["nonfinite"]))
        return flags

    def _count_sharers(self, found: Sequence[tuple[int, list[Slot]]]) -> int:
        """Return how many sharded groups share the memory for scratch, or 1 if none needs any."""
        groups = [(self.param_groups[index], slots) for index, slots in found]
        sharers = [
            group
            for group, slots in groups
            if any(is_dtensor(slot.param) for slot in slots)
            and METHODS[group["algorithm"]].needs_scratch(group)
        ]
        return max(1, len(sharers))

    def _init_state_of(self, slots: Iterable[Slot], group: Group) -> None:
        """Create the state of a first step, for tensors without values."""
        for slot in slots:
            if not self.state.get(slot.param):
                state = _new_state(slot.param, group)
                if state:
                    self.state[slot.param] = state

    def skipped(self) -> dict[str, int]:
        """Return how often each parameter had a non-finite gradient under the policy ``"skip"``.

        Raises:
            NonFiniteGradientError: If the flags of the last step, which a device sends late, show
                such a gradient in a group whose policy is ``"raise"``.
        """
        return self._guard.skipped()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does, after `to_saved_form`, so that no class is pickled."""
        self._optimizer_state_dict_post_hooks.move_to_end(self._saved_hook.id, last=False)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        The options of the groups are loaded, too, as torch does, except ``backend`` and
        ``nonfinite``. If every group has ``algorithm="adamw"``, the state of ``torch.optim.AdamW``
        can be loaded.

        Raises:
            ValueError: If the state was saved with another routing, or by an optimizer whose state
                cannot be used; the message names the parameter or the option that differs.
        """
        before, after = self._load_hooks
        self._optimizer_load_state_dict_pre_hooks.move_to_end(before.id)
        self._optimizer_load_state_dict_post_hooks.move_to_end(after.id, last=False)
        try:
            super().load_state_dict(state_dict)
        finally:
            self.__dict__.pop("_loading", None)  # torch may refuse what `_before_load` accepts

    def _before_load(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check and complete a state dict, after users' hooks have changed it."""
        own = [saved_options(group) for group in self.param_groups]
        groups = adopt_adamw(own, state_dict["param_groups"])
        check_same_routing(own, groups)
        state = from_saved_form(state_dict["state"])
        check_state_shapes(self.param_groups, groups, state)
        loaded = {**state_dict, "state": state, "param_groups": groups}
        self._loading = loaded, [dict(group) for group in self.param_groups], self.state
        return loaded

    def _after_load(self) -> None:
        """Restore options that the saved state lacks, and those that are not loaded."""
        loaded, own_groups, own_state = self._loading
        for group, own in zip(self.param_groups, own_groups, strict=True):
            for option, value in own.items():
                group.setdefault(option, value)
            for option in _KEPT:
                if option in own:
                    group[option] = own[option]
            for option in METHODS[group["algorithm"]].counters:
                if group.get(option) is not None and group["params"]:
                    group[option] = group[option].to(group["params"][0].device)
        self._without_momentum = [
            group
            for group, own in zip(self.param_groups, own_groups, strict=True)
            if not group.get("momentum") and not own.get("momentum")
        ]
        restore_types(self, loaded, own_state)
        for param, own in own_state.items():
            if not own:  # as `init_state` left it
                self.state.setdefault(param, {})

    def _begin_step(self) -> None:
        """Check what may have changed since the last step."""
        self._check_momentum()
        self._parameters.begin_step(self.param_groups, self.state)
        for group in self.param_groups:
            if group.get("rounding") == "stochastic":
                init_counter(group)

    def _check_momentum(self) -> None:
        """Refuse momentum in a group that was built without it, and has not loaded it.

        torch's OneCycleLR and CyclicLR write ``momentum`` into every group. In a group with
        ``betas``, it replaces the first of these, as the schedulers do with torch's AdamW.

        Raises:
            ValueError: If a group that was built without momentum has momentum; the message gives
                the group and the remedy.
        """
        for index, group in enumerate(self.param_groups):
            if "momentum" in group and "betas" in group:
                group["betas"] = (group.pop("momentum"), group["betas"][1])
            elif group.get("momentum") and any(group is own for own in self._without_momentum):
                raise ValueError(
                    f"group {index} was built without momentum and now has momentum="
                    f"{group['momentum']}; give the scheduler cycle_momentum=False, or build the "
                    "optimizer with momentum"
                )


def _new_state(param: Tensor, group: Group) -> dict[str, Any]:
    state: dict[str, Any] = {}
    METHODS[group["algorithm"]].init_state(param, group, state)
    return state


def _is_known_to_be_zero(lr: float | Tensor) -> bool:
    """Whether a learning rate is zero, as far as that is known without waiting for a device."""
    return bool(lr == 0) if not isinstance(lr, Tensor) or lr.is_cpu else False
