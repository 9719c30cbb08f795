"""Models under study: the shipped network, torchvision's classifiers, the user's own."""
