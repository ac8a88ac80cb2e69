"""What `sinkgd` exports: tables of tests and pages of the documents are counted against it."""

import sinkgd
from sinkgd.optim.grouped import GroupedOptimizer

NAMES = {
    name
    for name, value in vars(sinkgd).items()
    if not name.startswith("_") and getattr(value, "__module__", "").startswith("sinkgd.")
}
OPTIMIZER_CLASSES = {
    name
    for name in NAMES
    if isinstance(vars(sinkgd)[name], type) and issubclass(vars(sinkgd)[name], GroupedOptimizer)
}
