"""Task files: what is asked, how the answer is found in the text, and whether it is right."""
