"""SR-Sinkhorn for GPUs in Triton: the plan of a call, its tables, the kernels, the backend."""

from sinkgd.kernels.triton.backend import TritonBackend as TritonBackend
