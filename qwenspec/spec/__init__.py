"""The YAML's shape: what people write, validated."""
