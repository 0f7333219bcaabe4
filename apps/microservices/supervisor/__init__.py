"""Processes that are started, watched, started again and stopped: the workers of a door, the services of a fleet."""
