"""What experiments/compare_layouts.py is made of: one question a file, and no flags in here."""
