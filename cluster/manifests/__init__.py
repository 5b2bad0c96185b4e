"""What schedulers need to be told to merge on many machines: a pure function for each that returns the text."""
