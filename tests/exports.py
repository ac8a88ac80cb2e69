"""What `sinkgd` exports: tables of tests and pages of the documents are counted against it."""

import sinkgd
from sinkgd.optim.grouped import GroupedOptimizer

_VALUES = {name: getattr(sinkgd, name) for name in dir(sinkgd) if not name.startswith("_")}
NAMES = {
    name
    for name, value in _VALUES.items()
    if getattr(value, "__module__", "").startswith("sinkgd.")
}
OPTIMIZER_CLASSES = {
    name
    for name in NAMES
    if isinstance(_VALUES[name], type) and issubclass(_VALUES[name], GroupedOptimizer)
}
