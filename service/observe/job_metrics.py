"""Instruments of jobs."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

FILES = ("done", "failed")
WEBHOOKS = ("delivered", "failed")


class JobMetrics:
    """Series exist from the start, so that they have a rate from the first file on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.files = Counter(
            "solo_jobs_files_total", "Files of jobs finished", ["state"], registry=registry
        )
        self.webhooks = Counter(
            "solo_jobs_webhooks_total",
            "Attempts to deliver webhooks of jobs",
            ["result"],
            registry=registry,
        )
        self.store_errors = Counter(
            "solo_jobs_store_errors_total",
            "Accesses to the store of jobs that failed",
            registry=registry,
        )
        self.files_in_flight = Gauge(
            "solo_jobs_files_in_flight", "Files of jobs in progress", registry=registry
        )
        self.open = Gauge(
            "solo_jobs_open", "Jobs that are not done; every process shows all", registry=registry
        )
        self.files_open = Gauge(
            "solo_jobs_files_open",
            "Files of jobs that are not finished; every process shows all",
            registry=registry,
        )
        self.bytes = Gauge(
            "solo_jobs_bytes",
            "Bytes of uploads and results of jobs; every process shows all",
            registry=registry,
        )
        for state in FILES:
            self.files.labels(state)
        for result in WEBHOOKS:
            self.webhooks.labels(result)
