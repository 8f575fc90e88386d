"""Another server that computes answers: this one routes a prompt, that one runs the mixture that the routing names."""
