"""Sources of output tensors: looked up, checked, accounted for, and merged from other documents where they are."""
