"""The YAML, validated."""
