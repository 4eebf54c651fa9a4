"""The floor that speaks: HTTP and the wire formats of the Tinker API. No torch, no SQL."""
