"""YAML files with line numbers: parsing, and what is wrong with their values, each at its place."""
