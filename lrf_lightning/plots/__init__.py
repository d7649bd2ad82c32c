"""Pictures of a result, and of a training for the rank monitor."""
