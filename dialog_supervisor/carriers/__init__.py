"""Phone companies: what one must do in `base`, what it has yet to play in `playout`, and a package for each."""
