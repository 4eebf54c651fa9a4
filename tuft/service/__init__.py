"""The floor that decides: tenants, runs, the queue, futures and the scheduler. asyncio; no HTTP, no torch."""
