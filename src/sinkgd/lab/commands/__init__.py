"""The commands of `sinkgd`: dataclasses of options with a ``run()``, one in each file."""
