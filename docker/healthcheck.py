"""Exits with 0 if the server in this container is ready, else with 1 and the reason."""

from __future__ import annotations

import http.client
import os
import sys


def main() -> int:
    """Requests /v2/health/ready on SOLO_PORT, without a proxy; returns the exit status."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(os.environ.get("SOLO_PORT", "8000")), timeout=5
    )
    try:
        connection.request("GET", "/v2/health/ready")
        response = connection.getresponse()
        body = response.read(1000).decode(errors="replace")
    except OSError as error:
        print(f"no answer: {error}")
        return 1
    finally:
        connection.close()
    print(f"{response.status} {body}")
    return 0 if response.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
