"""Estimates of memory, messages, time and cost of training, even of models that do not fit here."""

from sinkgd.lab.devices import find_device as find_device
from sinkgd.lab.plan.architecture import Architecture as Architecture
from sinkgd.lab.plan.architecture import find_architecture as find_architecture
from sinkgd.lab.plan.methods import METHODS as METHODS
from sinkgd.lab.plan.methods import find_method as find_method
from sinkgd.lab.plan.peak_memory import Memory as Memory
from sinkgd.lab.plan.peak_memory import rank_memory as rank_memory
from sinkgd.lab.plan.planner import LADDER as LADDER
from sinkgd.lab.plan.planner import Answer as Answer
from sinkgd.lab.plan.planner import Question as Question
from sinkgd.lab.plan.planner import make_plan as make_plan
from sinkgd.lab.plan.rank_model import Grid as Grid
from sinkgd.lab.plan.trace import Work as Work
