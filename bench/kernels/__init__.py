"""Pack and unpack kernels against the copy of the same run and against torch."""
