"""`orchestrator demo`: from generated images to a compared model."""
