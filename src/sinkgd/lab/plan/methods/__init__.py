"""The table of methods: what each keeps between steps, for how long, and where that is said."""

from sinkgd.lab.plan.methods.method import ITERATIONS as ITERATIONS
from sinkgd.lab.plan.methods.method import Method as Method
from sinkgd.lab.plan.methods.method import eight_bit_bytes as eight_bit_bytes
from sinkgd.lab.plan.methods.method import usual_rank as usual_rank
from sinkgd.lab.plan.methods.table import METHODS as METHODS
from sinkgd.lab.plan.methods.table import find_method as find_method
