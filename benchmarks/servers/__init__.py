"""The servers of the comparison: the same steps and engine behind other frameworks."""
