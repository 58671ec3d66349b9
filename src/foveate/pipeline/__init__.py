"""The only place where a model meets a policy: prompts in, images out, and all that makes them again."""
