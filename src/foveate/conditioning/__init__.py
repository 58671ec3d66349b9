"""What an image is drawn from: prompts and labels turned into tensors the models attend to."""
