"""Metrics, traces, logs, GPU readings."""
