"""The Open Inference Protocol v2, over REST and gRPC: a second door to the same use case `predict`."""
