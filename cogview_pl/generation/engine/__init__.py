"""What the decoding loop runs on: the decoding state, and the forms of the model that decode fast."""
