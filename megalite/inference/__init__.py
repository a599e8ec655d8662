"""Generation and evaluation on any layout."""
