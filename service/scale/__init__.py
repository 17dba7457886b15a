"""More than one process: worker processes on one port, and Ray."""
