"""The families of kernels that ops are made of."""
