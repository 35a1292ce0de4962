"""What a cut makes of the user's own class: a copy with the tensors, integers and modules that a plan leaves."""
