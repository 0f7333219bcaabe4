"""The orders service: what the shop sells, and who has ordered it."""
