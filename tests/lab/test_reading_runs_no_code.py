"""No file that the package reads can run code or overflow the stack: the ways to read are few."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sinkgd

SOURCE = Path(sinkgd.__file__).parent
# By their last two names; where one is allowed, and why it is safe there.
REFUSED = {
    "pickle.load": (),
    "pickle.loads": (),
    "pickle.Unpickler": (),
    "pickle._Unpickler": ("lab/train/checkpoint_validation.py",),  # with an allow-list
    "dill.load": (),
    "joblib.load": (),
    "marshal.loads": (),
    "shelve.open": (),
    "yaml.load": (),
    "yaml.unsafe_load": (),
    "jit.load": (),
    "FileSystemReader": ("lab/train/checkpoint_validation.py",),
    "DefaultLoadPlanner": ("lab/train/checkpoint_validation.py",),
    "eval": (),
    "exec": (),
    "json.load": (),
    "json.loads": ("lab/disk.py",),  # `parse_json`: deep nesting is a ValueError
    "tomllib.load": (),
    "tomllib.loads": ("lab/train/config.py",),  # the same
}
MUST_SAY = {"torch.load": "weights_only", "np.load": "allow_pickle", "numpy.load": "allow_pickle"}


def names_of(node: ast.expr) -> str:
    """Return ``a.b`` of ``x.a.b`` and of ``a.b``, and ``a`` of a bare name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = names_of(node.value).rpartition(".")[2]
        return f"{before}.{node.attr}" if before else node.attr
    return ""


def findings(text: str, file: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Name | ast.Attribute | ast.Call):
            continue
        if isinstance(node, ast.Call):
            option = MUST_SAY.get(names_of(node.func))
            given = {word.arg: word.value for word in node.keywords}
            safe = option == "weights_only"
            if option and not (
                isinstance(value := given.get(option), ast.Constant) and value.value is safe
            ):
                yield f"{file}:{node.lineno} {names_of(node.func)} without {option}={safe}"
        elif file not in REFUSED.get(names_of(node), (file,)):
            yield f"{file}:{node.lineno} {names_of(node)}"


def test_every_file_is_read_by_a_safe_way():
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 200
    found = [
        line
        for file in files
        for line in findings(file.read_text("utf-8"), file.relative_to(SOURCE).as_posix())
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "pickle.load(f)",
        "x = json.loads",
        "eval('1')",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "np.load(f)",
    ],
)
def test_an_unsafe_way_is_found(code):
    assert list(findings(code, "lab/other.py"))


def test_models_in_evaluation_mode_are_no_finding():
    assert not list(findings("model.eval()", "lab/other.py"))
