"""What cannot be run here, so that it is planned: the question of `on_paper`."""

NAME = "scale"
QUESTION = "On how few devices can 10, 70 and 405 billion weights be trained with each method?"
BACKGROUND = (
    "Every method trains all weights in bfloat16: a sequence of 4,096 tokens a device, blocks run "
    "again in backward, the loss in chunks, gradients released where the method can, FSDP over all "
    "devices. Time is an estimate at 40 % of the peak, without latency. It says nothing of how "
    "many tokens a method needs: that is what table1 is for."
)
