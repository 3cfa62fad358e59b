"""Graph in, graph out: what a user writes, tracing, passes, lowering, pruning and export."""
