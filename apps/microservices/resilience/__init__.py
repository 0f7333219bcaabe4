"""What stands between a caller and a service that fails: each policy is a Middleware."""
