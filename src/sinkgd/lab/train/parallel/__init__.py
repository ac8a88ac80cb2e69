"""Several processes that train one model: who they are, how they share it, and who is lost."""

from sinkgd.lab.train.parallel.mesh import Mesh as Mesh
from sinkgd.lab.train.parallel.mesh import form_mesh as form_mesh
from sinkgd.lab.train.parallel.mesh import shard_model as shard_model
from sinkgd.lab.train.parallel.watch import LostRankError as LostRankError
from sinkgd.lab.train.parallel.world import World as World
from sinkgd.lab.train.parallel.world import join_world as join_world
