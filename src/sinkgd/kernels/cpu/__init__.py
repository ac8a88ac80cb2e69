"""SR-Sinkhorn compiled for CPUs, by numba."""

from sinkgd.kernels.cpu.backend import CpuBackend as CpuBackend
