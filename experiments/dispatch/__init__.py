"""Parts of the script experiments.backends."""
