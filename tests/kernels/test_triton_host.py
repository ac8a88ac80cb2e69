"""What a step on a GPU costs the host, by counts: triton runs, its device and driver are fakes.

This file is also the program that counts.
"""

from itertools import combinations

import pytest

from compiled_for_gpus import lines_of, write

pytest.importorskip("triton")

LAYERS = 2
CALLS_A_MATRIX = 18  # of Python functions, all but one or two of them the optimizer's
CALLS_A_STEP = 245  # some of them for the messages of groups, of which there are none
CALLS_A_LAUNCH = 6  # in triton's launcher


@pytest.fixture(scope="module")
def found():
    """What the program below counts."""
    (found,) = lines_of(__file__)
    return found


def test_a_steady_step_goes_past_the_dispatcher(found):
    for one in found["models"]:
        assert one["dispatched"] == 0, one
        assert one["compiled"] == 0, one


def test_a_steady_deflated_step_goes_past_it_too(found):
    assert found["deflated"]["launches"] > 20
    assert found["deflated"]["dispatched"] == 0
    assert found["deflated"]["compiled"] == 0


def test_addresses_travel_in_one_copy(found):
    assert {one["copies"] for one in found["models"]} == {1}


def test_torch_calls_do_not_grow_with_the_number_of_matrices(found):
    assert len({one["torch_calls"] for one in found["models"]}) == 1
    assert found["models"][0]["torch_calls"] <= 12


def test_python_calls_of_a_step(found):
    for one in found["models"]:
        most = CALLS_A_STEP + CALLS_A_MATRIX * one["matrices"] + CALLS_A_LAUNCH * one["launches"]
        assert one["calls"] <= most, one


def test_a_variant_is_dispatched_once(found):
    assert found["first"]["dispatched"] == found["first"]["compiled"]
    assert found["first"]["dispatched"] < found["first"]["launches"]


def test_another_alignment_is_another_variant(found):
    assert found["shifted"]["dispatched"] > 0


def test_what_triton_tells_apart_is_told_apart(found):
    assert found["confused"] == []


def test_no_argument_has_a_name_that_the_dispatcher_uses(found):
    assert found["unbound"] == []


def test_where_the_dispatcher_is_not_known_every_launch_goes_through_it(found):
    assert found["unknown"]["dispatched"] == found["unknown"]["launches"] > 0
    assert found["unknown"]["warnings"] == 1


def test_a_hook_sends_launches_through_the_dispatcher(found):
    assert found["hooked"]["dispatched"] == found["hooked"]["launches"] > 0


# In the counting process --------------------------------------------------------------------------


def count():
    import warnings

    import torch
    from triton import knobs

    from sinkgd.kernels.triton import launch
    from sinkgd.lab.bench.gpu.host_time import Step, fake_gpu, matrix_shapes, measure

    models = []
    for model, layers in [("llama-60m", 1), ("llama-60m", 4), ("llama-1b", 2), ("llama-7b", 1)]:
        one = measure(model, steps=3, layers=layers)
        models.append(one._asdict())
    with fake_gpu() as gpu, torch.no_grad():

        def counts(step):
            gpu.launches = gpu.dispatched = gpu.compiled = 0
            step.move_gradients()
            step()
            return {
                "launches": gpu.launches,
                "dispatched": gpu.dispatched,
                "compiled": gpu.compiled,
            }

        step = Step(matrix_shapes("llama-1b", LAYERS))
        first = counts(step)
        counts(step)
        step.memory = [memory[1:] for memory in step.memory]  # by two bytes
        shifted = counts(step)
        counts(step)
        knobs.runtime.launch_enter_hook.add(print_nothing)
        hooked = counts(step)
        knobs.runtime.launch_enter_hook.remove(print_nothing)
        calls = dict(launch._CALLS)
        launch._CALLS.clear()
        launch._passes_constants.cache_clear()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            unknown = counts(step)
            counts(step)
        unknown["warnings"] = len(heard)
        launch._CALLS.update(calls)
        launch._passes_constants.cache_clear()
        lowered = Step([(64, 96), (96, 64), (64, 160), (160, 64)], deflated_rank=4)
        # Nothing fills the scales, which may hold anything.
        lowered.optimizer.param_groups[0]["nonfinite"] = "skip"
        counts(lowered)
        counts(lowered)
        found = {
            "models": models,
            "deflated": counts(lowered),
            "first": first,
            "shifted": shifted,
            "hooked": hooked,
            "unknown": unknown,
            "confused": confused(),
            "unbound": unbound(),
        }
    write(found)


def print_nothing(_):
    """Stand for a profiler."""


def confused():
    """Arguments that triton tells apart and `specialization` does not."""
    import torch

    from sinkgd.kernels.triton import launch

    memory = torch.empty(64, dtype=torch.float32)
    whole = memory[(-memory.data_ptr() // 4) % 4 :]
    tensors = [whole[at:].view(dtype) for at in (0, 1, 4) for dtype in (torch.float32, torch.int32)]
    numbers = [1, 2, 16, 1 << 31, (1 << 31) + 16, 1 << 63, 1.0, True]
    found = []
    for kernel in kernels():
        binder = kernel.device_caches[0][4]
        for at, param in enumerate(kernel.params):
            if param.is_constexpr:
                continue
            for one, other in combinations([*tensors, *numbers], 2):
                keys, theirs = [], []
                for value in (one, other):
                    arguments = [2.5] * len([p for p in kernel.params if not p.is_constexpr])
                    arguments[at] = value
                    keys.append(launch.specialization(kernel, arguments))
                    constants = {p.name: 0 for p in kernel.params if p.is_constexpr}
                    theirs.append(str(binder(*arguments, **constants)[1]))
                if theirs[0] != theirs[1] and keys[0] == keys[1]:
                    found.append(f"{kernel.__name__} {param.name} {one} {other}")
    return found


def unbound():
    """Kernels whose arguments triton's dispatcher cannot bind."""
    found = []
    for kernel in kernels():
        names = [param.name for param in kernel.params]
        bound, _, options = kernel.device_caches[0][4](**dict.fromkeys(names, 2))
        if list(bound) != names or any(value != 2 for value in bound.values()) or options:
            found.append(kernel.__name__)
    return found


def kernels():
    from sinkgd.kernels.triton import launch

    updates, products = launch.kernels("update"), launch.kernels("skinny_matmul")
    return (
        products.balance_scales,
        products.scale_vectors,
        products.matmul,
        products.matmul_transposed,
        launch.kernels("full_iteration").full_iteration,
        updates.finish,
        launch.kernels("square_sums").half_iteration,
        updates.update,
    )


if __name__ == "__main__":
    count()
