"""Training harness: GCL on pairs of queries and documents with open_clip models (`python -m gcl_kernels.training`)."""
