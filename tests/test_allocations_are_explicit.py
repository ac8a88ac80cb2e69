"""Every allocation in the sources names its dtype, and its device: no default can reach it."""

import ast
from pathlib import Path

import pytest

import sinkgd

SOURCES = Path(sinkgd.__file__).parent
TORCH = {
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "asarray", "scalar_tensor"),
    *("arange", "linspace", "logspace", "range", "eye", "empty_strided", "empty_permuted"),
    *("rand", "randn", "randint", "randperm", "tril_indices", "triu_indices"),
}
MODULES = {"Linear", "Embedding", "LayerNorm", "RMSNorm", "Conv1d", "Conv2d", "Bilinear"}
NUMPY = {"empty", "zeros", "ones", "full", "arange", "array", "linspace"}
# A model's weights lie where the caller builds it: `with torch.device("meta")`, for example.
WHERE_THE_CALLER_SAYS = ("lab/models/", "lab/plan/rank_model.py")
# Indices of a triangle are int64 whatever the default.
DTYPE_IS_FIXED = {"tril_indices", "triu_indices", "Generator"}


def is_number(node: ast.expr) -> bool:
    """Whether an expression is made of literal numbers alone."""
    return all(
        isinstance(part, ast.Constant | ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop)
        for part in ast.walk(node)
    )


def unnamed(source: str, path: str = "") -> list[str]:
    """List the allocations of a module that leave something to a default."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        choices = node.args[1:] if owner == "torch" and name == "where" else []
        if choices and all(is_number(choice) for choice in choices):
            found.append(f"{path}:{node.lineno}: torch.where of two numbers, without a dtype")
        if owner == "torch" and name in TORCH | {"Generator"}:
            needed = {"dtype", "device"}
        elif (owner == "nn" and name in MODULES) or (owner in {"np", "numpy"} and name in NUMPY):
            needed = {"dtype"}
        else:
            continue
        if path.startswith(WHERE_THE_CALLER_SAYS):
            needed -= {"device"}
        if name in DTYPE_IS_FIXED:
            needed -= {"dtype"}
        named = {keyword.arg for keyword in node.keywords}
        if name == "Generator" and node.args:
            named.add("device")
        if needed - named:
            missing = ", ".join(sorted(needed - named))
            found.append(f"{path}:{node.lineno}: {owner}.{name} without {missing}")
    return found


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("torch.zeros(3)", 1),
        ("torch.zeros(3, dtype=torch.float32)", 1),
        ("torch.zeros(3, dtype=torch.float32, device='cpu')", 0),
        ("nn.Linear(3, 4)", 1),
        ("np.arange(3)", 1),
        ("torch.Generator()", 1),
        ("torch.zeros_like(x)", 0),
        ("torch.where(x > 1, 2.0**64, -1.0)", 1),
        ("torch.where(x > 1, y, 1.0)", 0),
    ],
)
def test_an_allocation_without_a_dtype_is_found(line, count):
    assert len(unnamed(line)) == count


def test_every_allocation_names_its_dtype_and_device():
    found = [
        place
        for path in sorted(SOURCES.rglob("*.py"))
        for place in unnamed(path.read_text(encoding="utf-8"), str(path.relative_to(SOURCES)))
    ]
    assert not found, "\n".join(found)
