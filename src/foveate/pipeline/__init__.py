"""The pipeline: prompts in, images out, with all that reproduces them; the only place where a model meets a policy."""
