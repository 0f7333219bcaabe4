"""The payments service: money that is held, taken and let go again."""
