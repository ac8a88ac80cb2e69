"""The table of accelerators, from their makers' data sheets; link rates are for one direction.

Power is the board's maximum, without host, network and cooling. Memory is the maker's number of GB,
read as GiB if the sizes of the memory stacks are powers of two. Between nodes, each device has its
own network card, as fast as those in the maker's servers; that of the RTX 4090 is assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sinkgd.lab.options import suggest
from sinkgd.lab.train.config import ConfigError

_GIB = 2**30


@dataclass(frozen=True)
class DeviceSheet:
    """An accelerator's figures, as far as estimates need them."""

    name: str
    title: str
    flops: float  # FLOP/s, dense, bfloat16 with float32 accumulation
    memory_bytes: int
    memory_rate: float  # bytes per second
    node_rate: float  # bytes per second to the node's other devices together, one direction
    network_rate: float  # bytes per second to another node, one direction
    watts: float
    node: int = 8  # devices in a node


_TABLE = (
    # nvidia.com/en-us/data-center/h100: 1,979 TFLOPS sparse, 3.35 TB/s, NVLink 900 GB/s both ways;
    # DGX H100: ConnectX-7, 400 Gb/s per GPU
    DeviceSheet("h100", "H100 SXM", 989.4e12, 80 * _GIB, 3.35e12, 450e9, 50e9, 700.0),
    # nvidia.com/en-us/data-center/h200: 141 GB, 4.8 TB/s, the rest as H100
    DeviceSheet("h200", "H200 SXM", 989.4e12, 141 * 10**9, 4.8e12, 450e9, 50e9, 700.0),
    # nvidia.com/en-us/data-center/hgx: eight have 36 PFLOPS sparse, 1.4 TB; 8 TB/s; NVLink 1.8 TB/s
    DeviceSheet("b200", "B200 SXM", 2.25e15, 180 * 10**9, 8e12, 900e9, 50e9, 1000.0),
    # nvidia.com/en-us/data-center/a100: 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s; DGX: 200 Gb/s
    DeviceSheet("a100-80gb", "A100 SXM 80 GB", 312e12, 80 * _GIB, 2.039e12, 300e9, 25e9, 400.0),
    # NVIDIA Ada architecture whitepaper, appendix A: 165.2 TFLOPS, 1,008 GB/s; PCIe 4 ×16. The
    # network is assumed: 100 Gb/s
    DeviceSheet("rtx-4090", "RTX 4090", 165.2e12, 24 * _GIB, 1.008e12, 32e9, 12.5e9, 450.0),
    # AMD Instinct MI300X data sheet: 1,307.4 TFLOPS, 192 GB, 5.3 TB/s, seven links of 64 GB/s
    DeviceSheet("mi300x", "MI300X", 1307.4e12, 192 * 10**9, 5.3e12, 448e9, 50e9, 750.0),
)

DEVICES: Mapping[str, DeviceSheet] = MappingProxyType({sheet.name: sheet for sheet in _TABLE})


def find_device(name: str) -> DeviceSheet:
    """Return the device called ``name``.

    Raises:
        ConfigError: If there is no such device; the message suggests the nearest name.
    """
    if name not in DEVICES:
        raise ConfigError(f"device is {name!r}; {suggest(name, DEVICES)}")
    return DEVICES[name]
