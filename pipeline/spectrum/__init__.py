"""Many models of one recipe: swept over its parameters, or searched for."""
