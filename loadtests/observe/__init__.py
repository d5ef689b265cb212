"""What stands beside a running platform to watch it: Prometheus, a collector of traces, a page of the dashboards."""
