"""The list of the fleet: who has reported, who has fallen silent, and what happened when."""
