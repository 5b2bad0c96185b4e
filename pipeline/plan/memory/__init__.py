"""Memory of tasks and how it is shared out: projections, shares, windows."""
