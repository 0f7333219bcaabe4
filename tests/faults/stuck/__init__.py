"""A service whose handlers do what handlers must not, as a Django app."""
