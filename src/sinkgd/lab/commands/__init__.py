"""The commands of `sinkgd`: one file each, a dataclass of options with a ``run()``."""
