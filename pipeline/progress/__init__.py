"""Events of a merge, and the report at its end."""
