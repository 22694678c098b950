"""Static scales from data: run prompts through the model, watch its keys and values, choose scales that fit them."""
