"""Optional transforms before and after the scales of SR-Sinkhorn.

`sinkgd.optim.methods.sinkhorn` runs them. Each module defines its options, their defaults and their
check. All are off by default. A step applies them in this order:

    momentum → tiny_rows → start → scales → deflate → operator_norm → momentum of the update
"""
