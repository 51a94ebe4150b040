"""Tree attention side by side with what one would use instead; installed as fork_attn.bench.

`forest` describes a tree of contexts, `shapes` declares the suite's, `inputs` and `paging` lay out
tensors for one, every `ways_*` adapts implementations to the few methods of `way.Way`, `measure`
runs them in turn, and `compare` holds a result against a committed one.
"""
