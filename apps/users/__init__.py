"""The users service: who the customers and the staff of the shop are."""
