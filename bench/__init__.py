"""What is measured and committed: coverage, emission, quality, each with its page under docs/."""
