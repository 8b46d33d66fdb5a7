"""What torch.compile, torch.export and fake tensors see of a move: an operator with a shape, or an explained break."""
