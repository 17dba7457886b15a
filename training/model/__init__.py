"""The SOLO network: backbone, neck, heads and the graph that ends in ranked candidates."""
