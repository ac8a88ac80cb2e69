"""An integration whose framework is absent says which package to install."""

import importlib
import sys

import pytest

FRAMEWORKS = {
    "axolotl": ("axolotl", "axolotl"),
    "megatron_core": ("megatron", "megatron-core"),
    "ms_swift": ("swift", "ms-swift"),
    "nemo_automodel": ("nemo_automodel", "nemo-automodel"),
    "torchtitan": ("torchtitan", "torchtitan"),
}


@pytest.mark.parametrize("integration", FRAMEWORKS)
def test_the_error_names_the_package_and_the_command(integration, monkeypatch):
    module, package = FRAMEWORKS[integration]
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"sinkgd.integrations.{integration}", raising=False)
    with pytest.raises(ImportError, match=rf"{package}, which .* run: pip install \S+$"):
        importlib.import_module(f"sinkgd.integrations.{integration}")
