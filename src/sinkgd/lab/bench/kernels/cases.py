"""The shapes that kernels are swept over: each is a list of gradients that one call is given."""

from sinkgd.lab.bench.workloads import Shape

SQUARES = (64, 128, 256, 512, 1024, 2048, 4096)

CASES: dict[str, tuple[Shape, ...]] = {
    **{f"{size}x{size}": ((size, size),) for size in SQUARES},
    "32000x256": ((32000, 256),),  # tall
    "5461x2048": ((5461, 2048),),
    "2048x5461": ((2048, 5461),),
    "256x32000": ((256, 32000),),  # wide
    "1009x997": ((1009, 997),),  # primes
    "2000 of 64x64": ((64, 64),) * 2000,
    "16 of 512x512": ((16, 512, 512),),  # a batch in one tensor
}
