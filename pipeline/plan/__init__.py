"""Everything that a merge will do, decided before it runs."""
