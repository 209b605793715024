"""What the scripts measure with: one file a question, and no flags are read in here."""
