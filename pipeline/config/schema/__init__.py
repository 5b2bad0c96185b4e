"""The JSON Schema of the YAML, by its parts."""
