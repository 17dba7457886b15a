"""A server of several processes: one parent with the port, workers that serve.

    parent: accepts connections -> the worker with the fewest -> answers

A Python process runs Python code in one thread at a time, so one alone cannot use many cores where
the engine is cheap. Each worker is the whole server, with engines of its own.
"""
