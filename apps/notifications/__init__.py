"""The notifications service: tells people what has happened to their orders."""
