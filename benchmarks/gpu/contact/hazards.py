"""What may go wrong only on a GPU; each item has a process of its own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import sinkgd
from contact import models
from contact.items import Item, Row, Section, Setting, Skipped, need_gpu, patient

SHAPES = ((64, 176), (176, 64), (64, 64), (257, 263))
RANKS = (0, 15)


def section() -> Section:
    """Return the section."""
    items = (
        Item("two graphs", two_graphs),
        Item("capture while a flag is pending", capture_pending),
        Item("deflated capture", deflated_capture),
        Item("no synchronisation", no_synchronisation),
        Item("memory stays", memory_stays),
        Item("grad scaler overflow", grad_scaler),
        Item("release", release),
        Item("fsdp2 on a mesh of one", fsdp2),
        Item("dtensors", dtensors),
        Item("second device", second_device),
        Item("default dtype", default_dtype),
        Item("compiled, reduce-overhead", compiled),
    )
    return Section("hazards", 50, patient(items), at_once=4, timed=False)


def _params(setting: Setting, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in SHAPES:
        drawn = [
            torch.empty(shape, dtype=torch.float32, device="cpu").normal_(generator=generator)
            for _ in range(2)
        ]
        params.append(nn.Parameter(drawn[0].to(setting.device)))
        params[-1].grad = drawn[1].to(setting.device)
    return params


def _optimizer(params: list[nn.Parameter], rank: int = 0, **options: Any) -> sinkgd.SinkGD:
    groups = [{"params": params, "algorithm": "sinkgd"}]
    return sinkgd.SinkGD(groups, lr=0.01, deflated_rank=rank, **options)


def _after(setting: Setting, steps: int, rank: int = 0) -> list[nn.Parameter]:
    """Return parameters after ``steps`` ordinary steps."""
    params = _params(setting)
    optimizer = _optimizer(params, rank)
    for _ in range(steps):
        optimizer.step()
    return params


def _compared(found: list[nn.Parameter], expected: list[nn.Parameter], **values: object) -> Row:
    """Return a row that says whether parameters agree within the precision of float32."""
    error = max(
        float((a.detach() - b.detach()).norm() / b.detach().norm())
        for a, b in zip(found, expected, strict=True)
    )
    return {"status": "ok" if error <= 1e-5 else "wrong", "relative_error": error, **values}


def _graph(optimizer: sinkgd.SinkGD, warm: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    optimizer.skipped()  # another item captures with pending flags
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def two_graphs(setting: Setting) -> Iterator[Row]:
    """Capture two graphs with the same addresses; replay both in any order, or the second alone."""
    need_gpu(setting)
    for order in ("01", "10", "0110", "drop the first, 1"):
        params = _params(setting)
        optimizer = _optimizer(params)
        graphs = [_graph(optimizer, warm=1), _graph(optimizer, warm=0)]
        which = [int(digit) for digit in order if digit.isdigit()]
        if order.startswith("drop"):
            graphs[0] = graphs[1]
            torch.cuda.empty_cache()
            torch.full((1 << 22,), -1, dtype=torch.int64, device=setting.device)
        for number in which:
            graphs[number].replay()
        torch.cuda.synchronize()
        yield _compared(params, _after(setting, 1 + len(which)), order=order)


def capture_pending(setting: Setting) -> Iterator[Row]:
    """Capture right after a step whose flags nobody has read."""
    need_gpu(setting)
    params = _params(setting)
    optimizer = _optimizer(params)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    optimizer.step()
    torch.cuda.synchronize()
    yield _compared(params, _after(setting, 3))


def deflated_capture(setting: Setting) -> Iterator[Row]:
    """Capture the deflated step."""
    need_gpu(setting)
    params = _params(setting)
    graph = _graph(_optimizer(params, 15), warm=2)
    graph.replay()
    torch.cuda.synchronize()
    yield _compared(params, _after(setting, 3, 15))


def no_synchronisation(setting: Setting) -> Iterator[Row]:
    """Step while torch raises an error for whatever waits for the device."""
    need_gpu(setting)
    model = models.small_model(setting.device)
    models.loss_of(model, models.small_tokens(setting.device)).backward()  # type: ignore[no-untyped-call]
    cases = {f"matrices, rank {rank}": _optimizer(_params(setting), rank) for rank in RANKS}
    cases["recipe"] = sinkgd.SinkGD(sinkgd.param_groups(model))
    for name, optimizer in cases.items():
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                optimizer.step()
            outcome = "ok"
        except RuntimeError as error:
            outcome = str(error)[:200]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield {"status": "ok" if outcome == "ok" else "wrong", "of": name, "outcome": outcome}


def memory_stays(setting: Setting) -> Iterator[Row]:
    """Step with gradients at new addresses; the memory in use does not grow."""
    need_gpu(setting)
    for rank in RANKS:
        params = _params(setting)
        optimizer = _optimizer(params, rank)
        held = []
        for _ in range(40):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
        grown = held[-1] - held[9]
        yield {"status": "ok" if grown < 1 << 20 else "wrong", "rank": rank, "grown_bytes": grown}


def grad_scaler(setting: Setting) -> Iterator[Row]:
    """A step with an overflow is skipped and halves the scale; the next equals an unscaled one."""
    for rank in RANKS:
        params = _params(setting)
        optimizer = _optimizer(params, rank)
        scaler = torch.amp.GradScaler(setting.device.type, init_scale=1024.0)
        scaler.scale(torch.zeros((), dtype=torch.float32, device=setting.device))
        before = [param.detach().clone() for param in params]
        grads = [param.grad.clone() for param in params if param.grad is not None]
        for param in params:
            param.grad = torch.full_like(param, float("inf"))
        scaler.step(optimizer)
        scaler.update()
        kept = all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad * scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.skipped()  # raises if the guard took the overflow for its own
        halved = scaler.get_scale() == 512.0
        row = dict(_compared(params, _after(setting, 1, rank), rank=rank))
        row["status"] = row["status"] if kept and halved else "wrong"
        yield row | {"kept": kept, "halved": halved}


def release(setting: Setting) -> Iterator[Row]:
    """Steps inside backward give the same weights as ordinary steps."""
    tokens = models.small_tokens(setting.device)
    found, expected = models.small_model(setting.device), models.small_model(setting.device)
    for model, trainer in (
        (found, models.released(found)),
        (expected, models.deflated(expected)),
    ):
        for _ in range(2):
            models.loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
            trainer.step()
            trainer.zero_grad()
    freed = all(param.grad is None for param in found.parameters())
    yield {**_compared([*found.parameters()], [*expected.parameters()]), "freed": freed}


def _mesh(setting: Setting) -> DeviceMesh:
    if setting.on_gpu:
        torch.cuda.set_device(0)
    path = Path(tempfile.mkdtemp()) / "store"
    kind = "nccl" if setting.on_gpu else "gloo"
    dist.init_process_group(kind, init_method=f"file://{path}", rank=0, world_size=1)
    return init_device_mesh(setting.device.type, (1,))


def fsdp2(setting: Setting) -> Iterator[Row]:
    """Shard a model on a mesh of one; its steps equal those of the unsharded model."""
    mesh = _mesh(setting)
    try:
        for name, make in (("plain", models.plain), ("deflated", models.deflated)):
            tokens = models.small_tokens(setting.device)
            found, expected = (models.small_model(setting.device) for _ in range(2))
            for block in found.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(found, mesh=mesh)
            for model in (found, expected):
                trainer = make(model)
                for _ in range(2):
                    models.loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
                    trainer.step()
                    trainer.zero_grad()
            whole = [nn.Parameter(_whole(param)) for param in found.parameters()]
            yield _compared(whole, [*expected.parameters()], recipe=name)
    finally:
        dist.destroy_process_group()


def _whole(param: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return param.full_tensor() if isinstance(param, DTensor) else param.detach()


def dtensors(setting: Setting) -> Iterator[Row]:
    """Step on DTensors that are replicated, or sharded by rows or columns, on a mesh of one."""
    mesh = _mesh(setting)
    try:
        for placement in (Replicate(), Shard(0), Shard(1)):
            for rank in RANKS:
                params = []
                for param in _params(setting):
                    assert param.grad is not None
                    lie = distribute_tensor(param.detach(), mesh, [placement])
                    params.append(nn.Parameter(lie))
                    params[-1].grad = distribute_tensor(param.grad, mesh, [placement])
                _optimizer(params, rank).step()
                whole = [nn.Parameter(_whole(param)) for param in params]
                expected = _after(setting, 1, rank)
                yield _compared(whole, expected, placement=str(placement), rank=rank)
    finally:
        dist.destroy_process_group()


def second_device(setting: Setting) -> Iterator[Row]:
    """Step on a device that is not the current one."""
    need_gpu(setting)
    if torch.cuda.device_count() < 2:
        raise Skipped("there is one GPU")
    for rank in RANKS:
        there = setting._replace(device=torch.device("cuda", 1))
        found = _after(there, 3, rank)
        torch.cuda.synchronize(1)
        here = [nn.Parameter(param.detach().to(setting.device)) for param in found]
        yield _compared(here, _after(setting, 3, rank), rank=rank)


def default_dtype(setting: Setting) -> Iterator[Row]:
    """Steps are the same under another default dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for rank in RANKS:
            expected = _after(setting, 2, rank)
            torch.set_default_dtype(dtype)
            try:
                found = _after(setting, 2, rank)
            finally:
                torch.set_default_dtype(torch.float32)
            yield _compared(found, expected, dtype=str(dtype), rank=rank)


def compiled(setting: Setting) -> Iterator[Row]:
    """Compile the step with CUDA graphs."""
    for rank in (0,) if setting.tiny else RANKS:
        params = _params(setting)
        optimizer = _optimizer(params, rank)
        step = torch.compile(optimizer.step, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            step()
        yield _compared(params, _after(setting, 4, rank), rank=rank)
