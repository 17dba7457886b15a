"""The HTTP server: routes, protocols, limits, API keys."""
