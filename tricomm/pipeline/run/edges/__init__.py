"""What an edge of a pipeline carries: its tensors, and one direction of it."""
