"""What the command shows: tables, and progress."""
