"""Where Hydra looks for plugins; see search_path.py."""
