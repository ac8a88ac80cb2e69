"""What may stand before or after the scales of SR-Sinkhorn.

`sinkgd.optim.methods.sinkhorn` runs them. Each module has its options with their defaults and a
check of them. In a step they come in this order; all are off by default:

    momentum → tiny_rows → start → scales → deflate → operator_norm → momentum of the update
"""
