"""Parts of scripts/bench-train."""
