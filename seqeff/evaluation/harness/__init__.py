"""Tasks of lm-evaluation-harness, which is needed only where they are run."""
