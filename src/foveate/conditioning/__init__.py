"""The conditions of an image: prompts and labels turned into tensors the models attend to."""
