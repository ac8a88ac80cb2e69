"""The commands of `sinkgd`. Each is a file with a dataclass of options that has a ``run()``."""
