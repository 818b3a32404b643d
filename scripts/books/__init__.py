"""Parts of scripts/books_compare.py."""
