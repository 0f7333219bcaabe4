"""The HTTP edge: declarative views that send and emit; imports no service."""
