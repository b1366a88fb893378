"""What every operator uses unchanged: the choice of a backend, argument checks, autocast."""
