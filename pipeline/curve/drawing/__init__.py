"""The curve as charts: in a page, and as pictures."""
