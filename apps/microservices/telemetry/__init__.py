"""What tells people what happens: each sink one file, each with an off switch."""
