"""Annotation tools and viewers as clients of a running server; README.md says how to start each."""
