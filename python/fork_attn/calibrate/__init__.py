"""`fork-attn calibrate`: the planner's costs, measured on this machine by its kernels."""
