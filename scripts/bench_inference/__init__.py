"""Parts of scripts/bench-inference."""
