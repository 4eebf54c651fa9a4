"""The floor that remembers: the database and the weights on disk. No torch, no HTTP."""
