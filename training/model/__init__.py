"""The SOLO network: backbone, neck, heads and the ranking of candidates."""
