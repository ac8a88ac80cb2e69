"""SR-Sinkhorn for GPUs in Triton.

From top to bottom: `backend`; `support` (what the kernels take); `descent`, `tiles`, `products` and
`shard_sums` (the launches of each kind of work), with `schedule` and `product_plan`; `tables` (what
kernels read) and `launch`; and the kernels themselves, which need triton: `full_iteration`,
`square_sums`, `update`, `skinny_matmul` and `primitives`.
"""

from sinkgd.kernels.triton.backend import TritonBackend as TritonBackend
