"""The parameters of an optimizer: their names, their places in the groups, and checks of them.

Trainers may replace parameters after the optimizer was created. accelerate replaces them by FSDP2's
DTensors of the same shape, which works. DeepSpeed's ZeRO replaces all parameters of a group by one
flat tensor, which has neither rows nor columns. Other trainers keep the parameter and set its
``data`` to a flat tensor, or to another dtype. Users write other options into the groups. So every
step looks for parameters and options that have changed since they were checked.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sinkgd.distributed.shards import is_dtensor, local, placed_as
from sinkgd.matrix_views import dims_of, overlaps
from sinkgd.optim.arguments import check_kinds, list_names, options_of
from sinkgd.optim.method import Group, Method, Slot
from sinkgd.optim.methods import METHODS
from sinkgd.optim.nonfinite import POLICIES
from sinkgd.optim.transforms.cross_fit import init_held, is_held

States = Mapping[Tensor, Mapping[str, Any]]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Options that cannot be changed.
_FIXED = ("algorithm", "layout", "split")
# Options that schedulers change.
_SCHEDULED = frozenset({"weight_decay", "momentum", "betas"})


class Checked(NamedTuple):
    """The parameters and the options of a group when they were last checked."""

    params: list[Tensor]
    names: list[str]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    compared: frozenset[str]  # the names of the options that steps compare with those before
    options: Group

    def is_changed(self, i: int, param: Tensor) -> bool:
        """Whether a parameter has another shape or dtype than when it was checked."""
        return param.shape != self.shapes[i] or param.dtype != self.dtypes[i]


class Listed(NamedTuple):
    """A parameter and its place in the groups."""

    param: Tensor
    name: str  # as the model calls it, or a description for errors
    group: int  # the index of its group
    place: int  # its index in the group
    number: int  # its index among all parameters of the optimizer


class ParameterIndex:
    """Finds the parameters of an optimizer, and checks those that are new.

    `find` builds the index once per step, and again if a parameter is no longer in its place.
    Callers pass the groups and the states with every call, as torch may replace both.
    """

    def __init__(self, groups: Sequence[Group] = ()) -> None:
        self._checked: list[Checked] = [
            _checked(group, index) for index, group in enumerate(groups)
        ]
        self._index: dict[Tensor, Listed] | None = None

    @property
    def is_built(self) -> bool:
        """Whether the index was built since `begin_step`."""
        return self._index is not None

    def begin_step(self, groups: Sequence[Group], states: States) -> None:
        """Check new parameters, and forget the places of all, so that `find` looks again."""
        self._index = None
        self.check(groups, states)

    def add(self, group: Group, index: int) -> None:
        """Add a group after all others; its parameters have been checked."""
        self._checked.append(_checked(group, index))
        self._index = None

    def check(self, groups: Sequence[Group], states: States) -> None:
        """Check parameters and options that did not come through ``add_param_group``."""
        if torch.compiler.is_compiling():
            return
        if len(groups) == len(self._checked):
            for index, (group, before) in enumerate(zip(groups, self._checked, strict=True)):
                _check_fixed(group, before.options, index)
        if not _are_same(groups, self._checked):
            self._check_new(groups, states)
        for index, group in enumerate(groups):
            self._check_options(group, index)

    def _check_options(self, group: Group, index: int) -> None:
        """Check options that were changed, before the step writes anything.

        Schedulers change some numbers in every step. If only these have changed, one parameter is
        enough to check their range. Rates are not checked: reading one could wait for a device.
        """
        before = self._checked[index]
        options = {name: group[name] for name in before.compared if name in group}
        if removed := before.options.keys() - options.keys():
            raise ValueError(f"group {index} has lost its {list_names(sorted(removed))}; set it")
        changed = {key: options[key] for key in options if not _is_equal(key, options, before)}
        if not changed:
            return
        params = [*named(group, index)]
        if _SCHEDULED.issuperset(changed):
            params = params[:1]
        try:
            check_options(changed)
            for name, param in params:
                check_param(name, param, group, METHODS[group["algorithm"]])
        except (TypeError, ValueError) as error:
            raise type(error)(f"group {index} was changed: {error}") from None
        self._checked[index] = before._replace(options=options)

    def _check_new(self, groups: Sequence[Group], states: States) -> None:
        for index, name, param in _unchecked(groups, self._checked):
            group = groups[index]
            check_param(name, param, group, METHODS[group["algorithm"]])
            misfit = misfit_of_state(param, group, states.get(param, {}))
            if misfit is not None:
                raise TypeError(
                    f"{name!r} now has shape {tuple(param.shape)}, and its {misfit} is of another "
                    "shape; build a new optimizer after changing the shape of a parameter"
                )
        self._checked = [_checked(group, index) for index, group in enumerate(groups)]
        for index, own in enumerate(self._checked):  # the next check is of all other options
            fixed = {name: own.options[name] for name in _FIXED if name in own.options}
            self._checked[index] = own._replace(options=fixed)
        self._index = None

    def find(
        self, params: Collection[Tensor], groups: Sequence[Group], states: States
    ) -> list[Listed]:
        """Return the places of parameters in the groups; omit parameters that are in no group."""
        if self._index is None or not all(self._is_there(param, groups) for param in params):
            self.check(groups, states)
            self._index = _index_of(groups)
        index = self._index
        return sorted((index[p] for p in params if p in index), key=lambda own: own.number)

    def _is_there(self, param: Tensor, groups: Sequence[Group]) -> bool:
        found = None if self._index is None else self._index.get(param)
        if found is None or found.group >= len(groups):
            return False
        return _is_at(param, found.place, groups[found.group]["params"])

    def slots(
        self,
        groups: Sequence[Group],
        states: States,
        optimizer: str,
        some: Iterable[Listed] | None = None,
    ) -> list[tuple[int, list[Slot]]]:
        """List the parameters that have a gradient, as pairs: a group's index, and slots.

        The slots of a pair are on one device. Parameters without entries are omitted.

        Args:
            groups: The groups of the optimizer.
            states: The state of each parameter that has any.
            optimizer: The name of the optimizer for errors.
            some: Results of `find`; all parameters by default.

        Raises:
            TypeError: If a gradient is sparse, on another mesh than its parameter, or of a dtype
                that its method does not take; or a parameter has changed and no longer fits.
        """
        found: dict[tuple[int, torch.device], list[Slot]] = {}
        is_compiling = torch.compiler.is_compiling()
        for param, name, index, place, number in list_parameters(groups) if some is None else some:
            grad = param.grad
            if grad is None:
                continue
            if not is_compiling and self._checked[index].is_changed(place, param):
                self._check_new(groups, states)
            if param.numel() == 0:
                continue
            if grad.is_sparse:
                raise TypeError(
                    f"{name!r} has a sparse gradient, and {optimizer} needs dense ones, whichever "
                    "algorithm its group runs; make it dense, e.g. Embedding(sparse=False)"
                )
            if grad.dtype != param.dtype:
                group = groups[index]
                METHODS[group["algorithm"]].check_other_dtype(name, param, grad, group)
            slot = Slot(name, number, param, placed_as(param, grad, name))
            found.setdefault((index, param.device), []).append(slot)
        return [(index, slots) for (index, _), slots in found.items()]


def list_parameters(groups: Sequence[Group]) -> Iterator[Listed]:
    """Yield every parameter of the groups with its place."""
    first = 0
    for index, group in enumerate(groups):
        for place, (name, param) in enumerate(named(group, index)):
            yield Listed(param, name, index, place, first + place)
        first += len(group["params"])


def _index_of(groups: Sequence[Group]) -> dict[Tensor, Listed]:
    """Return the place of every parameter of the groups."""
    return {own.param: own for own in list_parameters(groups)}


def _is_at(param: Tensor, place: int, params: Sequence[Tensor]) -> bool:
    """Whether ``params`` has a parameter at an index."""
    return place < len(params) and params[place] is param


def _checked(group: Group, index: int) -> Checked:
    """Return what to remember of a group after its parameters were checked."""
    names, params = zip(*named(group, index), strict=True) if group["params"] else ((), ())
    shapes = [param.shape for param in params]
    dtypes = [param.dtype for param in params]
    algorithm = group["algorithm"]
    # All but the rate, and what a method counts.
    compared = {"algorithm", *options_of(algorithm)} - METHODS[algorithm].counters - {"lr"}
    options = {name: group[name] for name in compared if name in group}
    return Checked([*params], [*names], shapes, dtypes, frozenset(compared), options)


def _is_equal(name: str, options: Group, before: Checked) -> bool:
    """Whether an option has not changed; a tensor is the same only if it is the same object."""
    value, old = options[name], before.options.get(name)
    if value is old:
        return True
    if isinstance(value, Tensor) or isinstance(old, Tensor):
        return False
    return name in before.options and bool(value == old)


def _check_fixed(group: Group, before: Group, index: int) -> None:
    """Refuse another algorithm, and other matrices: they would need other state.

    Raises:
        ValueError: If one of these options has changed; the message gives the group and the values.
    """
    for name in _FIXED:
        was, now = before.get(name), group.get(name)
        if name in before and was is not now and was != now:
            raise ValueError(
                f"group {index} was changed: {name} was {was!r}, now {now!r}; build a new optimizer"
            )


def named(group: Group, index: int) -> Iterator[tuple[str, Tensor]]:
    """Return the parameters of a group with their names, or with a description for errors."""
    params = group["params"]
    names = [*group.get("param_names", ())][: len(params)]
    names += [unnamed(i, index) for i in range(len(names), len(params))]
    return zip(names, params, strict=True)


def unnamed(i: int, index: int) -> str:
    """Return the description of parameter ``i`` of group ``index``, which has no name."""
    return f"parameter {i} of group {index}"


def name_alike(groups: Sequence[Group], new: Group) -> None:
    """Name the parameters of all groups if one group has names, as torch requires."""
    params = new["params"]
    if isinstance(params, Set) or not groups:  # torch refuses a set
        return
    params = [params] if isinstance(params, Tensor) else list(params)
    new["params"] = params
    has_names = any(isinstance(param, tuple) for param in params)
    if "param_names" in groups[0] and not has_names:
        new["params"] = [(unnamed(i, len(groups)), param) for i, param in enumerate(params)]
    elif has_names and "param_names" not in groups[0]:
        for index, group in enumerate(groups):
            group["param_names"] = [unnamed(i, index) for i in range(len(group["params"]))]


def _are_same(groups: Sequence[Group], checked: Sequence[Checked]) -> bool:
    """Whether the groups have exactly the parameters that were checked."""
    return len(groups) == len(checked) and all(
        len(group["params"]) == len(before.params) and all(map(is_, group["params"], before.params))
        for group, before in zip(groups, checked, strict=True)
    )


def _unchecked(
    groups: Sequence[Group], checked: Sequence[Checked]
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield parameters that are new or have changed: index of the group, name and parameter.

    Raises:
        TypeError: If a parameter has another shape than before, or than the parameter that it
            replaces. Elementwise methods accept any shape.
    """
    known = {
        param
        for before in checked
        for i, param in enumerate(before.params)
        if not before.is_changed(i, param)
    }
    for index, group in enumerate(groups):
        new = [(name, param) for name, param in named(group, index) if param not in known]
        if new and index < len(checked) and not METHODS[group["algorithm"]].is_elementwise:
            _check_shapes(group["params"], checked[index], known)
        for name, param in new:
            yield index, name, param


def _check_shapes(params: Sequence[Tensor], before: Checked, known: set[Tensor]) -> None:
    """Refuse parameters that replace others of another shape, or whose own shape has changed."""
    current, earlier = {*params}, {*before.params}
    gone = [i for i, param in enumerate(before.params) if param not in current]
    rest = [param for param in params if param not in known and param not in earlier]
    pairs = [(i, param) for i, param in enumerate(before.params) if param in current]
    for place, i in enumerate(gone):
        if len(params) == len(before.params) and params[i] not in known:
            pairs.append((i, params[i]))
        elif rest:  # else the parameter was removed
            pairs.append((i, rest[min(place, len(rest) - 1)]))
    for i, new in sorted(pairs, key=lambda pair: pair[0]):
        if new.shape != before.shapes[i]:
            raise TypeError(
                f"{before.names[i]!r} had shape {tuple(before.shapes[i])} when its group was added "
                f"and was replaced by a tensor of shape {tuple(new.shape)}. DeepSpeed's ZeRO-1, "
                "ZeRO-2 and ZeRO-3 replace parameters by flat tensors, which have neither rows nor "
                "columns; shard the model with fully_shard (FSDP2), or give the group "
                "algorithm='adamw'"
            )


def misfit_of_state(param: Tensor, group: Group, state: Mapping[str, Any]) -> str | None:
    """Return the name of a state tensor that does not fit the parameter's shape; None if all do.

    Args:
        param: The parameter.
        group: The options with which the state was made.
        state: The state, which may be empty.
    """
    if not any(isinstance(value, Tensor) and value.dim() > 0 for value in state.values()):
        return None
    fresh = _fresh_state(param, group)
    if is_held(state):
        init_held(_without_values(param), group, fresh)
    for name, value in state.items():
        expected = fresh.get(name)
        if not isinstance(value, Tensor) or not isinstance(expected, Tensor):
            continue
        is_whole = is_dtensor(value) or not is_dtensor(param)
        if is_whole and not _have_one_shape(name, value, expected, group):
            return name
    return None


def _have_one_shape(name: str, value: Tensor, expected: Tensor, group: Group) -> bool:
    """Compare the shapes of a state, without the dimensions whose sizes options may have changed.

    A step makes such a state anew.
    """
    side = METHODS[group["algorithm"]].resizable.get(name)
    if side is None or value.dim() != expected.dim():
        return value.shape == expected.shape
    rows, cols = dims_of(expected.dim(), group["layout"])
    free = rows if side == "row" else cols
    pairs = enumerate(zip(value.shape, expected.shape, strict=True))
    return all(one == other for dim, (one, other) in pairs if dim not in free)


def has_state(group: Group) -> bool:
    """Whether a parameter of the group will have state."""
    return any(_fresh_state(param, group) for param in group["params"])


def _fresh_state(param: Tensor, group: Group) -> dict[str, Any]:
    """Return the state of an unsharded parameter before the first step, without values."""
    state: dict[str, Any] = {}
    METHODS[group["algorithm"]].init_state(_without_values(param), group, state)
    return state


def _without_values(param: Tensor) -> Tensor:
    return torch.empty(param.shape, dtype=param.dtype, device="meta")


def check_group(group: Group, index: int, method: Method, call: str) -> None:
    """Refuse options out of range, and parameters that do not fit the method of group ``index``.

    Args:
        group: The group.
        index: Its index.
        method: Its method.
        call: The right call for a model, for errors.

    Raises:
        ValueError: If an option is out of range, or a parameter does not fit; the message names it.
        TypeError: If an option or a parameter has the wrong type; the message names it.
        ImportError: If the group needs a package that is not installed.
    """
    check_options(group)
    for name, param in named(group, index):
        check_param(name, param, group, method, call)


def check_options(group: Group) -> None:
    """Refuse options of the wrong kind, and an unknown policy; methods check all other ranges.

    Args:
        group: All or some options of a group.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If a rate, a beta or the policy is out of range.
    """
    check_kinds(group)
    policy = group.get("nonfinite", POLICIES[0])
    if policy not in POLICIES:
        raise ValueError(f"nonfinite must be one of {POLICIES}, got {policy!r}")


def check_param(
    name: str, param: Tensor, group: Group, method: Method, call: str | None = None
) -> None:
    """Refuse a parameter that does not fit the method of its group.

    Args:
        name: The name of the parameter.
        param: The parameter.
        group: Its group.
        method: The method of the group.
        call: The right call for a model, for errors.

    Raises:
        ValueError: If the parameter or an option of its group does not fit, or entries of the
            parameter share memory; the message names it.
        TypeError: If the parameter is not real and floating, of 16 bits or more, was flattened, or
            cannot be handled by the method; the message gives its name.
    """
    check_initialized(name, param)
    if not param.is_floating_point():
        raise TypeError(
            f"{name!r} is {param.dtype}; only real floating-point parameters can be normalized"
        )
    if param.requires_grad and param.dtype not in _DTYPES:
        raise TypeError(
            f"{name!r} is {param.dtype}, and torch has no arithmetic for it; keep the weights that "
            "are trained in bfloat16 or float32"
        )
    if param.requires_grad and overlaps(local(param)):
        raise ValueError(
            f"entries of {name!r} share memory: its shape is {tuple(param.shape)}, its strides are "
            f"{param.stride()}; give the optimizer a parameter of its own memory, e.g. "
            "nn.Parameter(weight.contiguous())"
        )
    if getattr(param, "_fsdp_flattened", False) or hasattr(param, "ds_id"):
        raise TypeError(
            f"{name!r} was flattened by FullyShardedDataParallel or DeepSpeed ZeRO, and so has "
            "neither rows nor columns; shard the model with fully_shard (FSDP2)"
        )
    if param.ndim < method.least_dims:
        kind = "matrices" if method.least_dims == 2 else "matrices and vectors"
        remedy = f"Write {call}, or give" if call else "Give"
        raise ValueError(
            f"{group['algorithm']!r} updates {kind}; {name!r} has shape {tuple(param.shape)}. "
            f"{remedy} it to another algorithm, such as 'adamw'"
        )
    method.check(name, param, group)


def check_initialized(name: str, param: Tensor) -> None:
    """Refuse the parameter of a lazy module, such as ``nn.LazyLinear``, that has no shape yet.

    Raises:
        ValueError: If the parameter has no shape yet; the message gives its name.
    """
    if nn.parameter.is_lazy(param):
        raise ValueError(
            f"{name!r} belongs to a lazy module and has no shape yet; run one forward pass first"
        )
