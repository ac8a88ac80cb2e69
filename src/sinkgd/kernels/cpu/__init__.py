"""SR-Sinkhorn compiled for CPUs: where tensors lie, torch's threads, the loops, the backend."""

from sinkgd.kernels.cpu.backend import CpuBackend as CpuBackend
