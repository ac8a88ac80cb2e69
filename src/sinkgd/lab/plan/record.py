"""A plan as one flat JSON object: what was asked, what is needed, all methods."""

from dataclasses import asdict
from typing import Any

from sinkgd.lab.plan.methods import METHODS
from sinkgd.lab.plan.plan import Answer, MethodPlan, Question

_GIB = 2**30


def as_json(question: Question, answer: Answer, command: str) -> dict[str, Any]:
    """Return a plan as plain data; sizes in bytes, or in GiB where the name says so."""
    chosen = answer.of(question.method.name)
    work = question.work
    return {
        "command": command,
        "model": work.architecture.name,
        "optimizer": question.method.name,
        **_memory(chosen),
        "fits": chosen.fits,
        "limit_gib": answer.limit_bytes / _GIB,
        "parameters": answer.parameters,
        "matrix_parameters": answer.matrix_parameters,
        "step_seconds": chosen.time.step,
        "tokens_per_day": chosen.tokens_per_day,
        "days": chosen.days,
        "cost": chosen.cost,
        "architecture": asdict(work.architecture),
        "work": {key: value for key, value in vars(work).items() if key != "architecture"},
        "mesh": {**asdict(question.grid), "ranks": question.grid.ranks},
        "device": asdict(question.device),
        "assumed": {
            "mfu": question.mfu,
            "usable_memory": question.usable,
            "tokens": question.tokens,
            "price_per_gpu_hour": question.price,
        },
        "methods": [_method(one) for one in answer.methods],
        "ladder": [
            {
                "model": rung.model,
                "parameters": rung.parameters,
                "peak_gib": {name: peak / _GIB for name, peak in rung.peaks.items()},
                "fits": {name: peak <= answer.limit_bytes for name, peak in rung.peaks.items()},
                "reason": rung.reason,
            }
            for rung in answer.ladder
        ],
    }


def _memory(one: MethodPlan) -> dict[str, Any]:
    memory = one.memory
    return {
        "weights_plus_state_gib": memory.weights_and_state / _GIB,
        "weights_plus_gradients_plus_state_gib": memory.training / _GIB,
        "peak_gib": memory.peak / _GIB,
        "peak_moment": memory.moment,
    }


def _method(one: MethodPlan) -> dict[str, Any]:
    method = METHODS[one.name]
    return {
        "name": one.name,
        "title": one.title,
        "state": method.formula,
        "source": method.source,
        **_memory(one),
        "fits": one.fits,
        "memory_bytes": asdict(one.memory),
        "messages": [{**asdict(m), "sent_bytes": m.sent} for m in one.messages],
        "seconds": {**asdict(one.time), "step": one.time.step},
        "tokens_per_day": one.tokens_per_day,
        "days": one.days,
        "cost": one.cost,
    }
