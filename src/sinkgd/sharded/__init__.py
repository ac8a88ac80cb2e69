"""Updates of matrices that lie in pieces on a mesh of devices: only vectors travel."""

from sinkgd.sharded.add_up import add_up as add_up
from sinkgd.sharded.add_up import add_up_vectors as add_up_vectors
from sinkgd.sharded.add_up import agree as agree
from sinkgd.sharded.descend import OnMesh as OnMesh
from sinkgd.sharded.place import Place as Place
from sinkgd.sharded.place import groups_of as groups_of
from sinkgd.sharded.place import place_of as place_of
from sinkgd.sharded.place import sharded_dims as sharded_dims
from sinkgd.sharded.temper import Spread as Spread
from sinkgd.sharded.temper import spread_of as spread_of
from sinkgd.sharded.temper import temper_piece as temper_piece
