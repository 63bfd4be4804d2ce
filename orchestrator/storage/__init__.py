"""Object stores and locks."""
