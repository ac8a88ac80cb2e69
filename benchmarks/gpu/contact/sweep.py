"""Bucket and tile sizes of the Triton backend: the plain step's time under each."""

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from unittest.mock import patch

import torch

from contact.contenders import (
    B1,
    COMPILED,
    DEFLATED,
    HALVES,
    LAYER,
    M60,
    M350,
    PEER,
    PLAIN,
    PLAIN_1,
    TINY,
    Contender,
    Workload,
    matrices,
)
from contact.items import Item, Row, Section, Setting, need_gpu
from contact.measure import synchronize, time_work
from sinkgd.kernels.triton.launch import kernels

AREAS = (1 << 13, 1 << 14, 1 << 15)  # entries of a tile; the default is in the middle
THREADS = (128, 256, 512)
ROOMS = (8 << 20, 16 << 20, 24 << 20, 32 << 20, 64 << 20, 256 << 20, 4 << 30)


def section(*, tiny: bool) -> Section:
    """Return the section."""
    workloads = (TINY,) if tiny else (B1, M350, M60)
    rooms = (1 << 16, 1 << 20) if tiny else ROOMS
    items = [
        Item(f"{workload.name}: buckets", _Buckets(workload, rooms), 30) for workload in workloads
    ]
    items += [Item(f"{workload.name}: tiles", _Tiles(workload), 30) for workload in workloads[:2]]
    return Section("sweep", 40, tuple(items))


def compile_section(*, tiny: bool) -> Section:
    """Return the section that compiles what other sections time; triton keeps it on disk."""
    workloads = (TINY,) if tiny else (LAYER, M60)
    items = [
        Item(f"{name} {workload.name}: {contender.name}", _Compile(workload, dtype, contender), 150)
        for contender in (PLAIN, HALVES, DEFLATED, PLAIN_1, PEER, COMPILED)
        for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32))
        for workload in workloads
        if contender is not COMPILED or dtype == torch.bfloat16
    ]
    items += [
        Item(f"area {area}, threads {threads}", _CompileTiles(workloads[0], area, threads), 150)
        for area, threads in itertools.product(AREAS, THREADS)
    ]
    return Section("compile", 0, tuple(items), at_once=8, timed=False)


def triton_modules() -> dict[str, ModuleType]:
    """Return the modules whose constants are swept."""
    names = ("half_iterations", "schedule", "descent", "backend")
    return {name: import_module(f"sinkgd.kernels.triton.{name}") for name in names}


@contextmanager
def changed(**constants: int) -> Iterator[list[str]]:
    """Set constants in every module of the backend that has them; yield the names that were set.

    Cached plans and compiler options are cleared before and afterwards.
    """
    modules = triton_modules()
    with ExitStack() as stack:
        found = []
        for (name, module), (constant, value) in itertools.product(
            modules.items(), constants.items()
        ):
            if hasattr(module, constant):
                stack.enter_context(patch.object(module, constant, value))
                found.append(f"{name}.{constant}")
        _forget(modules)
        try:
            yield found
        finally:
            _forget(modules)


def _tile(area: int, threads: int) -> dict[str, int]:
    """Return the constants of tiles of ``area`` entries that ``threads`` threads hold."""
    return {"AREA": area, "THREADS": threads, "ENTRIES": area // threads}


@contextmanager
def buckets_of(room: int) -> Iterator[list[str]]:
    """Let a bucket hold ``room`` bytes of gradients; yield the names that were set."""
    backend = triton_modules()["backend"]
    with ExitStack() as stack:
        found = []
        for name in ("_bucket_bytes", "_cached_bytes"):  # of half iterations, and of whole rows
            if hasattr(backend, name):
                stack.enter_context(patch.object(backend, name, lambda _: room))
                found.append(f"backend.{name}")
        yield found


def _forget(modules: dict[str, ModuleType]) -> None:
    for module in modules.values():
        for value in vars(module).values():
            clear = getattr(value, "cache_clear", None)
            # Kernels stay: they do not depend on what is swept, and take a while to import.
            if clear is not None and value is not kernels:
                clear()


class _Compile:
    """Takes one step, which compiles what it needs."""

    def __init__(self, workload: Workload, dtype: torch.dtype, contender: Contender) -> None:
        self.workload, self.dtype, self.contender = workload, dtype, contender

    def __call__(self, setting: Setting) -> Iterator[Row]:
        need_gpu(setting)
        begin = time.perf_counter()
        params = matrices(self.workload, self.dtype, setting.device)
        self.contender.build(params, setting)()
        synchronize(setting.device)
        yield {"seconds": round(time.perf_counter() - begin, 2)}


class _CompileTiles(_Compile):
    """Takes one step with tiles of another size."""

    def __init__(self, workload: Workload, area: int, threads: int) -> None:
        super().__init__(workload, torch.bfloat16, PLAIN)
        self.area, self.threads = area, threads

    def __call__(self, setting: Setting) -> Iterator[Row]:
        with changed(**_tile(self.area, self.threads)):
            yield from super().__call__(setting)


class _Buckets:
    def __init__(self, workload: Workload, rooms: tuple[int, ...]) -> None:
        self.workload, self.rooms = workload, rooms

    def __call__(self, setting: Setting) -> Iterator[Row]:
        params = matrices(self.workload, torch.bfloat16, setting.device)
        step = PLAIN.build(params, setting)
        yield {"workload": self.workload.name, "room": "default", **_time(step, setting)}
        for room in self.rooms:
            with buckets_of(room) as where:
                row = {"workload": self.workload.name, "room": room, "set": where}
                yield {**row, **_time(step, setting)}


class _Tiles:
    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def __call__(self, setting: Setting) -> Iterator[Row]:
        params = matrices(self.workload, torch.bfloat16, setting.device)
        step = PLAIN.build(params, setting)
        for area, threads in itertools.product(AREAS, THREADS):
            with changed(**_tile(area, threads)) as where:
                row: dict[str, object] = {
                    "workload": self.workload.name,
                    "area": area,
                    "threads": threads,
                    "set": where,
                }
                try:
                    row |= _time(step, setting)
                except RuntimeError as error:  # too many registers, say
                    row |= {"status": "error", "error": f"{type(error).__name__}: {error}"[:300]}
            yield row


def _time(step: object, setting: Setting) -> dict[str, float]:
    assert callable(step)
    seconds, most = (0.01, 3) if setting.tiny else (0.1, 10)
    return time_work(step, setting.device, seconds=seconds, most=most, warm=2).row()
