"""SR-Sinkhorn for GPUs in Triton.

From top to bottom:
    backend, support: which calls, devices and tensors the kernels accept
    descent, schedule: scales by whole iterations, and the update after them
    half_iterations: scales by half iterations, and updates, tile by tile
    products, product_plan: products of updates with a few vectors, for deflation
    shard_sums: sums of squares, for gradients that are sharded
    tables, launch: the tables that kernels read, and how kernels are started
    full_iteration, square_sums, update, skinny_matmul, primitives: the kernels, which need triton
"""

from sinkgd.kernels.triton.backend import TritonBackend as TritonBackend
