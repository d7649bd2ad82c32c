"""What is known of every layer: rows, their second moments, times, and what ranks are predicted to do."""
