"""What is done to a real server to see whether its promises hold: load, slow clients, restarts, a long day.

Each part is a command (``python -m faults.load --help``) with a short form that continuous integration runs.
"""
